"""What every online algorithm does with prompts, rewards and validation, shown with PPO on tiny models."""

import copy
import math
import random
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from classifiers import save_classifier
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.precision import HalfPrecision
from ppo_runs import fit, make
from tiny import LORA, Prompts, letters, tiny_model, tiny_policy
from torch.utils.data import DataLoader

from lit_rlhf.algorithms import PPO
from lit_rlhf.errors import UserError
from lit_rlhf.kl import AdaptiveKL, FixedKL
from lit_rlhf.metrics import lookup
from lit_rlhf.models import Policy
from lit_rlhf.models.critic import SeparateCritic, ValueHead
from lit_rlhf.models.policy import byte_tokenizer
from lit_rlhf.precision import use_half_weights
from lit_rlhf.rewards import CompositeReward, ConstrainedReward, ScoreShaper
from lit_rlhf.rollout.sampler import Sampler


def rows_module(rows, batch_size=4):
    class Module(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(rows, batch_size=batch_size, collate_fn=lambda r: {k: [x[k] for x in r] for k in r[0]})

    return Module()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "fine"}, {"prompt": "  "}], "prompt 1 of the batch has no tokens"),
        ([{"prompt": "x" * 200}], "200 tokens; with sampler.max_new_tokens=6 it does not fit the policy's context"),
        ([{"question": "a"}], "neither 'prompt' nor 'input_ids'"),
        ([{"prompt": [{"role": "user", "content": "hi"}]}], "no chat template"),
        ([{"prompt": 3}], "a prompt is a text or a list of messages"),
        ([{"prompt": "a", 7: "b"}], "a column of the prompt batch is called 7; its name must be a text"),
        ([{"prompt": "a", "completion_ids": 1}], "called 'completion_ids', which is an argument of every reward"),
        ([{"input_ids": [5, 999], "attention_mask": [1, 1]}], "prompt 0 of the batch has the token id 999; .* 259"),
    ],
)
def test_bad_prompts_are_refused_by_name(trainer, rows, message):
    with pytest.raises(UserError, match=message):
        fit(trainer, make(), data=rows_module(rows))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions, **_: [1.0] * (len(completions) - 1), "7 scores .* for 8 completions"),
        (lambda completions, **_: [float("nan")] + [1.0] * 7, "nan for sample 0"),
        (lambda completions, **_: [1.0] * 5 + [float("inf")] * 3, "inf for sample 5"),
        (lambda completions, **_: [None] * 8, "None for sample 0"),
        (lambda completions, **_: 1.0, "must return one number per completion"),
        (lambda completions, **_: {"a": [1.0] * 8, "b": [1.0] * 9}, "'b' returned 9 scores"),
        (lambda completions, **_: {"two\nlines": [1.0] * 8}, r"named a component 'two\\nlines'"),
        (lambda completions, **_: {"half \ud800": [1.0] * 8}, r"named a component 'half \\ud800'"),
    ],
)
def test_a_bad_reward_stops_the_run_before_anything_is_learned(trainer, reward, message):
    policy = tiny_policy()
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(UserError, match=message):
        fit(trainer, make(policy, reward=reward))
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())


def test_rewards_see_prompts_completions_and_columns(trainer):
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, columns=columns)
        return {"first": [1.0] * len(prompts), "second": torch.full((len(prompts),), 2.0)}

    watch = fit(trainer, make(reward=reward), max_epochs=1)
    assert [Prompts.texts[i] for i in seen["columns"]["number"]] == seen["prompts"]
    assert watch.rows[0]["objective/scores"] == 3.0
    assert watch.rows[0]["reward/second"] == 2.0
    assert watch.samples[0]["components"] == {"first": 1.0, "second": 2.0}


