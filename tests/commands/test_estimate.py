"""Predictions of memory and time: against real tensors on tiny models, by hand, and through the entry point."""

import json

import pytest
import torch
from command_line import run_here, write_module
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tiny import tiny_model, tiny_policy
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, LlamaForSequenceClassification

from lit_rlhf.algorithms import PPO
from lit_rlhf.config import CONFIG_DIR
from lit_rlhf.errors import UserError
from lit_rlhf.estimate import Estimate, estimate, require_fit
from lit_rlhf.estimation.roofline import Machine, ThisMachine
from lit_rlhf.estimation.shapes import Trace, shapes_only, size_of
from lit_rlhf.machine import peak_memory_gb, reset_peak_memory
from lit_rlhf.models import Policy, SeparateCritic, attention
from lit_rlhf.models.policy import byte_tokenizer

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY = ["policy=tiny", *(f"policy.{key}={value}" for key, value in SHAPE.items()), "machine=h100", "prompt_length=8"]
LORA = {"r": 4, "target_modules": "all-linear"}
GB = 1e9


def composed(*overrides: str, defaults: list[str] = TINY) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return compose("estimate", [*defaults, "paths.output_dir=run", *overrides])


def estimated(*overrides: str, defaults: list[str] = TINY) -> Estimate:
    return estimate(composed(*overrides, defaults=defaults))


def real_policy(**changes) -> Policy:
    torch.manual_seed(0)
    return Policy.from_config(tokenizer="bytes", max_position_embeddings=512, **{**SHAPE, **changes})


def tokens(rows: int, prompt: int, response: int) -> tuple[torch.Tensor, ...]:
    parts = torch.ones(rows, prompt, dtype=torch.long), torch.ones(rows, response, dtype=torch.long)
    return parts[0], parts[0].bool(), parts[1], parts[1].bool()


