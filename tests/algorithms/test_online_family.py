"""Every online algorithm but PPO, which has its own file: hand vectors, groups, what is kept, the trust region."""

import csv
import math

import lightning as L
import pytest
import torch
from command_line import TINY, run_here
from ppo_runs import Watch, sgd
from tiny import LORA, Prompts, letters, tiny_policy

from lit_rlhf import algorithms
from lit_rlhf.algorithms import DAPO, GRPO, RAFT, RLOO, TRPO, ExpertIteration, OnlineDPO, Reinforce
from lit_rlhf.baseline import BatchMeanBaseline, NoBaseline, ValueBaseline
from lit_rlhf.batch import Experience, Rollout
from lit_rlhf.clip import AdaptiveKLPenalty, LinearClip, SymmetricClip
from lit_rlhf.entropy import ConstantEntropy
from lit_rlhf.errors import UserError
from lit_rlhf.functional import full_kl, masked_mean
from lit_rlhf.kl import FixedKL, LinearKL, NoKL
from lit_rlhf.metrics import lookup
from lit_rlhf.models import SeparateCritic
from lit_rlhf.models.policy import PolicyOutput
from lit_rlhf.rollout.sampler import Sampler

NAMES = ["A2C", "Reinforce", "ReinforcePP", "RLOO", "GRPO", "DrGRPO", "DAPO", "GSPO", "RAFT", "ExpertIteration",
         "OnlineDPO", "TRPO"]  # fmt: skip


def make(algorithm, policy=None, *, lr=0.05, **changes):
    settings = {
        "reward": letters, "sampler": Sampler(max_new_tokens=5), "rollout_batch_size": 8, "minibatch_size": 4,
        "group_size": 2, "seed": 3, "optimizer": sgd(lr),
    }  # fmt: skip
    algorithm = getattr(algorithms, algorithm) if isinstance(algorithm, str) else algorithm
    return algorithm(policy=policy or tiny_policy(), **{**settings, **changes})


def fit(trainer, module, *, data=None, **settings):
    watch = Watch()
    trainer(**{"max_epochs": 2, "callbacks": [watch], **settings}).fit(module, datamodule=data or Prompts())
    return watch


def rollout(mask):
    """A rollout of which only the mask is read."""
    mask = torch.tensor(mask, dtype=torch.bool)
    size = len(mask)
    zeros = torch.zeros(mask.shape)
    return Rollout(
        prompt_ids=torch.ones(size, 1).long(), prompt_mask=torch.ones(size, 1).bool(), response_ids=zeros.long(),
        response_mask=mask, logprobs=zeros, finished=torch.ones(size).bool(), episodes=torch.arange(size),
    )  # fmt: skip


# ---- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_learns_and_logs_what_the_table_of_metrics_says(trainer, name):
    policy = tiny_policy()
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    watch = fit(trainer, make(name, policy), max_epochs=1)
    assert any(not torch.equal(before[k], v) for k, v in policy.state_dict().items())
    row = watch.rows[0]
    assert all(lookup(key) and math.isfinite(value) for key, value in row.items())
    assert {"loss/policy", "policy/approxkl", "policy/entropy", "objective/kl"} <= set(row)


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_trains_an_adapter(trainer, name):
    policy = tiny_policy(lora=LORA)
    watch = fit(trainer, make(name, policy, lr=0.5), max_epochs=2)
    assert watch.rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert abs(watch.rows[1]["objective/kl"]) > 1e-5


@pytest.mark.parametrize("name", [n for n in NAMES if n != "TRPO"])
def test_the_gradient_does_not_depend_on_the_micro_batch_split(trainer, name):
    def step(accumulate):
        policy = tiny_policy(spread=0.15)
        module = make(name, policy, lr=0.5, rollout_batch_size=16, minibatch_size=8, kl=KL.get(name, FixedKL()),
                      sampler=Sampler(max_new_tokens=8, stop_tokens=range(2, 60)))  # fmt: skip
        fit(trainer, module, max_epochs=1, accumulate_grad_batches=accumulate)
        return torch.cat([p.flatten() for p in policy.parameters()])

    torch.testing.assert_close(step(4), step(1), atol=2e-5, rtol=1e-4)