def test_a_composite_is_logged_raw_and_weighted(trainer):
    rewards = {"one": lambda completions, **_: [1.0] * len(completions), "letters": letters}
    reward = CompositeReward(rewards=rewards, weights={"one": 3.0, "letters": -0.5})
    watch = fit(trainer, make(reward=reward), max_epochs=1, data=Prompts(validation=True))
    row = watch.rows[-1]
    assert row["reward/one"] == 1.0
    assert row["reward/one/weighted"] == 3.0
    assert row["reward/letters/weighted"] == pytest.approx(-0.5 * row["reward/letters"])
    assert row["objective/scores"] == pytest.approx(3.0 - 0.5 * row["reward/letters"])
    assert row["val/objective/scores"] == pytest.approx(3.0 - 0.5 * row["val/reward/letters"])
    sample = watch.samples[0]
    assert sample["score"] == pytest.approx(3.0 - 0.5 * sample["components"]["letters"])


def test_a_constraint_learns_from_training_alone_and_survives_a_resume(trainer, tmp_path):
    def constrained():
        return ConstrainedReward(objective=letters, constraint=lambda completions, **_: [0.0] * len(completions),
                                 threshold=1.0, lr=0.5)  # fmt: skip

    reward = constrained()
    ppo = make(reward=reward)
    watch = fit(trainer, ppo, data=Prompts(validation=True))
    assert [row["reward/multiplier"] for row in watch.rows] == [0.0, 0.5]
    assert reward.multiplier == 1.0
    ppo.trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = constrained()
    rows = fit(trainer, make(reward=resumed), ckpt_path=tmp_path / "a.ckpt", max_epochs=3).rows
    assert rows[-1]["reward/multiplier"] == 1.0


@pytest.mark.parametrize("key", ["reward", "gold"])
def test_a_column_that_the_prompts_lack_is_refused_before_any_rollout(trainer, key, monkeypatch):
    def reward(prompts, completions, target, **_):
        return target

    ppo = make(**{"reward": letters, key: reward})  # which tries the policy
    monkeypatch.setattr(Sampler, "generate", lambda *_, **__: pytest.fail("rolled out"))
    with pytest.raises(UserError, match=f"'{key}': reward reads the column 'target' .* columns are number"):
        fit(trainer, ppo)


def test_held_out_metrics_can_be_monitored_whenever_they_are_measured(trainer, tmp_path):
    best = ModelCheckpoint(dirpath=tmp_path, filename="best", monitor="val/objective/scores", mode="max")
    stop = EarlyStopping(monitor="val/objective/kl", mode="max", patience=1, min_delta=1e9)
    fit(trainer, make(), data=Prompts(validation=True), max_epochs=8, check_val_every_n_epoch=2, callbacks=[best, stop],
        enable_checkpointing=True)  # fmt: skip
    assert stop.stopped_epoch == 3  # the second validation is no better than the first
    assert best.best_model_score is not None
    assert (tmp_path / "best.ckpt").exists()


def test_every_validation_has_its_prompts_in_the_same_order(trainer):
    """Completions of the same prompts and random numbers are compared over time."""

    class Shuffled(Prompts):
        def val_dataloader(self):
            return DataLoader([{"prompt": text} for text in self.texts], shuffle=True, generator=torch.Generator())

    watch = fit(trainer, make(), data=Shuffled(), max_epochs=3, check_val_every_n_epoch=1)
    orders = [[s["prompt"] for s in watch.samples if (s["split"], s["iteration"]) == ("validation", n)]
              for n in (1, 2, 3)]  # fmt: skip
    assert orders[0] == orders[1] == orders[2] != sorted(orders[0])


def test_prompts_of_several_validation_loaders_are_measured_together(trainer):
    class Two(Prompts):
        def val_dataloader(self):
            return [DataLoader([{"prompt": text}], batch_size=1) for text in self.texts[:2]]

    samples = fit(trainer, make(), data=Two(), max_epochs=1).samples
    assert [s["prompt"] for s in samples if s["split"] == "validation"] == ["hello", "a b c"]


@pytest.mark.parametrize("limit", [{"limit_train_batches": 1}, {"val_check_interval": 1}, {"overfit_batches": 1}])
def test_a_trainer_setting_that_would_cut_an_iteration_short_is_refused(trainer, limit):
    with pytest.raises(UserError, match=r"trainer\.\w+=1 would cut an iteration"):
        fit(trainer, make(), data=Prompts(validation=True), **limit)


