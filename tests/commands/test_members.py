"""Members of the groups, as conf/ has them: each changes a run as its name says.

What the classes behind them do is tested where the classes are; loggers in test_tracking.py, formats of data in
data/test_dataset.py, stages and their experiments in test_cli.py and test_pipeline.py.
"""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from classifiers import save_classifier
from command_line import TINY, run_here, write_ratings
from hydra import compose, initialize_config_dir
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from local_server import Server
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification

from lit_rlhf.config import CONFIG_DIR, instantiate
from lit_rlhf.models.policy import byte_tokenizer
from lit_rlhf.rewards.scoring import score
from lit_rlhf.run_folder import read_metrics
from lit_rlhf.train import build

STEPS = ["trainer.max_epochs=4", "paths.output_dir=run"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights(optimizer):
    settings = [f"optimizer={optimizer}", "optimizer.lr=0.01", "kl.coef=1", "reward=function",
                "reward.function=tiny.letters", f"paths.output_dir={optimizer}"]  # fmt: skip
    assert run_here("train", *TINY, *settings).code == 0
    return torch.cat([x.flatten() for x in load_file(f"{optimizer}/model/model.safetensors").values()])


BITSANDBYTES = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")


def test_every_optimizer_takes_another_way():
    after = [weights(kind) for kind in sorted(members("optimizer").difference(BITSANDBYTES))]
    for i, one in enumerate(after):
        for other in after[i + 1 :]:
            assert not torch.equal(one, other)


@pytest.mark.parametrize("optimizer", BITSANDBYTES)
def test_an_optimizer_that_is_not_installed_is_named_with_its_extra(optimizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if
    result = run_here("train", *TINY, f"optimizer={optimizer}", "paths.output_dir=run")
    assert result.code == 1
    assert "optimizer._target_=bitsandbytes.optim." in result.err
    assert "bitsandbytes is not installed: pip install 'lit-rlhf[bnb]'" in result.err
    assert "Traceback" not in result.err


@pytest.mark.real
@pytest.mark.parametrize("optimizer", BITSANDBYTES)
def test_an_optimizer_of_bitsandbytes_trains_and_resumes_to_the_bit(optimizer):
    pytest.importorskip("bitsandbytes")
    chosen = [*TINY, f"optimizer={optimizer}", "reward=length", "trainer.max_epochs=3"]
    keep = ("+callbacks.all={_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: all, filename: '{step}', "
            "auto_insert_metric_name: false, save_top_k: -1, every_n_train_steps: 1}")  # fmt: skip
    assert run_here("train", *chosen, keep, "paths.output_dir=whole").code == 0
    result = run_here("train", *chosen, "ckpt_path=all/3.ckpt", "paths.output_dir=rest")  # within an iteration
    assert result.code == 0, result.err
    one, other = (load_file(f"{run}/model/model.safetensors") for run in ("whole", "rest"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    state = tree_leaves(torch.load("all/3.ckpt", weights_only=True)["optimizer_states"])
    dtypes = {x.dtype for x in state if isinstance(x, torch.Tensor)}
    assert (torch.uint8 in dtypes) is optimizer.endswith("8bit")


@pytest.mark.real
def test_an_estimate_counts_moments_of_eight_bits():
    pytest.importorskip("bitsandbytes")
    sizes = []
    for optimizer in ("adamw", "adamw_8bit"):
        result = run_here("estimate", *TINY, "policy.hidden_size=64", f"optimizer={optimizer}", "format=json")
        assert result.code == 0, result.err
        sizes.append(json.loads(result.out)["held"]["optimiser"])
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [  # of 8 steps, after every second: the rate of the step that comes next
        (["scheduler=constant"], [1, 1, 1, 1]),
        (["scheduler=linear"], [0.75, 0.5, 0.25, 0]),
        (["scheduler=linear", "scheduler.num_warmup_steps=4"], [0.5, 1, 0.5, 0]),
        (["scheduler=cosine"], [0.5 + 0.5 * 0.5**0.5, 0.5, 0.5 - 0.5 * 0.5**0.5, 0]),  # (1 + cos(pi t)) / 2
    ],
)
def test_the_learning_rate_follows_the_scheduler(scheduler, rates):
    assert run_here("train", *TINY, *scheduler, "optimizer.lr=0.001", *STEPS).code == 0
    with open("run/metrics.csv", newline="") as file:
        found = [float(row["optim/lr"]) for row in csv.DictReader(file) if row["optim/lr"]]
    assert found == pytest.approx([0.001 * rate for rate in rates], abs=1e-12)


@pytest.mark.parametrize("member", ["greedy", "nucleus"])
def test_a_sampler_for_evaluation_is_refused_in_training(member):
    result = run_here("train", *TINY, f"sampler={member}")
    assert result.code == 1
    assert {"greedy": "temperature", "nucleus": "top_p"}[member] in result.err
    assert "Traceback" not in result.err


def test_greedy_samples_are_the_same_for_every_seed_and_others_are_not():
    assert run_here("train", *TINY, *STEPS).code == 0
    command = ["sample", "policies=[run/model]", "prompts=[A film]", "sampler.max_new_tokens=8"]
    for member in ("greedy", "default", "nucleus"):
        one, other = (run_here(*command, f"sampler={member}", f"seed={seed}") for seed in (0, 1))
        assert one.code == other.code == 0
        assert (one.out == other.out) is (member == "greedy")


def test_a_fast_dev_run_takes_one_step_and_leaves_no_checkpoint():
    assert run_here("train", *TINY, "trainer=fast_dev_run", "trainer.accelerator=cpu", *STEPS).code == 0
    assert not Path("run/checkpoints").exists()
    assert json.loads(Path("run/summary.json").read_text())["status"] == "completed"


# ---- what a run's controllers and callbacks do ----------------------------------------------------------------------

# Three iterations of four steps; each run takes another member of every group. What is expected of one that follows a
# measurement is worked out from the row where that stands.
KL = {
    "fixed": (["kl.coef=0.3"], lambda rows: [0.3, 0.3, 0.3]),
    "linear": (["kl.start=0.3", "kl.end=0"], lambda rows: [0.3, 0.2, 0.1]),  # at the start of an iteration
    # Always far below the target: less by 0.2 of 4 episodes in 40, each time.
    "adaptive": (["kl.init_coef=1", "kl.target=1000", "kl.horizon=40"], lambda rows: [1, 0.98, 0.98**2]),
    "loss_k3": ([], lambda rows: [0.04] * 3),
    "none": ([], lambda rows: [0, 0, 0]),
}
CLIP = {
    "symmetric": (["clip.range=0.3"], {"low": [0.3] * 3, "high": [0.3] * 3}),
    "asymmetric": ([], {"low": [0.2] * 3, "high": [0.28] * 3}),
    "sequence": ([], {"low": [3e-4] * 3, "high": [4e-4] * 3}),
    "linear": (["clip.start=0.3", "clip.end=0"], {"low": [0.2, 0.1, 0], "high": [0.2, 0.1, 0]}),  # at its end
    "dual": (["clip.range=0.1"], {"low": [0.1] * 3, "high": [0.1] * 3}),
    "kl_penalty": (["clip.target=1000"], {"penalty": [1, 0.5, 0.25]}),  # always far below the target
    "none": ([], {}),
}
ENTROPY = {
    "none": ([], lambda rows: [0, 0, 0]),
    "constant": (["entropy.coef=0.02"], lambda rows: [0.02] * 3),
    "linear": (["entropy.start=0.03", "entropy.end=0"], lambda rows: [0.02, 0.01, 0]),
    "target": ([], lambda rows: [0.001 * math.exp(0.1 * sum(3 - row["policy/entropy"] for row in rows[:i]))
                                 for i in range(3)]),
}  # fmt: skip
CALLBACKS = {  # what each leaves: checkpoints, samples, lines of progress
    "default": (True, True, True), "checkpoint": (True, False, False), "samples": (False, True, False),
    "distributions": (False, False, False), "progress": (False, False, True), "offline": (True, False, True),
    "kl_guard": (True, True, True), "evaluation": (True, True, True), "hacking": (True, True, True),
}  # fmt: skip
RUNS = [
    ("fixed", "symmetric", "none", "default"), ("linear", "linear", "linear", "checkpoint"),
    ("adaptive", "kl_penalty", "target", "samples"), ("none", "none", "constant", "progress"),
    ("fixed", "asymmetric", "none", "distributions"), ("fixed", "dual", "none", "offline"),
    ("loss_k3", "sequence", "none", "kl_guard"), ("fixed", "symmetric", "none", "evaluation"),
    ("fixed", "symmetric", "none", "hacking"),
]  # fmt: skip


def members(group: str) -> set[str]:
    return {path.stem for path in (CONFIG_DIR / group).glob("*.yaml")}


def test_no_member_of_these_groups_is_left_out():
    groups = {"kl": KL, "clip": CLIP, "entropy": ENTROPY, "callbacks": CALLBACKS}
    for (group, tested), chosen in zip(groups.items(), zip(*RUNS, strict=True), strict=True):
        assert set(tested) == members(group) == set(chosen)


@pytest.mark.parametrize(("kl", "clip", "entropy", "callbacks"), RUNS, ids=["-".join(run) for run in RUNS])
def test_controllers_and_callbacks_do_as_their_names_say(kl, clip, entropy, callbacks):
    chosen = [f"kl={kl}", *KL[kl][0], f"clip={clip}", *CLIP[clip][0], f"entropy={entropy}", *ENTROPY[entropy][0]]
    result = run_here(
        "train", *TINY, *chosen, f"callbacks={callbacks}", "algorithm.ppo_epochs=2", "optimizer.lr=0.05",
        "trainer.max_epochs=3", "trainer.limit_val_batches=0", "reward=function", "reward.function=tiny.letters",
        "paths.output_dir=run",
    )  # fmt: skip
    assert result.code == 0, result.err
    rows = read_metrics(Path("run"))
    assert [row["objective/kl_coef"] for row in rows] == pytest.approx(KL[kl][1](rows))
    for row in rows:  # what is logged is charged, by the rewards or in the loss
        in_loss = kl == "loss_k3"
        assert ("loss/kl" in row) is in_loss
        charged = 0 if in_loss else row["objective/kl_coef"] * row["objective/kl"]
        assert row["objective/non_score_reward"] == pytest.approx(-charged, abs=1e-6)
        assert not any(name.startswith("gold/") for name in row)
    bounds = {name: [row[f"clip/{name}"] for row in rows if f"clip/{name}" in row] for name in ("low", "high")}
    assert bounds == {name: pytest.approx(CLIP[clip][1].get(name, [])) for name in bounds}
    assert [row["clip/penalty"] for row in rows] == CLIP[clip][1].get("penalty", [0, 0, 0])
    assert any(row["policy/clipfrac"] > 0 for row in rows) is (clip not in ("none", "kl_penalty"))
    assert [row["entropy/coef"] for row in rows] == pytest.approx(ENTROPY[entropy][1](rows), abs=1e-9)
    left = [Path("run", name).exists() for name in ("checkpoints/last.ckpt", "samples.jsonl")]
    assert (*left, "iteration 3/3" in result.out) == CALLBACKS[callbacks]


# ---- parts made from their configs ----------------------------------------------------------------------------------


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return compose("train", overrides=["paths.output_dir=run", *overrides])


def tiny_but(*groups: str) -> list[str]:
    """TINY's overrides without those of these groups."""
    return [override for override in TINY if not override.startswith(groups)]


VADER = {"good": 0.4404, "bad": -0.5423}  # v / sqrt(v**2 + 15), with the lexicon's 1.9 and -2.5
REWARDS = {  # overrides, columns, completions, their scores by hand
    "function": (["reward.function=tiny.letters"], {}, ["a", "bb"], [0.6 - 0.1, 0 - 0.2]),  # a is 97 = 6 mod 7, b is 0
    "vader": ([], {}, ["good", "bad"], [*VADER.values()]),
    "keyword": (["reward.keywords=[good]", "reward.forbidden=[bad]"], {}, ["good", "good, bad"], [1, 0]),
    "regex": (["reward.pattern='[0-9]'"], {}, ["nine", "9"], [0, 1]),
    "json": (["reward.required_keys=[a]"], {}, ['{"a": 1}', "{}"], [1, 0]),
    "verifier": ([], {"answer": [5, 5]}, ["It is 5.", "55"], [1, 0]),
    "length": (["reward.target=2"], {}, ["one two", "one two three four"], [0, -2 * 0.1]),
    "distinct": ([], {}, ["a b a b", "a b c"], [2 / 3, 1]),  # pairs of words
    "repetition": ([], {}, ["a a a a", "a b c d"], [-0.1, 0]),  # one triple of words that stood there before
    "prefix": ([], {}, ["good", "bad"], [*VADER.values()]),  # what its tokens add up to
    "composite": ([], {}, ["good", "bad"], [v - 0.1 * 19 * 0.1 for v in VADER.values()]),  # 19 words short of 20
    "constrained": (["reward.init_multiplier=1"], {}, ["good", "bad"], [(v + 1) / 2 for v in VADER.values()]),
}
ASKED = {  # overrides with the server's address, its answer to a question, the completions' scores
    "remote": (["reward.url={}"], lambda body: {"scores": [len(text) for text in body["completions"]]}, [4, 3]),
    "judge": (["reward.base_url={}", "reward.model=m"], lambda body: says("Score: 10" if asks(body, "good") else "1"),
              [1, 0]),
    "judge_comparison": (["reward.base_url={}", "reward.model=m"], lambda body: says("Verdict: A"), [0.5, 0.5]),
}  # fmt: skip
LOADED = {"model": "reward.path={0}", "ensemble": "reward.paths=[{0},{1}]"}


def says(text: str) -> dict:
    return {"choices": [{"message": {"content": text}}]}


def asks(body: dict, word: str) -> bool:
    return word in body["messages"][0]["content"].partition("<completion")[2]


def scored(member: str, overrides: list[str], completions: list[str], columns: dict[str, list]) -> list[float]:
    """The totals, through the function that a run calls."""
    tokenizer = byte_tokenizer()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in completions]
    reward = instantiate(composed(*TINY, f"reward={member}", *overrides).reward, "reward")
    return score(reward, [""] * len(completions), completions, columns, ids, tokenizer).total.tolist()


def test_every_reward_is_tried():
    assert {*REWARDS, *ASKED, *LOADED, "none"} == members("reward")


@pytest.mark.parametrize("member", REWARDS)
def test_a_reward_scores_as_its_name_says(member):
    overrides, columns, completions, expected = REWARDS[member]
    assert scored(member, overrides, completions, columns) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("member", ASKED)
def test_a_reward_asks_the_server_that_it_is_given(member):
    overrides, answer, expected = ASKED[member]
    with Server(answer) as server:
        own = [override.format(server.url) for override in overrides]
        assert scored(member, own, ["good", "bad"], {"reference": ["fair", "fair"]}) == pytest.approx(expected)
        assert server.requests


@pytest.mark.parametrize("member", LOADED)
def test_a_reward_loads_the_models_that_it_is_given(member, tmp_path):
    paths = [save_classifier(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    tokenizer, used = byte_tokenizer(), paths if member == "ensemble" else paths[:1]
    models = [AutoModelForSequenceClassification.from_pretrained(path).eval() for path in used]
    with torch.no_grad():
        logits = [[float(m(**tokenizer(text, return_tensors="pt")).logits) for text in ("good", "bad")] for m in models]
    expected = [sum(values) / len(values) for values in zip(*logits, strict=True)]  # the ensemble's default is the mean
    found = scored(member, [LOADED[member].format(*paths)], ["good", "bad"], {})
    assert found == pytest.approx(expected, abs=1e-4)
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)


def test_the_gold_judge_is_measured_beside_the_reward():
    settings = ["reward@gold=keyword", "gold.keywords=[film]", "trainer.limit_val_batches=0", "paths.output_dir=run"]
    assert run_here("train", *TINY, *settings).code == 0
    (row,) = read_metrics(Path("run"))
    assert "gold/keyword" in row
    assert "reward/keyword" not in row


@pytest.mark.parametrize(
    ("member", "keys"),
    [
        ("human_ratings_prompts", {"prompt"}), ("human_ratings_text", {"text", "mean"}),
        ("human_ratings_pairs", {"chosen", "rejected", "margin"}), ("human_ratings_scores", {"text", "score"}),
    ],
)  # fmt: skip
def test_human_ratings_are_served_as_their_names_say(member, keys, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_RLHF_CACHE", str(tmp_path))
    write_ratings(tmp_path, 300)
    data = instantiate(composed(*tiny_but("data"), f"data={member}", "data.domain=tweets").data, "data")
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert keys <= set(batch)
    texts = batch[min(keys & {"prompt", "text", "chosen"})]
    assert texts
    assert all(text.startswith("tweets snippet number") for text in texts)


@pytest.mark.parametrize("critic", ["value_head", "separate"])
@pytest.mark.parametrize("policy", ["tiny", "smollm2", "smollm2_lora", "pretrained"])
def test_a_policy_and_its_critic_train_what_their_names_say(policy, critic, tiny_models):
    given = [] if policy == "tiny" else [f"policy.path={tiny_models['policy']}"]
    algorithm = build(composed(*tiny_but("policy"), f"policy={policy}", *given, f"critic={critic}")).algorithm
    trained = {name for name, parameter in algorithm.named_parameters() if parameter.requires_grad}
    of_policy = {name for name in trained if "critic" not in name}
    assert of_policy
    assert all("lora_" in name for name in of_policy) is (policy == "smollm2_lora")
    backbone = {name for name in trained if "critic" in name and "layers" in name}
    assert bool(backbone) is (critic == "separate")


def test_a_trainer_runs_where_and_as_long_as_its_name_says():
    for member in ("default", "cpu", "offline"):
        trainer = build(composed(*tiny_but("trainer"), f"trainer={member}")).trainer
        gpu = torch.cuda.is_available() and member != "cpu"
        assert isinstance(trainer.accelerator, CUDAAccelerator if gpu else CPUAccelerator)
        assert (trainer.max_epochs, trainer.check_val_every_n_epoch) == ((1, 1) if member == "offline" else (10, 5))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there_is_named():
    result = run_here("train", *tiny_but("trainer"), "trainer=gpu", "paths.output_dir=run")
    assert result.code == 1
    assert "trainer" in result.err
    assert "gpu" in result.err
    assert "Traceback" not in result.err


def test_the_tiny_experiment_writes_vowels():
    """Its command, as long as it takes to see that it learns."""
    settings = ["logger=csv", "callbacks=samples", "trainer.max_epochs=8", "paths.output_dir=run"]
    assert run_here("train", "experiment=tiny", *settings).code == 0
    scores = [row["reward/regex"] for row in read_metrics(Path("run")) if "reward/regex" in row]
    assert scores[-1] > scores[0] + 0.3