KL = {name: FixedKL(estimator="k3", place="loss", coef=0.5) for name in ("RLOO", "GRPO", "DrGRPO", "DAPO", "GSPO")}

YAMLS = ["a2c", "reinforce", "reinforce_pp", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "raft", "expert_iteration",
         "online_dpo", "trpo"]  # fmt: skip


@pytest.mark.parametrize("name", YAMLS)
def test_every_algorithm_runs_and_resumes_from_its_config(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_rlhf.report.build_report", lambda folder: None)  # a second, and shown elsewhere
    settings = [s for s in TINY if not s.startswith("algorithm.")]
    settings += [f"algorithm={name}", "reward=length", "algorithm.rollout_batch_size=8", "algorithm.group_size=2",
                 "algorithm.minibatch_size=2", "paths.output_dir=run",
                 *(["algorithm.kept_batch_size=4"] if name == "dapo" else [])]  # fmt: skip
    assert (result := run_here("train", *settings)).code == 0, result.err
    result = run_here("train", *settings, "trainer.max_epochs=2", "ckpt_path=auto")
    assert result.code == 0, result.err
    with open("run/metrics.csv", newline="") as file:
        assert [row["iteration"] for row in csv.DictReader(file)][-2:] == ["1", "2"]


@pytest.mark.parametrize("name", ["RLOO", "GRPO", "DrGRPO", "DAPO", "GSPO", "RAFT", "OnlineDPO"])
def test_groups_of_one_are_refused_by_name(name):
    with pytest.raises(UserError, match=r"algorithm\.group_size must be a whole number of at least 2, got 1"):
        make(name, group_size=1)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("GRPO", {"group_size": 3}, r"algorithm.rollout_batch_size=8 is not divisible by algorithm.group_size=3"),
        ("GRPO", {"epochs": 0}, r"algorithm.epochs must be a whole number of at least 1, got 0"),
        ("RAFT", {"minibatch_size": 3}, r"rollout_batch_size / algorithm.group_size=4 is not divisible by .*=3"),
        ("DAPO", {"kept_batch_size": 3}, r"algorithm.kept_batch_size=3 is not divisible by algorithm.minibatch_size=4"),
        ("DAPO", {"kept_batch_size": 12}, r"kept_batch_size=12 is more than algorithm.rollout_batch_size=8"),
        ("DAPO", {"kept_batch_size": 0}, r"algorithm.kept_batch_size must be a whole number of at least 1, got 0"),
        ("OnlineDPO", {"group_size": 4, "minibatch_size": 1}, r"algorithm.minibatch_size=1 is not divisible by"),
        ("OnlineDPO", {"kl": NoKL()}, r"beta from kl.coef, so it must be above 0"),
        ("OnlineDPO", {"kl": FixedKL(estimator="k3", place="loss")}, r"kl.place=loss"),
        ("OnlineDPO", {"rollout_batch_size": 9, "group_size": 3, "minibatch_size": 9}, r"algorithm.group_size=3"),
        ("TRPO", {"max_kl": 0.0}, r"algorithm.max_kl must be .* above 0, got 0"),
        ("TRPO", {"kl": FixedKL(estimator="k3", place="loss")}, r"kl.place=loss: TRPO"),
        ("Reinforce", {"gamma": 1.5}, r"algorithm.gamma must be .* at most 1, got 1.5"),
        ("A2C", {"value_coef": -1.0}, r"algorithm.value_coef must be .* at least 0"),
        ("ExpertIteration", {"threshold": math.nan}, r"algorithm.threshold must be a finite number"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(name, changes, message):
    with pytest.raises(UserError, match=message):
        make(name, **changes)


def test_a_bound_that_an_algorithm_does_not_have_is_refused():
    with pytest.raises(TypeError, match="clip"):
        make("A2C", clip=LinearClip())


# ---- groups --------------------------------------------------------------------------------------------------------


def test_the_completions_of_a_prompt_stand_together_and_differ(trainer):
    samples = fit(trainer, make(GRPO, group_size=4), max_epochs=1).samples
    prompts = [s["prompt"] for s in samples]
    assert len(samples) == 8
    assert len(set(prompts[:4])) == len(set(prompts[4:])) == 1
    assert prompts[0] != prompts[4]
    assert len({s["completion"] for s in samples[:4]}) > 1


def test_constant_groups_are_measured_and_teach_nothing(trainer):
    def reward(prompts, completions, **_):
        return [1.0 if prompt == prompts[0] else float(i) for i, prompt in enumerate(prompts)]

    policy = tiny_policy()
    module = make(GRPO, policy, kl=NoKL())
    watch = fit(trainer, module, max_epochs=1)
    assert watch.rows[0]["rollout/constant_groups"] < 1
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    module = make(GRPO, policy, kl=NoKL(), reward=lambda completions, **_: [1.0] * len(completions))
    watch = fit(trainer, module, max_epochs=1)
    assert watch.rows[0]["rollout/constant_groups"] == 1.0
    assert all(torch.equal(before[k], v) for k, v in policy.state_dict().items())


def test_rloo_advantages_by_hand():
    module = make(RLOO, rollout_batch_size=4, group_size=4)
    rewards = torch.tensor([[0.5, 0.5], [0.0, 0.0], [-3.0, 0.0], [2.0, 3.0]])  # sums 1, 0, -3, 5
    advantages, _ = module.advantages(rewards, rollout([[1, 1], [1, 0], [1, 0], [1, 1]]), None)
    expected = [[1 / 3, 1 / 3], [-1.0, 0.0], [-5.0, 0.0], [17 / 3, 17 / 3]]
    torch.testing.assert_close(advantages, torch.tensor(expected))


def test_dapo_learns_from_groups_that_differ_first(trainer):
    """Of four groups the second and fourth differ; two groups are kept."""
    calls = []

    def reward(prompts, completions, **_):
        calls.append(list(zip(prompts, completions, strict=True)))
        return [float(i % 2) if i // 2 in (1, 3) else 1.0 for i in range(len(prompts))]

    module = make(DAPO, reward=reward, kl=NoKL(), kept_batch_size=4)
    seen = []

    class Take(L.Callback):
        def on_train_batch_start(self, _trainer, module, _batch, _index):
            seen.append(module.loader.experience)

    fit(trainer, module, max_epochs=1, callbacks=[Take()])
    assert len(seen) == 1  # one optimiser step on the four that are kept
    (kept,) = seen
    tokenizer = module.policy.tokenizer
    prompts = [tokenizer.decode(ids[mask]) for ids, mask in zip(kept.prompt_ids, kept.prompt_mask, strict=True)]
    assert prompts == [calls[0][i][0] for i in (2, 3, 6, 7)]
    std = 0.5**0.5 + 1e-4
    torch.testing.assert_close(kept.advantages[:, 0], torch.tensor([-0.5, 0.5, -0.5, 0.5]) / std)


def test_dapo_fills_up_with_groups_of_equal_scores(trainer):
    module = make(DAPO, reward=lambda completions, **_: [float(i == 7) for i in range(8)], kl=NoKL(), kept_batch_size=4)
    assert fit(trainer, module, max_epochs=1).rows[0]["policy/updates"] == 1


# ---- imitation -----------------------------------------------------------------------------------------------------


def test_raft_keeps_the_best_of_each_prompt_and_the_first_of_several(trainer):
    scores = [1.0, 3.0, 2.0, 2.0, 5.0, 4.0, 0.0, 7.0]
    module = make(RAFT, reward=lambda completions, **_: scores, kl=NoKL(), minibatch_size=4)
    taken = []

    class Take(L.Callback):
        def on_train_batch_start(self, _trainer, module, _batch, _index):
            taken.append(module.loader.experience)

    watch = Watch()
    fit(trainer, module, max_epochs=1, callbacks=[Take(), watch])
    assert [float(a) for a in taken[0].advantages[:, 0]] == [3.0, 2.0, 5.0, 7.0]
    tokenizer = module.policy.tokenizer
    texts = [tokenizer.decode(ids[mask], skip_special_tokens=True)
             for ids, mask in zip(taken[0].response_ids, taken[0].response_mask, strict=True)]  # fmt: skip
    assert texts == [watch.samples[i]["completion"] for i in (1, 2, 4, 7)]
    assert watch.rows[0]["rollout/kept_reward"] == pytest.approx(17 / 4)
    expected = -masked_mean(taken[0].logprobs, taken[0].response_mask)
    assert watch.rows[0]["loss/policy"] == pytest.approx(float(expected), rel=1e-5)


def test_expert_iteration_is_the_mean_over_the_tokens_of_what_is_right():
    module = make(ExpertIteration, threshold=1.0, rollout_batch_size=4)
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.9], [0.0, 0.0]])
    advantages, _ = module.advantages(rewards, rollout([[1, 1], [1, 0], [1, 1], [1, 1]]), None)
    # 7 tokens, 3 of them in right completions
    torch.testing.assert_close(advantages, torch.tensor([[7 / 3, 7 / 3], [7 / 3, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    nothing, _ = module.advantages(torch.zeros(4, 2), rollout([[1, 1]] * 4), None)
    assert (nothing == 0).all()


def test_expert_iteration_learns_to_add(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_rlhf.report.build_report", lambda folder: None)
    result = run_here("train", "experiment=expert_iteration", "logger=csv", "paths.output_dir=run")
    assert result.code == 0, result.err
    with open("run/metrics.csv", newline="") as file:
        rates = [float(row["rollout/kept_rate"]) for row in csv.DictReader(file)]
    assert rates[0] < 0.1
    assert rates[-1] >= 0.5


# ---- baselines, online DPO -----------------------------------------------------------------------------------------


def test_baselines_by_hand():
    returns, mask = torch.tensor([[4.0, 2.0], [0.0, 99.0]]), torch.tensor([[True, True], [True, False]])
    values = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0]])
    assert NoBaseline()(returns, mask, None).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert BatchMeanBaseline()(returns, mask, None).tolist() == [[2.0, 2.0], [2.0, 2.0]]  # (4 + 2 + 0) / 3
    assert ValueBaseline()(returns, mask, values).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    # squared errors 9, 0 and 9, halved, over three tokens, times 0.5
    assert float(ValueBaseline(coef=0.5).loss(values[:, :-1], returns, mask)) == pytest.approx(1.5)


def test_reinforce_takes_the_discounted_reward_to_go():
    module = make(Reinforce, gamma=0.5, baseline=NoBaseline())
    advantages, returns = module.advantages(torch.tensor([[1.0, 0.0, 4.0]]), rollout([[1, 1, 1]]), None)
    assert advantages.tolist() == returns.tolist() == [[2.0, 2.0, 4.0]]


def test_a_learned_baseline_may_have_a_model_of_its_own(trainer):
    module = make(Reinforce, baseline=ValueBaseline(critic=SeparateCritic, coef=1.0))
    watch = fit(trainer, module, max_epochs=1)
    assert isinstance(module.critic, SeparateCritic)
    assert watch.rows[0]["loss/value"] > 0


def test_online_dpo_keeps_pairs_together_and_takes_beta_from_the_kl(trainer):
    module = make(OnlineDPO, rollout_batch_size=16, minibatch_size=8, kl=LinearKL(start=0.2, end=0.4), lr=0.5)
    watch = fit(trainer, module, accumulate_grad_batches=2)
    for batch in watch.batches:
        assert torch.equal(batch.prompt_ids[0::2], batch.prompt_ids[1::2])
        torch.testing.assert_close(batch.advantages[0::2, 0] + batch.advantages[1::2, 0], torch.ones(2))
    assert [row["objective/kl_coef"] for row in watch.rows] == pytest.approx([0.2, 0.3])
    assert all(row["objective/non_score_reward"] == 0 for row in watch.rows)  # beta is charged in the loss


def test_online_dpo_loss_by_hand():
    module = make(OnlineDPO, kl=FixedKL(coef=0.5))
    module.pending["objective/kl_coef"] = 0.5
    # rewards 1 and 0: q = sigmoid(1) = .731059
    advantages, _ = module.advantages(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), rollout([[1, 1], [1, 0]]), None)
    torch.testing.assert_close(advantages, torch.tensor([[0.731059, 0.731059], [0.268941, 0.0]]))
    mask = torch.tensor([[True, True], [True, False]])
    ids = torch.ones(2, 2).long()
    batch = Experience(
        prompt_ids=ids[:, :1], prompt_mask=mask[:, :1], response_ids=ids, response_mask=mask,
        logprobs=torch.zeros(2, 2), ref_logprobs=torch.tensor([[-1.0, -2.0], [-1.0, 77.0]]), advantages=advantages,
    )  # fmt: skip
    output = PolicyOutput(torch.tensor([[-0.5, -1.5], [-2.0, -50.0]]), None, None, None)
    # log-ratios 1 and -1, h = .5 * 2 = 1: -.731059 log sigmoid(1) - .268941 log sigmoid(-1)
    loss, metrics = module.loss(batch, output)
    assert float(loss) == pytest.approx(0.731059 * 0.313262 + 0.268941 * 1.313262, abs=1e-5)
    assert float(metrics["online_dpo/accuracy"]) == 1.0


# ---- clipping, early stopping --------------------------------------------------------------------------------------


def test_the_kl_penalty_and_schedules_of_the_clip_work_without_a_critic(trainer):
    penalty = AdaptiveKLPenalty(target=1e-6)
    watch = fit(trainer, make(GRPO, clip=penalty, epochs=2, lr=0.5), max_epochs=3)
    assert [row["clip/penalty"] for row in watch.rows] == [1.0, 2.0, 4.0]
    assert all(row["policy/update_kl"] > 1e-6 for row in watch.rows)
    watch = fit(trainer, make(RLOO, clip=LinearClip(start=0.4, end=0.0)), max_epochs=2)
    assert [round(row["clip/high"], 6) for row in watch.rows] == [0.2, 0.0]


@pytest.mark.parametrize("name", ["Reinforce", "RAFT", "OnlineDPO", "GSPO"])
def test_the_target_kl_ends_the_updates_of_algorithms_without_a_ratio_too(trainer, name):
    module = make(name, target_kl=1e-12, lr=0.5, minibatch_size=2, rollout_batch_size=16)
    row = fit(trainer, module, max_epochs=1).rows[0]
    assert row["policy/early_stopped"] == 1.0
    assert row["policy/updates"] < 8


# ---- TRPO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_kl_of_every_step_of_trpo_stays_under_its_limit(trainer, lora):
    """Recomputed here over the whole vocabulary, with the policy before and after each step."""
    steps = []

    class Measured(TRPO):
        def update_policy(self, experience):
            tokens = (experience.prompt_ids, experience.prompt_mask, experience.response_ids, experience.response_mask)
            with torch.no_grad():
                before = self.policy(*tokens, keep_logits=True).logits
                super().update_policy(experience)
                after = self.policy(*tokens, keep_logits=True).logits
            steps.append(float(masked_mean(full_kl(before, after), experience.response_mask)))

    module = make(Measured, tiny_policy(lora=lora), max_kl=0.02, rollout_batch_size=16)
    watch = fit(trainer, module, max_epochs=6)
    assert len(steps) == 6
    assert max(steps) <= 0.02
    assert max(steps) > 0.005  # the limit is what stops the step
    assert [row["policy/update_kl"] for row in watch.rows] == pytest.approx(steps, rel=1e-3, abs=1e-6)
    assert all(row["loss/policy"] <= 0 for row in watch.rows)


def test_a_step_that_cannot_keep_the_limit_is_not_taken(trainer):
    policy = tiny_policy()
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    module = make(TRPO, policy, line_search_steps=3)
    module._kl = lambda part: torch.tensor(0.011)  # whatever the step, just over the limit of 0.01
    module._fisher = lambda parts, parameters, vector: vector
    row = fit(trainer, module, max_epochs=1).rows[0]
    assert row["policy/update_kl"] == 0.0
    assert all(torch.equal(before[k], v) for k, v in policy.state_dict().items())


@pytest.mark.parametrize("critic", [SeparateCritic, None])
def test_trpos_optimiser_moves_the_critic_alone(trainer, critic):
    policy = tiny_policy()
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    module = make(TRPO, policy, lr=0.5, **({"critic": critic} if critic else {}))
    module.update_policy = lambda experience: None
    fit(trainer, module, max_epochs=2, gradient_clip_val=1.0)
    assert all(torch.equal(before[k], v) for k, v in policy.state_dict().items())
    assert module.critic.head.weight.abs().max() > 0


def test_trpos_step_does_not_depend_on_the_rows_of_a_forward_pass(trainer):
    def step(size):
        policy = tiny_policy(spread=0.15)
        module = make(TRPO, policy, minibatch_size=size, epochs=1, max_kl=1e-3,
                      sampler=Sampler(max_new_tokens=8, stop_tokens=range(2, 60)))  # fmt: skip
        fit(trainer, module, max_epochs=1)
        return torch.cat([p.flatten() for p in policy.parameters()])

    torch.testing.assert_close(step(8), step(2), atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize(
    ("choices", "column"),
    [
        (["experiment=ppo2"], "value/clipfrac"),
        (["experiment=ppo_kl_penalty"], "policy/update_kl"),
        (["algorithm=reinforce", "baseline=value", "baseline.critic.gain=1.0", "baseline.coef=0.5"], "loss/value"),
    ],
)
def test_named_variants_run_from_their_configs(choices, column, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_rlhf.report.build_report", lambda folder: None)
    settings = [s for s in TINY if "ppo_epochs" not in s]
    result = run_here("train", *choices, *settings, "reward=length", "paths.output_dir=run")
    assert result.code == 0, result.err
    with open("run/metrics.csv", newline="") as file:
        assert list(csv.DictReader(file))[-1][column] != ""


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("A2C", {"gamma": 0.5, "lam": 0.5, "value_coef": 0.0, "whiten_advantages": True,
                 "entropy": ConstantEntropy(coef=0.5)}),
        ("Reinforce", {"gamma": 0.5, "baseline": NoBaseline()}),
        ("ReinforcePP", {"gamma": 0.5, "epochs": 3, "clip": SymmetricClip(range=1e-4)}),
        ("RLOO", {"group_size": 4, "epochs": 3, "clip": SymmetricClip(range=1e-4)}),
        ("GRPO", {"group_size": 4, "epochs": 3, "clip": SymmetricClip(range=1e-4)}),
        ("DrGRPO", {"group_size": 4, "epochs": 3, "clip": SymmetricClip(range=1e-4)}),
        ("DAPO", {"group_size": 4, "kept_batch_size": 4, "epochs": 3, "clip": SymmetricClip(range=1e-4)}),
        ("GSPO", {"group_size": 4, "epochs": 3, "clip": SymmetricClip(range=0.5)}),
        ("RAFT", {"group_size": 4, "epochs": 3}),
        ("ExpertIteration", {"threshold": 1.0, "epochs": 3, "group_size": 4}),
        ("OnlineDPO", {"epochs": 3, "group_size": 4, "kl": FixedKL(coef=0.5)}),
        ("TRPO", {"max_kl": 1e-4, "damping": 10.0, "cg_steps": 1, "epochs": 5, "gamma": 0.5, "lam": 0.1,
                  "whiten_advantages": False}),
    ],
)  # fmt: skip
def test_every_setting_changes_what_is_learned(trainer, name, settings):
    minibatch = {"minibatch_size": 2} if name == "RAFT" else {}

    def weights(**changes):
        module = make(name, **{"lr": 0.5, **KEPT.get(name, {}), **minibatch, **changes})
        fit(trainer, module)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    plain = weights()
    for setting, value in settings.items():
        assert not torch.equal(plain, weights(**{setting: value})), setting


#: Where a setting shows: a bound on the ratio in a second pass, a threshold where something is over it.
KEPT = {"RLOO": {"epochs": 2, "lr": 1e-5}, "ExpertIteration": {"threshold": 0.0}}