def test_a_fast_dev_run_is_one_step(trainer):
    ppo = make()
    fit(trainer, ppo, fast_dev_run=True)
    assert ppo.trainer.global_step == 1


def test_a_loss_that_is_no_number_stops_the_run_before_the_weights(trainer):
    policy = tiny_policy()
    before = copy.deepcopy(policy.state_dict())

    class Broken(PPO):
        def loss(self, *args):
            loss, metrics = super().loss(*args)
            return loss * float("nan"), metrics

    ppo = Broken(policy=policy, reward=letters, sampler=Sampler(max_new_tokens=4), rollout_batch_size=8,
                 minibatch_size=4, max_skipped_steps=1)  # fmt: skip
    with pytest.raises(UserError, match=r"the last one step 1.* the loss is nan"):
        fit(trainer, ppo)
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())


def test_a_reward_whose_state_no_checkpoint_can_hold_is_refused_at_the_start(trainer):
    class Counting:
        def __call__(self, completions, **_):
            return [0.0] * len(completions)

        def state_dict(self):
            return {"seen": [np.float64(3.0)]}

        def load_state_dict(self, state):
            pass

    with pytest.raises(UserError, match=r"state_dict\(\)\['seen'\]\[0\] is a numpy.float64"):
        fit(trainer, make(reward=Counting()))


def test_no_reward_to_learn_from_is_refused():
    with pytest.raises(UserError, match="'reward' is None"):
        make(reward=None)


def test_async_rewards_are_awaited(trainer):
    async def reward(prompts, **_):
        return [0.5] * len(prompts)

    assert fit(trainer, make(reward=reward), max_epochs=1).rows[0]["objective/scores"] == 0.5


@pytest.mark.parametrize("kind", ["function", "network"])
def test_a_reward_that_asks_for_token_ids_may_score_every_token(trainer, kind):
    def per_token(completions, completion_ids, **_):
        assert len(completions) == len(completion_ids)
        return [[float(token) for token in ids] for ids in completion_ids]

    class Network(torch.nn.Module):
        def forward(self, completions, completion_ids, **_):
            return per_token(completions, completion_ids)

    recorded = {}

    class Recorded(PPO):
        def advantages(self, rewards, rollout, values):
            recorded.update(rewards=rewards, rollout=rollout)
            return super().advantages(rewards, rollout, values)

    reward = per_token if kind == "function" else Network()
    ppo = Recorded(policy=tiny_policy(spread=0.15), reward=reward, kl=FixedKL(coef=0.0), rollout_batch_size=8,
                   sampler=Sampler(max_new_tokens=8, stop_tokens=range(2, 60)), minibatch_size=4, seed=1)  # fmt: skip
    fit(trainer, ppo, max_epochs=1)
    rollout = recorded["rollout"]
    assert len(set(rollout.lengths.tolist())) > 2
    assert torch.equal(recorded["rewards"], torch.where(rollout.response_mask, rollout.response_ids, 0).float())


def test_token_rewards_of_the_wrong_length_name_the_sample(trainer):
    def reward(completion_ids, **_):
        return [[0.0] * (len(ids) + (number == 3)) for number, ids in enumerate(completion_ids)]

    with pytest.raises(UserError, match=r"'reward' returned \d token rewards for sample 3, which has \d tokens"):
        fit(trainer, make(reward=reward))


def test_a_reward_that_draws_random_numbers_draws_the_same_ones_for_the_same_seed(trainer):
    def noisy(prompts, **_):
        return [float(torch.rand(1)) + np.random.rand() + random.random() for _ in prompts]

    def scores(seed, disturb):
        ppo = make(reward=noisy, seed=seed)
        torch.manual_seed(disturb)
        np.random.seed(disturb)
        random.seed(disturb)
        return [row["objective/scores"] for row in fit(trainer, ppo).rows]

    first = scores(3, disturb=1)
    assert first == scores(3, disturb=2)
    assert first != scores(4, disturb=1)
    assert first[0] != first[1]