# ---- memory, against real tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("override", "lora"), [([], None), (["policy.lora={r: 4, target_modules: all-linear}"], LORA)])
def test_parameters_and_held_memory_are_those_of_the_real_run(override, lora):
    found = estimated(*override, "critic=separate", "trainer.precision=bf16-mixed")
    ppo = PPO(policy=real_policy(lora=lora), critic=SeparateCritic, reward=len)
    trained = [p for p in ppo.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = sum(x.nbytes for kept in optimizer.state.values() for x in kept.values())
    assert found.parameters["policy"] == sum(p.numel() for p in ppo.policy.parameters())
    assert found.parameters["trained"] == sum(p.numel() for p in trained)
    whole = sum(p.nbytes for p in real_policy().parameters())  # the base model's, fp32
    expected = {
        "weights": sum(x.nbytes for x in [*ppo.policy.parameters(), *ppo.policy.buffers()]),
        "critic": sum(x.nbytes for x in [*ppo.critic.parameters(), *ppo.critic.buffers()]),
        "optimiser": state,
    }
    assert {part: round(found.held[part] * GB) for part in expected} == expected
    gradients = sum(p.nbytes for p in trained)
    assert round(found.working["8 step"]["gradients"] * GB) == gradients
    split = estimated(*override, "critic=separate", "trainer.accumulate_grad_batches=2")
    assert round(split.held["gradients"] * GB) == gradients  # beside the next micro-batch's activations
    buffers = sum(x.nbytes for x in real_policy().buffers())
    copy = found.held if lora else found.working["1 rollout: decode"]  # freed before the update where all of it trains
    assert round(copy["decode copy"] * GB) == (whole // 2 + buffers if lora else whole // 2)
    linear = sum(m.weight.nbytes for m in real_policy().modules() if type(m) is torch.nn.Linear)
    assert round(found.held.get("reference", 0) * GB) == (0 if lora else whole - linear // 2 + buffers)


@pytest.mark.parametrize("heads", [4, 2])
def test_the_kv_cache_is_the_real_ones(heads):
    overrides = [f"++policy.num_key_value_heads={heads}", "algorithm.rollout_batch_size=16", "sampler.max_new_tokens=6"]
    found = estimated(*overrides, "trainer.precision=32-true")
    model = real_policy(num_key_value_heads=heads).model
    cache = DynamicCache(config=model.config)
    model(torch.ones(16, 8 + 6, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert found.working["1 rollout: decode"]["KV cache"] * GB == sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers
    )
    chunked = estimated(*overrides, "trainer.precision=32-true", "sampler.chunk_size=4")
    assert chunked.working["1 rollout: decode"]["KV cache"] == found.working["1 rollout: decode"]["KV cache"] / 4


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "gpt_oss", "qwen3_5_text", "lfm2"])
def test_windows_and_recurrent_states_are_held_as_they_really_are(kind, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    found = estimated(
        "policy=pretrained", f"policy.path={tmp_path}", "algorithm.rollout_batch_size=16", "sampler.max_new_tokens=6",
        "trainer.precision=32-true", defaults=["machine=h100", "prompt_length=8"],
    )  # fmt: skip
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for steps in (8, 1, 1, 1, 1, 1, 1):
            model(torch.ones(16, steps, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(x.nbytes for layer in cache.layers for x in tree_leaves(vars(layer)) if isinstance(x, torch.Tensor))
    assert found.working["1 rollout: decode"]["KV cache"] * GB == held


def test_experts_multiply_the_rows_that_are_sent_to_them():
    rows, length, answer = 4, 14, 6
    with shapes_only(cpu=True), Trace(259) as trace:
        tiny_policy("mixtral")(*tokens(rows, length - answer, answer)).logprobs.sum().backward()
    attention, experts = 2 * 32 * 32 + 2 * 32 * 16 + 32 * 4, 2 * (32 * 2 * 64 + 64 * 32)  # weights of a token; 2 of 4
    layer = rows * length * (attention + experts) + 2 * rows * 2 * length * length * 16  # rows against keys and values
    products = 2 * (2 * layer + rows * answer * 32 * 259)  # two operations each, of two layers and the head
    rotations = 2 * rows * 8 * length
    assert trace.flops == pytest.approx(3 * products + rotations, rel=0.02)


def test_activations_are_what_autograd_really_keeps():
    """Storages that the real forward pass saves for the backward pass, but for the weights."""
    policy, kept = real_policy(), {}
    held = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = policy.train()(*tokens(4, 8, 6))
        loss = output.logprobs.sum()
    real = sum(kept.values())
    del loss
    with shapes_only(cpu=True), Trace(policy.vocabulary) as trace:
        fake = real_policy().train()
        output = fake(*tokens(4, 8, 6))
    seen = trace.activations + trace.logits - size_of(fake)  # the model was made inside
    assert real <= seen <= 1.6 * real  # besides: what is freed on the way, and the outputs themselves


def test_gradient_checkpointing_and_micro_batches_save_activations():
    def update(*overrides: str) -> float:
        return sum(estimated(*overrides).working["7 forward, backward"].values())

    deep = ["algorithm=orpo", "policy.num_hidden_layers=6"]
    assert update(*deep, "policy.gradient_checkpointing=true") < 0.7 * update(*deep)
    assert update("trainer.accumulate_grad_batches=4") < 0.4 * update()


def test_shards_are_a_part_of_the_whole_and_ddp_holds_buckets():
    one = estimated()
    ddp, fsdp = (estimated(f"trainer={kind}", "machine=8xh100") for kind in ("ddp", "fsdp2"))
    assert (one.strategy, ddp.strategy, fsdp.strategy) == ("one device", "DDP", "FSDP2")
    for part in ("weights", "optimiser"):
        assert fsdp.held[part] == pytest.approx(one.held[part] / 8)
        assert ddp.held[part] == one.held[part]
    gradients = one.working["8 step"]["gradients"]
    assert fsdp.working["8 step"]["gradients"] == pytest.approx(gradients / 8)
    assert one.held["reference"] == ddp.held["reference"] > fsdp.held["reference"]
    assert fsdp.held["decode copy"] >= one.working["1 rollout: decode"]["decode copy"]
    assert ddp.held["DDP's buckets"] == gradients
    assert set(ddp.communication) == {"8 step"}
    assert set(fsdp.communication) == {"1 rollout: copy", "3 anchor", "7 forward, backward"}
    ring = 2 * 7 / 8 * gradients / 450  # all-reduce: both halves of a ring, 450 GB/s
    assert ddp.communication["8 step"] == pytest.approx(2 * 2 * ring)  # 32 rows in minibatches of 16, 2 epochs


@pytest.mark.parametrize("full", [True, False])
def test_a_reward_models_weights_and_passes_count(tmp_path, full):
    config = LlamaConfig(vocab_size=259, num_labels=1, pad_token_id=0, **SHAPE)
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    changes = ("reward=model", f"reward.path={tmp_path}", "sampler.max_new_tokens=6", "trainer.precision=bf16-mixed")
    found = estimated(*changes, f"reward.full_precision={str(full).lower()}")
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    assert round(found.held["reward"] * GB) == size_of(model) - (0 if full else 2 * layers)
    products = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    attention = 2 * 4 * 14 * 14 * 32  # layers * 2 products of 2 FLOP for each pair of positions and unit of width
    score = found.flops["2 score: LlamaForSequenceClassification"] * 1e12
    assert score == pytest.approx(32 * (14 * 2 * products + attention))  # 32 completions of 8 + 6 tokens


# ---- time ----------------------------------------------------------------------------------------------------------


def test_an_operations_time_is_the_longer_of_arithmetic_and_memory():
    machine = Machine(name="m", memory=1, bandwidth=10, fp32=0.01, bf16=0.1, efficiency=0.5, start=2.0)
    with Trace() as large:
        torch.zeros(256, 512) @ torch.zeros(512, 128)
    flops = 2 * 256 * 512 * 128
    assert large.flops == flops
    zeros = sum(4 * n for n in (256 * 512, 512 * 128)) / 10e9 / 0.5  # each is written
    assert machine.seconds(large) == pytest.approx(flops / 0.01e12 / 0.5 + zeros)
    x = torch.zeros(1000, dtype=torch.bfloat16)
    with Trace() as copy:
        x + x
    assert machine.operation(copy.operations[0][0]) == pytest.approx(3 * 2000 / 10e9 / 0.5)
    assert machine.seconds(copy) == 2e-6  # starting it takes longer


def test_a_stage_takes_what_its_operations_take_by_hand():
    """The decode step of a model whose products are bound by arithmetic, on a machine where nothing else costs."""
    free = ["machine.reserved=0", "machine.bandwidth=1e9", "machine.start=0", "machine.efficiency=1.0"]
    found = estimated(*free, "machine.fp32=0.001", "trainer.precision=32-true", "sampler.max_new_tokens=5")
    h, m, v = 32, 48, 259
    middle = 8 + 5 - 2  # positions in the cache in the middle of the decoding
    step = 32 * (2 * (2 * 4 * h * h + 2 * 3 * h * m) + 2 * 4 * middle * h + 2 * v * h)  # 32 rows, 2 layers, the head
    assert found.flops["1 rollout: decode"] == pytest.approx(4 * step / 1e12)
    assert found.seconds["1 rollout: decode"] == pytest.approx(4 * step / 1e9, rel=1e-3)
    prefill = 32 * (8 * 2 * (2 * 4 * h * h + 2 * 3 * h * m) + 2 * 4 * 8 * 8 * h + 2 * v * h)  # one row of logits each
    assert found.flops["1 rollout: prefill"] == pytest.approx(prefill / 1e12)
    assert found.iteration == pytest.approx(sum(found.seconds.values()))


def test_more_work_takes_more_time_and_memory():
    base = estimated("machine.start=0")
    for more in ("policy.num_hidden_layers=3", "prompt_length=64", "algorithm.rollout_batch_size=64"):
        found = estimated("machine.start=0", more)
        assert found.iteration > base.iteration
        assert found.peak > base.peak or more.startswith("algorithm")  # the update has micro-batches
    twice = estimated("machine.start=0", "algorithm.ppo_epochs=4")
    assert twice.seconds["7 forward, backward"] == pytest.approx(2 * base.seconds["7 forward, backward"])


def test_this_machine_is_measured_at_the_shapes_that_occur():
    machine = ThisMachine()

    def product(size: int) -> Trace:
        x, weight = torch.randn(size, size), torch.randn(size, size)
        with Trace() as trace:
            x @ weight
        return trace

    small, large = product(16), product(1024)  # 2^18 times the arithmetic: other processes cannot hide that
    assert 0 < machine.seconds(small) < machine.seconds(large)
    assert machine.operation(large.operations[0][0]) == machine.operation(large.operations[0][0])  # is run once
    assert 0.05 < machine.reserved < machine.memory


# ---- configs ---------------------------------------------------------------------------------------------------------


ALGORITHMS = sorted(path.stem for path in (CONFIG_DIR / "algorithm").glob("*.yaml"))


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a != "reward_model"])
def test_every_algorithm_can_be_estimated(algorithm):
    config = composed(f"algorithm={algorithm}", "policy.num_hidden_layers=1")
    metric = str(config.optimized_metric)
    found = estimate(config)
    assert {"7 forward, backward", "8 step"} <= set(found.seconds)
    assert ("1 rollout: decode" in found.seconds) == ("val/" not in metric)
    assert 0 < found.iteration < 1
    assert not found.not_counted


def test_a_reward_models_training_can_be_estimated(tiny_models):
    model = ["algorithm=reward_model", f"algorithm.model_path={tiny_models['encoder']}", "algorithm.max_length=32"]
    found = estimated(*model, defaults=["machine=h100"])
    assert found.parameters["scorer"] == found.parameters["trained"]


def test_a_large_model_takes_no_memory():
    shape = ["policy=llama_8b", "policy.num_hidden_layers=4", "trainer=fsdp2", "machine=8xh100"]
    reset_peak_memory()
    before = peak_memory_gb()
    found = estimated(*shape, defaults=[])
    assert peak_memory_gb() - before < 1  # its weights are 7.7 GB
    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336 + 2)
    assert found.parameters["policy"] == 4 * layer + 2 * 128256 * 4096 + 4096


def test_a_gpu_is_not_thought_to_do_what_is_faster_on_a_cpu(monkeypatch):
    seen, real = [], attention.products
    monkeypatch.setattr(attention, "products", lambda *args: seen.append(args) or real(*args))
    estimated("machine=h100", "trainer.precision=bf16-mixed")
    assert not seen
    monkeypatch.setattr(ThisMachine, "seconds", lambda *_: 0.0)
    estimated("machine=here", "trainer.precision=bf16-mixed")
    assert seen


def test_a_group_has_its_prompt_computed_once():
    def prefill(size: int) -> float:
        grpo = ["algorithm=grpo", f"algorithm.group_size={size}", "algorithm.rollout_batch_size=32"]
        return estimated(*grpo, "sampler.max_new_tokens=6").flops["1 rollout: prefill"]

    assert prefill(8) == pytest.approx(prefill(2) / 4)


def test_sending_at_an_unknown_rate_is_named():
    assert "what the processes send each other" in estimated("machine.devices=2", "machine.interconnect=0").not_counted
    assert not estimated("machine.devices=2").not_counted


def test_what_does_not_fit_says_so():
    found = estimated("policy.hidden_size=64", "machine.memory=1.001")
    with pytest.raises(UserError, match=r"does not fit: it needs 1\.0 GB per device and H100 has 1\.0; .* process"):
        require_fit(found)
    require_fit(estimated())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+machine.cores=4"], "nobody reads the config key machine.cores"),
        (["machine.bandwidth=0"], "machine.bandwidth must be"),
        (["response_length=99"], "response_length=99 is longer than sampler.max_new_tokens=24"),
        (["prompt_length=0"], "prompt_length must be"),
        (["trainer.devices=2"], "more than machine.devices=1"),
        (["trainer.precision=8-true"], "trainer.precision=8-true: an estimate knows auto, 32-true"),
        (["+nobody=1"], "nobody reads the config key nobody"),
        (["trainer=fsdp2", "machine=8xh100", "algorithm=trpo"], "TRPO cannot be sharded"),
        (["trainer=ddp", "machine=8xh100", "algorithm.minibatch_size=4"], "not divisible by the number of processes"),
    ],
)
def test_mistakes_are_named_with_their_key(overrides, message):
    with pytest.raises(UserError) as error:
        estimated(*overrides)
    assert message in str(error.value)


def test_code_of_the_users_own_is_named_as_not_counted(folder, monkeypatch):
    write_module(folder, "costly", "def judge(prompts, completions, **columns):\n    return [0.0] * len(completions)\n")
    monkeypatch.syspath_prepend(folder)
    own = ["reward._target_=costly.judge", "data._target_=costly.Prompts"]
    result = run_here("estimate", *TINY, *own, "format=json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["not_counted"] == ["reward costly.judge", "data costly.Prompts"]
    served = estimated("reward=judge", "reward.base_url=http://localhost:1", "reward.model=m")
    assert served.not_counted == ["reward JudgeReward: its server's time"]


def test_the_table_shows_parts_and_stages_and_nothing_is_written(folder):
    result = run_here("estimate", *TINY)
    assert result.code == 0, result.err
    for text in ("H100", "weights", "optimiser", "peak", "1 rollout: decode", "iteration"):
        assert text in result.out
    assert not list(folder.iterdir())
    assert "does not fit" in run_here("estimate", *TINY, "machine.memory=0.5").err