def test_tokenised_prompts_are_taken_as_they_are(trainer):
    class Tokens(L.LightningDataModule):
        def train_dataloader(self):
            ids = torch.tensor([[0, 0, 70, 71], [72, 73, 74, 75]] * 2)
            return [{"input_ids": ids, "attention_mask": (ids != 0).long(), "label": [1, 2, 3, 4]}]

    watch = fit(trainer, make(), data=Tokens(), max_epochs=1)
    widths = {tuple(row[m].tolist()) for b in watch.batches for row, m in zip(b.prompt_ids, b.prompt_mask, strict=True)}
    assert widths == {(70, 71), (72, 73, 74, 75)}


def test_chats_that_the_default_collate_turned_inside_out_are_explained(trainer):
    chats = DataLoader([{"prompt": [{"role": "user", "content": "hi"}]}] * 4, batch_size=2)
    with pytest.raises(UserError, match="turned inside out; give it collate_fn="):
        trainer(max_epochs=1).fit(make(), chats)


def test_a_column_of_some_batches_only_is_refused(trainer):
    batches = [{"prompt": ["a", "b"], "x": [1, 2]}, {"prompt": ["c", "d"]}]
    with pytest.raises(UserError, match="some batches of prompts have the column 'x' and others do not"):
        trainer(max_epochs=1).fit(make(), batches)


def test_a_generator_as_loader_is_refused_when_it_is_spent(trainer):
    batches = ({"prompt": [text] * 4} for text in Prompts.texts[:3])
    with pytest.raises(UserError, match="yields nothing in pass 2: it must be possible to iterate over it again"):
        trainer(max_epochs=3).fit(make(), batches)


def test_chats_go_through_the_template(trainer):
    policy = tiny_policy()
    policy.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}] * 4
    watch = fit(trainer, make(policy), data=rows_module(rows), max_epochs=1)
    batch = watch.batches[0]
    assert policy.tokenizer.decode(batch.prompt_ids[0][batch.prompt_mask[0]]) == "<user>hi<bot>"
    assert watch.samples[0]["prompt"] == "user: hi"


def test_a_loader_given_straight_to_fit_works(trainer):
    loop = trainer(max_epochs=1)
    ppo = make()
    loop.fit(ppo, DataLoader([{"prompt": t} for t in Prompts.texts], batch_size=3))
    assert ppo.iteration == 1


def test_a_sampler_that_cuts_the_distribution_validates_but_does_not_train(trainer):
    for sampler in (Sampler(max_new_tokens=4, top_k=5), Sampler(max_new_tokens=4, temperature=0.0)):
        ppo = make(sampler=sampler)
        loop = trainer(max_epochs=1)
        loop.validate(ppo, datamodule=Prompts(validation=True), verbose=False)
        assert math.isfinite(ppo.last_row["val/objective/kl"])
        with pytest.raises(UserError, match=r"top_k|temperature"):
            loop.fit(ppo, datamodule=Prompts())


def test_a_network_as_reward_is_neither_trained_nor_saved(trainer, tmp_path):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, completions, **_):
            assert not self.training
            return self.layer(torch.tensor([[float(len(text))] for text in completions])).squeeze(-1)

    network = Network()
    ppo = make(reward=network)
    fit(trainer, ppo)
    ppo.trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert all(not parameter.requires_grad for parameter in network.parameters())
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith(("policy.", "critic.")) for name in [*saved, *dict(ppo.named_parameters())])


def test_padding_of_token_rewards_counts_nowhere(trainer):
    recorded = {}

    class Recorded(PPO):
        def advantages(self, rewards, rollout, values):
            recorded.update(rewards=rewards, mask=rollout.response_mask)
            return super().advantages(rewards, rollout, values)

    def dense(completions, **_):
        return torch.ones(len(completions), 8)

    ppo = Recorded(policy=tiny_policy(spread=0.15), reward=dense, kl=FixedKL(coef=0.0), scores=ScoreShaper(scale=0.5),
                   sampler=Sampler(max_new_tokens=8, stop_tokens=range(2, 60)), rollout_batch_size=8, minibatch_size=4,
                   seed=1)  # fmt: skip
    watch = fit(trainer, ppo, max_epochs=1)
    assert not recorded["mask"].all()
    assert torch.equal(recorded["rewards"], recorded["mask"].float())
    assert watch.rows[0]["objective/scores"] == pytest.approx(watch.rows[0]["rollout/response_length"])


def test_a_second_fit_goes_on_with_new_episodes(trainer):
    ppo = make(lr=0.0)
    first = fit(trainer, ppo, max_epochs=1).samples
    second = fit(trainer, ppo, max_epochs=1).samples
    assert [s["completion"] for s in first] != [s["completion"] for s in second]
    assert ppo.iteration == 2


def test_validation_metrics_do_not_depend_on_the_batches(trainer):
    rows = []
    for size in (2, 4):
        ppo = make(tiny_policy(spread=0.15), sampler=Sampler(max_new_tokens=8, stop_tokens=range(2, 60)))
        loader = DataLoader([{"prompt": text} for text in Prompts.texts], batch_size=size)
        trainer().validate(ppo, loader, verbose=False)
        rows.append({k: v for k, v in ppo.last_row.items() if k.startswith("val/")})
    assert rows[0] == pytest.approx(rows[1], abs=1e-5)
    assert rows[0]["val/objective/scores_std"] > 0


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"},
        {"init_lora_weights": False}, {"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head"]},
    ],
    ids=str,
)  # fmt: skip
def test_lora_settings_that_break_the_reference_or_the_decoder_are_refused(lora):
    with pytest.raises(UserError, match=r"policy\.lora"):
        tiny_policy(lora={**LORA, **lora})


@pytest.mark.parametrize(("lora", "critic"), [(None, "value head"), (LORA, "policy"), (None, "classifier")])
def test_gradient_checkpointing_recomputes_every_layer_and_changes_nothing(lora, critic, trainer, tmp_path):
    """Of the policy and of a critic of its own, from the policy or from a reward model."""
    save_classifier(tmp_path, "llama")

    def weights(checkpointing):
        settings = {"lora": lora, "gradient_checkpointing": checkpointing}
        ppo = make(Policy(model=tiny_model(), tokenizer=byte_tokenizer(), **settings), lr=0.5, critic=makes[critic])
        ran = dict.fromkeys((ppo.policy.base.model, getattr(ppo.critic, "backbone", ppo.policy.base.model)), 0)
        for model in ran:
            model.layers[0].mlp.register_forward_pre_hook(
                lambda *_, model=model: ran.update({model: ran[model] + torch.is_grad_enabled()})
            )
        watch = fit(trainer, ppo, max_epochs=1)
        assert watch.rows[0]["rollout/logprob_gap"] < 1e-5
        return torch.cat([p.flatten() for p in ppo.parameters()]), list(ran.values())

    makes = {
        "value head": ValueHead, "policy": SeparateCritic,
        "classifier": lambda policy: SeparateCritic(policy, init=str(tmp_path)),
    }  # fmt: skip
    (with_it, twice), (without, once) = weights(True), weights(False)
    assert twice == [2 * count for count in once]
    torch.testing.assert_close(with_it, without, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("critic", [ValueHead, SeparateCritic])
@pytest.mark.parametrize("lora", [None, LORA])
def test_half_precision_rounds_the_weights_of_the_models_and_nothing_else(lora, critic, trainer):
    ppo = make(tiny_policy(lora=lora), lr=0.0, critic=critic, minibatch_size=8)  # of the shapes that stage 3 has
    frequencies = ppo.policy.base.model.rotary_emb.inv_freq.clone()
    watch = fit(trainer, ppo, precision="bf16-true", max_epochs=1, data=Prompts(validation=True))
    kinds = {name: parameter.dtype for name, parameter in ppo.named_parameters()}
    full = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert full == {name for name in kinds if "lora_" in name or ".head." in name}
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}
    assert torch.equal(ppo.policy.base.model.rotary_emb.inv_freq, frequencies)
    (row,) = (row for row in watch.rows if row["iteration"] == 1)
    assert row["policy/ratio_max"] == pytest.approx(1, abs=1e-6)
    assert row["objective/kl"] == 0
    assert row["rollout/logprob_gap"] < 0.05


def test_half_precision_and_shards_are_refused_by_name():
    strategy = SimpleNamespace(precision_plugin=HalfPrecision("bf16-true"))
    with pytest.raises(UserError, match=r"trainer\.precision=bf16-true cannot be had with trainer=fsdp2"):
        use_half_weights(strategy, sharded=True)


def test_compiled_layers_change_nothing_but_rounding(trainer):
    compiled = torch._dynamo.utils.counters["stats"]

    def weights(compile):
        policy = Policy(model=tiny_model(), tokenizer=byte_tokenizer(), compile=compile)
        watch = fit(trainer, make(policy, lr=0.05), max_epochs=1)
        assert watch.rows[0]["objective/kl"] == 0.0  # the reference is compiled, too
        return torch.cat([p.flatten() for p in policy.parameters()])

    before = compiled["unique_graphs"]
    plain = weights(False)
    assert compiled["unique_graphs"] == before
    torch.testing.assert_close(weights(True), plain, atol=1e-5, rtol=1e-4)
    assert compiled["unique_graphs"] > before


def test_without_a_compiler_policy_compile_is_refused():
    settings = {"cpp.cxx": ("no-such-compiler",)}
    with torch._inductor.config.patch(settings), pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        Policy(model=tiny_model(), tokenizer=byte_tokenizer(), compile=True)


def test_every_logged_name_is_in_the_metrics_table(trainer):
    ppo = make(gold=letters, kl=AdaptiveKL(init_coef=0.1, target=1.0, horizon=100))
    watch = fit(trainer, ppo, data=Prompts(validation=True))
    for row in watch.rows:
        for name, value in row.items():
            lookup(name)
            assert isinstance(value, (int, float))


@pytest.mark.parametrize(("micro_batches", "expected"), [(1, {False}), (2, {False, True})])
def test_gradients_of_a_step_are_gone_before_the_next_forward_pass(trainer, micro_batches, expected):
    ppo, seen = make(), set()
    ppo.policy.register_forward_pre_hook(
        lambda *_: seen.add(any(p.grad is not None for p in ppo.parameters())) if torch.is_grad_enabled() else None
    )
    fit(trainer, ppo, max_epochs=2, accumulate_grad_batches=micro_batches)
    assert seen == expected


def test_gradients_within_the_bound_are_left_as_they_are(trainer):
    weights = []
    for bound in (None, 1e3):
        ppo = make()
        fit(trainer, ppo, max_epochs=1, gradient_clip_val=bound)
        weights.append([p.detach().clone() for p in ppo.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def test_clipping_scaled_gradients_of_a_fused_optimiser_is_refused():
    ppo = make()
    ppo.trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()))  # as of 16-mixed on a GPU
    optimizer = torch.optim.AdamW(ppo.policy.parameters(), fused=True)
    with pytest.raises(UserError, match=r"trainer\.precision=16-mixed needs optimizer\.fused=false"):
        ppo.configure_gradient_clipping(optimizer, 1.0)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_before_a_fused_optimiser_steps_in_mixed_precision(trainer, algorithm):
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self, closure):
            closure()
            seen.extend(p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None)
            return super().step()

    ppo = make(optimizer=lambda parameters: Spy(parameters, lr=1e-3, fused=True))
    fit(trainer, ppo, max_steps=1, precision="bf16-mixed", gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
    found = torch.nn.utils.get_total_norm(seen) if algorithm == "norm" else max(g.abs().max() for g in seen)
    assert float(found) == pytest.approx(1e-3, rel=1e-3)
