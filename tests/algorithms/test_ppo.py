"""PPO through a real Trainer on tiny models: a test for every known way of getting it wrong."""

import copy
import functools
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ppo_runs import fit, make, rollout_of, sgd, tokens_of
from tiny import LORA, Prompts, letters, tiny_model, tiny_policy
from transformers import AutoModelForSequenceClassification, get_scheduler

from lit_rlhf.algorithms import PPO
from lit_rlhf.clip import AdaptiveKLPenalty, AsymmetricClip, DualClip, LinearClip, NoClip, SymmetricClip
from lit_rlhf.entropy import ConstantEntropy, LinearEntropy, TargetEntropy
from lit_rlhf.errors import UserError
from lit_rlhf.kl import AdaptiveKL, FixedKL, LinearKL
from lit_rlhf.models import Policy, SeparateCritic, ValueHead
from lit_rlhf.models.policy import byte_tokenizer
from lit_rlhf.rewards.shaping import ScoreShaper
from lit_rlhf.rollout.sampler import Sampler

FAMILIES = ["llama", "qwen2", "gpt2", "gpt_neox"]


# ---- ratio, padding, dropout, precision, temperature -------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [None, LORA])
def test_ratio_is_1_in_every_epoch_when_nothing_is_learned(trainer, family, lora):
    lora = {**LORA, "fan_in_fan_out": True} if lora and family == "gpt2" else lora
    largest = []

    class Recorded(PPO):
        def loss(self, batch, output):
            largest.append(float((output.logprobs.detach() - batch.logprobs)[batch.response_mask].abs().max()))
            return super().loss(batch, output)

    policy = tiny_policy(family, lora=lora)
    ppo = Recorded(
        policy=policy, reward=letters, sampler=Sampler(max_new_tokens=6, chunk_size=5), optimizer=sgd(0.0),
        rollout_batch_size=12, minibatch_size=6, ppo_epochs=3,
    )  # fmt: skip
    fit(trainer, ppo, max_epochs=1, accumulate_grad_batches=3)  # rollout chunk 5, minibatch 6, micro-batch 2
    assert len(largest) == 3 * 2 * 3
    assert max(largest) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_neither_logprobs_nor_values(family):
    policy = tiny_policy(family)
    critic = ValueHead(policy)
    torch.nn.init.normal_(critic.head.weight)
    rollout = rollout_of(policy)
    with torch.no_grad():
        output = policy(*tokens_of(rollout))
        values = critic(output)
        for row in range(len(rollout)):
            single = rollout[[row]]
            width, length = int(single.prompt_mask.sum()), int(single.lengths)
            alone = policy(
                single.prompt_ids[:, -width:], single.prompt_mask[:, -width:],
                single.response_ids[:, :length], single.response_mask[:, :length],
            )  # fmt: skip
            torch.testing.assert_close(output.logprobs[row, :length], alone.logprobs[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(values[row, : length + 1], critic(alone)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "dropout"), [("gpt2", "resid_pdrop"), ("gpt2", "attn_pdrop"), ("llama", "attention_dropout")]
)
def test_dropout_is_off_in_every_pass(trainer, family, dropout):
    policy = tiny_policy(family, **{dropout: 0.1})
    policy.train()
    before = copy.deepcopy(policy)
    rollout = rollout_of(policy)
    assert not torch.equal(before(*tokens_of(rollout)).logprobs, before(*tokens_of(rollout)).logprobs)
    watch = fit(trainer, make(policy, lr=0.0), max_epochs=1)
    assert torch.equal(policy.train()(*tokens_of(rollout)).logprobs, policy(*tokens_of(rollout)).logprobs)
    assert watch.rows[0]["policy/ratio_max"] == pytest.approx(1, abs=1e-5)


def test_bf16_ratio_stays_close_to_1(trainer):
    watch = fit(trainer, make(lr=0.0), max_epochs=1, precision="bf16-mixed", accumulate_grad_batches=2)
    assert abs(watch.rows[0]["policy/ratio_max"] - 1) < 0.05
    assert watch.batches[0].logprobs.dtype == torch.float32


def test_temperature_enters_logprobs_and_entropy_but_not_values():
    policy = tiny_policy()
    critic = ValueHead(policy)
    torch.nn.init.normal_(critic.head.weight)
    rollout = rollout_of(policy, temperature=0.7)
    cool, warm = (policy(*tokens_of(rollout), temperature=t, entropy=True) for t in (0.7, 1.0))
    mask = rollout.response_mask
    torch.testing.assert_close(cool.logprobs[mask], rollout.logprobs[mask], atol=1e-5, rtol=1e-5)
    row = 2
    ids = torch.cat([rollout.prompt_ids[row][rollout.prompt_mask[row]], rollout.response_ids[row]])
    logits = policy.model(ids.unsqueeze(0)).logits[0, -7:-1] / 0.7
    torch.testing.assert_close(cool.entropy[row], torch.distributions.Categorical(logits=logits).entropy())
    assert not torch.allclose(cool.entropy, warm.entropy)
    assert torch.equal(critic(cool), critic(warm))


def test_a_completion_depends_on_the_seed(trainer):
    texts = [[s["completion"] for s in fit(trainer, make(seed=s), max_epochs=1).samples] for s in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


# ---- rewards, KL, reference --------------------------------------------------------------------------------


def test_the_score_lands_on_the_last_token_that_counts(trainer):
    recorded = {}

    class Recorded(PPO):
        def advantages(self, rewards, rollout, values):
            recorded.update(rewards=rewards, rollout=rollout)
            return super().advantages(rewards, rollout, values)

    ppo = Recorded(
        policy=tiny_policy(spread=0.15), reward=lambda prompts, completions, **_: [5.0] * len(prompts), seed=1,
        kl=FixedKL(coef=0.0), sampler=Sampler(max_new_tokens=8, stop_tokens=range(2, 60)), rollout_batch_size=8,
        minibatch_size=4,
    )  # fmt: skip
    fit(trainer, ppo, max_epochs=1)
    lengths = recorded["rollout"].lengths
    assert len(set(lengths.tolist())) > 2
    expected = torch.zeros_like(recorded["rewards"])
    for row, length in enumerate(lengths):
        expected[row, length - 1] = 5.0
    assert torch.equal(recorded["rewards"], expected)


def test_dense_rewards_keep_their_places(trainer):
    recorded = {}

    class Recorded(PPO):
        def advantages(self, rewards, rollout, values):
            recorded.update(rewards=rewards, mask=rollout.response_mask)
            return super().advantages(rewards, rollout, values)

    def dense(prompts, completions, **_):
        return torch.arange(6.0).repeat(len(prompts), 1)

    fit(trainer, Recorded(policy=tiny_policy(), reward=dense, kl=FixedKL(coef=0.0), sampler=Sampler(max_new_tokens=6),
                          rollout_batch_size=8, minibatch_size=4), max_epochs=1)  # fmt: skip
    width = recorded["mask"].shape[1]
    expected = torch.where(recorded["mask"], torch.arange(6.0)[:width], 0.0)
    torch.testing.assert_close(recorded["rewards"], expected)


def test_missing_end_is_charged_and_a_custom_stop_token_is_an_end():
    shaper = ScoreShaper(missing_eos_penalty=2.0)
    assert shaper(torch.tensor([1.0, 1.0]), torch.tensor([True, False])).tolist() == [1.0, -1.0]
    policy = tiny_policy()
    free = rollout_of(policy)
    stop = int(free.response_ids[0, 1])
    stopped = rollout_of(policy, stop_tokens=[stop])
    assert stopped.finished[0]
    assert ScoreShaper(missing_eos_penalty=2.0)(torch.ones(8), stopped.finished)[0] == 1.0


def test_score_shaping_scales_clips_and_normalises_by_running_moments():
    finished = torch.ones(3, dtype=torch.bool)
    assert ScoreShaper(scale=2.0, clip=3.0)(torch.tensor([1.0, 2.0, -9.0]), finished).tolist() == [2.0, 3.0, -3.0]
    shaper = ScoreShaper(normalize=True)
    first, second = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 10.0, 5.0])
    shaper(first, finished)
    restored = ScoreShaper(normalize=True)
    restored.load_state_dict(shaper.state_dict())
    everything = torch.cat([first, second])
    expected = (second - everything.mean()) / everything.std()
    torch.testing.assert_close(shaper(second, finished), expected)
    torch.testing.assert_close(restored(second, finished), expected)


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_fresh_policy_has_kl_exactly_0(trainer, lora, estimator):
    watch = fit(trainer, make(tiny_policy(lora=lora), kl=FixedKL(coef=0.1, estimator=estimator)), max_epochs=2)
    assert watch.rows[0]["objective/kl"] == 0
    assert watch.rows[1]["objective/kl"] != 0


def test_the_logged_kl_is_the_one_that_was_charged(trainer):
    charged = []

    class Recorded(PPO):
        def advantages(self, rewards, rollout, values):
            charged.append(float(rewards.sum() / len(rewards)))
            return super().advantages(rewards, rollout, values)

    ppo = Recorded(policy=tiny_policy(), reward=letters, kl=FixedKL(coef=0.3),
                   sampler=Sampler(max_new_tokens=6), rollout_batch_size=8, minibatch_size=4,
                   optimizer=sgd(0.5))  # fmt: skip
    watch = fit(trainer, ppo, max_epochs=3)
    charged = [whole - row["objective/scores"] for whole, row in zip(charged, watch.rows, strict=True)]
    assert abs(charged[2]) > 1e-3
    for row, penalty in zip(watch.rows, charged, strict=True):
        assert row["objective/kl"] * row["objective/kl_coef"] == pytest.approx(-penalty, abs=1e-5)
        assert row["objective/non_score_reward"] == pytest.approx(penalty, abs=1e-5)
        assert row["objective/rlhf_reward"] == pytest.approx(row["objective/scores"] + penalty, abs=1e-5)
    # and the KL is that of the completions of this iteration: recomputed from the experience
    batches = watch.batches[-4:-2]
    kl = sum(float(((b.logprobs - b.ref_logprobs) * b.response_mask).sum()) for b in batches) / 8
    assert watch.rows[-1]["objective/kl"] == pytest.approx(kl, abs=1e-5)


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_reference_never_changes(trainer, tmp_path, lora):
    ppo = make(tiny_policy(lora=lora), lr=0.5)
    before = ppo.reference.fingerprint()
    weights = copy.deepcopy({n: p for n, p in ppo.named_parameters() if p.requires_grad})
    fit(trainer, ppo)
    assert any(not torch.equal(p, weights[n]) for n, p in ppo.named_parameters() if n in weights)
    assert ppo.reference.fingerprint() == before
    ppo.trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = make(tiny_policy(lora=lora), lr=0.5)
    fit(trainer, resumed, ckpt_path=tmp_path / "a.ckpt", max_epochs=3)
    assert resumed.reference.fingerprint() == before


def test_resuming_against_another_reference_is_refused(trainer, tmp_path):
    ppo = make(tiny_policy(lora=LORA))
    fit(trainer, ppo, max_epochs=1)
    ppo.trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="another reference"):
        fit(trainer, make(tiny_policy(lora=LORA, seed=1)), ckpt_path=tmp_path / "a.ckpt")


def test_a_run_that_starts_from_a_trained_adapter_has_that_adapter_as_its_reference(trainer, tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    trained = Policy.from_pretrained(path=str(tmp_path / "base"), lora=LORA)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    trained.model.save_pretrained(tmp_path / "adapter")
    trained.tokenizer.save_pretrained(tmp_path / "adapter")
    policy = Policy.from_pretrained(path=str(tmp_path / "adapter"), lora=LORA)
    rollout = rollout_of(policy)
    ours, theirs = policy(*tokens_of(rollout)), trained(*tokens_of(rollout))
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=1e-4)
    assert fit(trainer, make(policy), max_epochs=1).rows[0]["objective/kl"] == 0


def test_adaptive_kl_moves_its_coefficient_and_survives_a_resume(trainer, tmp_path):
    def kl():
        return AdaptiveKL(init_coef=0.2, target=0.001, horizon=20)

    whole = fit(trainer, make(kl=kl(), lr=0.5), max_epochs=4).rows
    coefficients = [row["objective/kl_coef"] for row in whole]
    assert coefficients[1] < 0.2  # the KL of a fresh policy is 0, below the target
    assert len(set(coefficients)) == 4
    first = make(kl=kl(), lr=0.5)
    fit(trainer, first, max_epochs=2)
    first.trainer.save_checkpoint(tmp_path / "a.ckpt")
    later = fit(trainer, make(kl=kl(), lr=0.5), max_epochs=4, ckpt_path=tmp_path / "a.ckpt").rows
    assert [row["objective/kl_coef"] for row in later] == coefficients[2:]


# ---- the update --------------------------------------------------------------------------------------------


def gradient(trainer, accumulate, **changes):
    """The gradient of the first minibatch."""
    found = {}

    class Recorded(PPO):
        def on_before_optimizer_step(self, optimizer):
            if not found:
                found.update({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})

    ppo = Recorded(
        policy=tiny_policy(spread=0.15), reward=letters, optimizer=sgd(0.0), seed=2, rollout_batch_size=8,
        minibatch_size=8, ppo_epochs=1, sampler=Sampler(max_new_tokens=8, stop_tokens=range(2, 60)),
        entropy=ConstantEntropy(coef=0.1), value_coef=0.5, **changes,
    )  # fmt: skip
    watch = fit(trainer, ppo, max_epochs=1, accumulate_grad_batches=accumulate)
    assert len({int(m.sum()) for b in watch.batches for m in b.response_mask}) > 2  # unequal lengths
    return found


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_the_gradient_does_not_depend_on_the_micro_batch_split(trainer, accumulate):
    whole, split = gradient(trainer, 1), gradient(trainer, accumulate)
    assert whole.keys() == split.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(split[name], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_separate_critic_begins_when_the_policys_activations_are_gone(trainer, accumulate):
    seen = []

    class Critic(SeparateCritic):
        def forward(self, output, *tokens):
            if torch.is_grad_enabled():
                with pytest.raises(RuntimeError, match="Saved intermediate values"):
                    output.logprobs.sum().backward()
                seen.append(len(tokens[0]))
            return super().forward(output, *tokens)

    found = gradient(trainer, accumulate, critic=Critic)
    assert seen == [8 // accumulate] * accumulate
    together = gradient(trainer, accumulate, critic=Joint)
    assert found.keys() == together.keys()
    assert all(torch.equal(found[name], together[name]) for name in found)
    assert any("critic" in name and x.abs().sum() > 0 for name, x in found.items())


class Joint(SeparateCritic):
    """One of which the algorithm does not know that it shares nothing with the policy."""

    apart = False


def test_policy_gradient_of_the_first_step_is_that_of_advantage_times_logprob(trainer):
    policy = tiny_policy()
    ppo = make(policy, lr=0.0, value_coef=0.0, ppo_epochs=1, minibatch_size=8)
    watch = fit(trainer, ppo, max_epochs=1)
    batch = watch.batches[0]
    policy.zero_grad()
    loss, _ = ppo.loss(batch, policy(*tokens_of(batch), entropy=True))
    loss.backward()
    ours = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    logprobs = policy(*tokens_of(batch)).logprobs
    (-(batch.advantages * logprobs)[batch.response_mask].mean()).backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_advantages_are_whitened_over_the_iteration_or_left_alone(trainer):
    for whiten in (True, False):
        watch = fit(trainer, make(whiten_advantages=whiten, minibatch_size=8, ppo_epochs=1), max_epochs=1)
        batch = watch.batches[0]
        a = batch.advantages[batch.response_mask]
        assert (abs(float(a.mean())) < 1e-5) is whiten
        assert math.isclose(float(a.std()), 1, abs_tol=1e-3) is whiten


@pytest.mark.parametrize(
    "changes",
    [
        {"gamma": 0.5}, {"lam": 0.2}, {"value_coef": 0.5}, {"whiten_rewards": True}, {"whiten_advantages": False},
        {"bootstrap_truncated": True}, {"clip": SymmetricClip(range=0.01)}, {"entropy": ConstantEntropy(coef=1.0)},
        {"kl": FixedKL(coef=3.0)}, {"scores": ScoreShaper(scale=3.0)}, {"ppo_epochs": 3}, {"minibatch_size": 2},
        {"target_kl": 1e-6}, {"critic": SeparateCritic}, {"clip": SymmetricClip(value_range=1e-3)}, {"seed": 4},
        {"critic_lam": 0.2}, {"kl": FixedKL(coef=3.0, estimator="full")}, {"kl": LinearKL(start=3.0, end=3.0)},
        {"kl": FixedKL(coef=3.0, estimator="k2", place="loss")}, {"clip": LinearClip(start=0.2, end=0.0)},
        {"clip": AsymmetricClip(low=0.01, high=0.02)}, {"clip": DualClip(range=0.2, dual=1.001)}, {"clip": NoClip()},
        {"clip": AdaptiveKLPenalty(init_weight=1.0)}, {"entropy": TargetEntropy(target=9.0, init_coef=1.0, max_coef=1)},
        {"entropy": ConstantEntropy(coef=1.0, top_k=2)}, {"entropy": LinearEntropy(start=1.0, end=0.0)},
        {"reward": lambda completions, **_: [float(len(c)) for c in completions]},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_every_setting_changes_what_is_learned(trainer, changes):
    def weights(**changes):
        ppo = make(lr=0.5, **changes)
        fit(trainer, ppo)
        return torch.cat([p.flatten() for p in ppo.policy.parameters()])

    assert not torch.equal(weights(), weights(**changes))


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_full_kl_is_summed_over_the_vocabulary(trainer, lora):
    policy = tiny_policy(lora=lora)
    start = copy.deepcopy(policy)
    ppo = make(policy, lr=5.0, kl=FixedKL(estimator="full"), ppo_epochs=1, minibatch_size=8)
    watch = fit(trainer, ppo, max_steps=2)
    assert watch.rows[0]["objective/kl"] == 0.0
    # The second iteration's tokens, under the policy that drew them (before its step) and the first one.
    tokens = tokens_of(watch.batches[1])
    drawn, reference = (p.log_softmax(-1) for p in (watch.logits[1], start(*tokens, keep_logits=True).logits))
    expected = (drawn.exp() * (drawn - reference)).sum(-1)[watch.batches[1].response_mask].sum() / 8
    assert watch.rows[1]["objective/kl"] == pytest.approx(float(expected), rel=1e-4)
    assert float(expected) > 1e-3


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3_st", "full"])
def test_a_kl_in_the_loss_is_charged_there_and_not_in_the_rewards(trainer, estimator):
    charged = []

    class Recorded(PPO):
        def advantages(self, rewards, rollout, values):
            charged.append(float(rewards.sum() / len(rewards)))
            return super().advantages(rewards, rollout, values)

    ppo = Recorded(policy=tiny_policy(), reward=letters, kl=FixedKL(coef=0.3, estimator=estimator, place="loss"),
                   sampler=Sampler(max_new_tokens=6), rollout_batch_size=8, minibatch_size=4, ppo_epochs=1,
                   optimizer=sgd(0.5))  # fmt: skip
    rows = fit(trainer, ppo, max_epochs=3).rows
    assert charged == pytest.approx([row["objective/scores"] for row in rows], abs=1e-5)
    for row in rows:
        assert row["objective/non_score_reward"] == 0
        plain = row["loss/policy"] + ppo.value_coef * row["loss/value"]
        assert row["loss/total"] == pytest.approx(plain + 0.3 * row["loss/kl"], abs=1e-5)
    assert rows[2]["loss/kl"] > 1e-4


def test_a_strong_kl_in_the_loss_holds_the_policy_at_its_reference(trainer):
    def final_kl(coef):
        kl = FixedKL(coef=coef, estimator="full", place="loss")
        return fit(trainer, make(lr=0.02, kl=kl), max_epochs=6).rows[-1]["objective/kl"]

    assert 0 < final_kl(2.0) < 0.5 * final_kl(0.0)


def test_a_kl_budget_stops_the_run_after_the_iteration_that_exceeds_it(trainer, caplog):
    free = fit(trainer, make(lr=0.5), max_epochs=4).rows
    spent = [abs(row["objective/kl"]) for row in free]
    assert spent[0] == 0 < spent[1]
    rows = fit(trainer, make(lr=0.5, kl=FixedKL(estimator="k3", budget=1e-6)), max_epochs=4).rows
    assert len(rows) == 2
    rows = fit(trainer, make(lr=0.5, kl=FixedKL(estimator="k3")), max_epochs=4).rows
    measured = [row["objective/kl"] for row in rows]
    just_below = FixedKL(estimator="k3", budget=0.99 * max(measured))
    assert len(fit(trainer, make(lr=0.5, kl=just_below), max_epochs=4).rows) == measured.index(max(measured)) + 1
    assert "kl.budget=1e-06: the run stops" in caplog.text


def test_a_run_that_its_budget_ended_goes_on_with_a_larger_one_alone(trainer, tmp_path):
    def fit_with(budget, ckpt_path=None):
        checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
        ppo = make(lr=0.5, kl=FixedKL(estimator="k3", budget=budget))
        settings = {"callbacks": [checkpoint], "enable_checkpointing": True}
        rows = fit(trainer, ppo, max_epochs=4, ckpt_path=ckpt_path, **settings).rows
        return [row["iteration"] for row in rows], ppo.stopped_by

    assert fit_with(1e-6) == ([1, 2], "kl.budget")
    assert fit_with(1e-6, tmp_path / "last.ckpt") == ([], "kl.budget")
    assert fit_with(1e6, tmp_path / "last.ckpt") == ([3, 4], None)


@pytest.mark.parametrize(
    ("settings", "validated"),
    [({"max_epochs": 3}, [2, 3]), ({"max_epochs": -1, "max_steps": 12}, [2, 3]), ({"max_epochs": 9}, [2, 3])],
)
def test_the_last_iteration_is_validated_whatever_ends_the_run(trainer, settings, validated):
    stop = settings["max_epochs"] == 9
    kl = FixedKL(coef=0.0, estimator="k3", budget=1e-9 if stop else None)
    ppo = make(lr=0.5 if stop else 0.05, kl=kl)
    data = Prompts()
    data.val_dataloader = data.train_dataloader
    rows = fit(trainer, ppo, data=data, check_val_every_n_epoch=2, **settings).rows
    assert [row["iteration"] for row in rows if "val/objective/kl" in row] == ([2] if stop else validated)


def test_a_schedule_without_a_length_is_refused(trainer):
    line = {"start": 0.4, "end": 0.0}
    for part in ({"kl": LinearKL(**line)}, {"clip": LinearClip(**line)}, {"entropy": LinearEntropy(**line)}):
        message = rf"{next(iter(part))} changes .* trainer\.max_time .* set trainer\.max_epochs"
        with pytest.raises(UserError, match=message):
            fit(trainer, make(**part), max_epochs=-1, max_time="00:00:00:01")
    linear = functools.partial(get_scheduler, "linear", num_warmup_steps=0)
    with pytest.raises(UserError, match=r"'scheduler': .*num_training_steps.* Set trainer\.max_epochs"):
        fit(trainer, make(scheduler=linear), max_epochs=-1, max_time="00:00:00:01")
    constant = functools.partial(get_scheduler, "constant_with_warmup", num_warmup_steps=0)
    assert fit(trainer, make(scheduler=constant), max_epochs=-1, max_time="00:00:00:01").rows


def test_schedules_run_over_the_whole_run(trainer):
    line = {"start": 0.4, "end": 0.0}
    ppo = make(kl=LinearKL(**line), clip=LinearClip(**line), entropy=LinearEntropy(**line))
    rows = fit(trainer, ppo, max_epochs=4).rows
    # The KL coefficient is that of an iteration's start; ranges follow every step and are logged at its end.
    assert [row["objective/kl_coef"] for row in rows] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert [row["clip/high"] for row in rows] == pytest.approx([0.3, 0.2, 0.1, 0.0])
    assert [row["entropy/coef"] for row in rows] == pytest.approx([0.3, 0.2, 0.1, 0.0])


def test_the_kl_penalty_measures_how_far_the_updates_went_and_resumes(trainer, tmp_path):
    def ppo():
        return make(lr=0.5, clip=AdaptiveKLPenalty(target=1e-9, init_weight=0.25), entropy=TargetEntropy(target=1.0))

    first = ppo()
    watch = fit(trainer, first, max_epochs=1)
    tokens = torch.cat([b.response_mask.flatten() for b in watch.batches[:2]])
    shift = torch.cat([
        (first.policy(*tokens_of(b)).logprobs - b.logprobs).flatten() for b in watch.batches[:2]
    ])[tokens]  # fmt: skip
    expected = float((shift.exp() - 1 - shift).mean())  # the policy now against the one that drew the tokens
    assert watch.rows[0]["policy/update_kl"] == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-6
    first.trainer.save_checkpoint(tmp_path / "a.ckpt")
    whole = fit(trainer, ppo(), max_epochs=3).rows
    later = fit(trainer, ppo(), max_epochs=3, ckpt_path=tmp_path / "a.ckpt").rows
    names = ("clip/penalty", "entropy/coef", "objective/kl", "policy/update_kl")
    assert [row["clip/penalty"] for row in whole] == [0.25, 0.5, 1.0]
    assert [[row[n] for n in names] for row in later] == [[row[n] for n in names] for row in whole[1:]]


def test_updates_stop_on_the_target_kl_and_validation_still_runs(trainer):
    watch = fit(trainer, make(lr=1.0, target_kl=1e-3, ppo_epochs=4), data=Prompts(validation=True), max_epochs=3)
    free = fit(trainer, make(lr=1.0, ppo_epochs=4), data=Prompts(validation=True), max_epochs=3)
    assert [row["policy/updates"] for row in free.rows] == [8, 8, 8]
    assert all(row["policy/updates"] < 8 and row["policy/early_stopped"] == 1 for row in watch.rows)
    assert all("val/objective/scores" in row for row in watch.rows + free.rows)
    assert [row["iteration"] for row in watch.rows] == [1, 2, 3]


def test_the_target_kl_is_compared_with_a_mean_over_the_tokens_of_all_micro_batches(trainer):
    parts, found = [], []

    class Recorded(PPO):
        def loss(self, batch, output):
            parts.append((output.logprobs.detach() - batch.logprobs)[batch.response_mask].square() / 2)
            return super().loss(batch, output)

    ppo = Recorded(
        policy=tiny_policy(spread=0.15), reward=letters, optimizer=sgd(0.1), rollout_batch_size=12, minibatch_size=6,
        target_kl=1e3, sampler=Sampler(max_new_tokens=8, stop_tokens=range(2, 60)),
    )  # fmt: skip
    compute = ppo.minibatch_kl.compute
    ppo.minibatch_kl.compute = lambda: found.append(compute()) or found[-1]
    fit(trainer, ppo, max_epochs=2, accumulate_grad_batches=3)
    steps = [parts[i : i + 3] for i in range(0, len(parts), 3)]
    assert len(found) == len(steps) == 16  # 4 epochs of 2 steps
    for step, means in zip(steps, found, strict=True):
        assert means["kl"] == pytest.approx(torch.cat(step).mean().item(), rel=1e-5)
    unweighted = [torch.stack([part.mean() for part in step]).mean().item() for step in steps]
    assert unweighted[-1] != pytest.approx(found[-1]["kl"], rel=1e-2)


def test_max_steps_counts_optimiser_steps(trainer):
    ppo = make()
    fit(trainer, ppo, max_epochs=-1, max_steps=6, accumulate_grad_batches=2)
    assert ppo.trainer.global_step == 6
    assert ppo.iteration == 1  # 4 steps an iteration: the second one is not over, a longer run goes on with it


def test_reward_rises_when_ppo_trains(trainer):
    def few(prompts, completions, **_):
        return [-sum(c.isascii() for c in text) / 6 for text in completions]

    ppo = PPO(policy=tiny_policy(), reward=few, sampler=Sampler(max_new_tokens=6), rollout_batch_size=32,
              minibatch_size=32, ppo_epochs=2, kl=FixedKL(coef=0.0),
              optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))  # fmt: skip
    rows = fit(trainer, ppo, max_epochs=15).rows
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 0.1
    assert rows[-1]["objective/kl"] > 0.1


def test_bootstrapping_adds_the_value_after_a_cut_completion():
    ppo = make(bootstrap_truncated=True, whiten_advantages=False, gamma=0.9, lam=1.0)
    rollout = rollout_of(ppo.policy)[:2]
    rollout = type(rollout)(**{**vars(rollout), "finished": torch.tensor([False, True])})
    width = rollout.response_ids.shape[1]
    values = torch.zeros(2, width + 1)
    values[:, -1] = 10.0
    assert rollout.response_mask.all()
    advantages, _ = ppo.advantages(torch.zeros(2, width), rollout, values)
    expected = [10 * 0.9 ** (width - t) for t in range(width)]  # discounted to each token
    torch.testing.assert_close(advantages, torch.tensor([expected, [0.0] * width]))


# ---- critics, saving ---------------------------------------------------------------------------------------


def test_an_exported_separate_critic_starts_another_run(trainer, tmp_path):
    ppo = make(critic=SeparateCritic, lr=0.5)
    fit(trainer, ppo)
    ppo.export(tmp_path)
    rollout = rollout_of(ppo.policy)
    loaded = SeparateCritic(ppo.policy, init=str(tmp_path / "critic"))
    with torch.no_grad():
        expected, actual = (c(None, *tokens_of(rollout)) for c in (ppo.critic, loaded))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected)


def test_a_causal_model_without_a_trained_score_is_no_critic(tmp_path):
    model = tiny_model()
    model.config.num_labels = 1
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no trained score head: score\.weight is missing"):
        SeparateCritic(tiny_policy(), init=str(tmp_path))


def test_a_value_head_starts_at_0_or_with_an_orthogonal_weight():
    policy = tiny_policy()
    assert torch.equal(ValueHead(policy).head.weight, torch.zeros(1, policy.hidden_size))
    head = ValueHead(policy, gain=2.0).head  # one row is orthogonal if its norm is the gain
    assert float(head.weight.norm()) == pytest.approx(2.0, rel=1e-5)
    assert torch.equal(head.bias, torch.zeros(1))


@pytest.mark.parametrize("critic", [ValueHead, SeparateCritic])
def test_values_survive_saving_and_loading_a_checkpoint(trainer, tmp_path, critic):
    ppo = make(critic=critic)
    fit(trainer, ppo)
    ppo.trainer.save_checkpoint(tmp_path / "a.ckpt")
    rollout = rollout_of(ppo.policy)
    fresh = make(critic=critic)
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    fresh.load_state_dict(state, strict=True)
    with torch.no_grad():
        expected = ppo.critic(ppo.policy(*tokens_of(rollout)), *tokens_of(rollout))
        actual = fresh.critic(fresh.policy(*tokens_of(rollout)), *tokens_of(rollout))
    assert expected.abs().max() > 1e-3
    assert torch.equal(actual, expected)


def test_the_exported_model_and_value_head_load_and_agree(trainer, tmp_path):
    ppo = make(tiny_policy(lora=LORA), lr=0.5)
    fit(trainer, ppo)
    ppo.export(tmp_path / "model")
    loaded = Policy.from_pretrained(path=str(tmp_path / "model"))
    rollout = rollout_of(ppo.policy)
    ours, theirs = ppo.policy(*tokens_of(rollout)), loaded(*tokens_of(rollout))
    torch.testing.assert_close(theirs.logprobs, ours.logprobs, atol=1e-4, rtol=1e-4)
    head = ValueHead(loaded, path=str(tmp_path / "model"))
    torch.testing.assert_close(head(theirs), ppo.critic(ours), atol=1e-3, rtol=1e-3)


def test_only_what_trains_is_in_the_checkpoint(trainer, tmp_path):
    ppo = make(tiny_policy(lora=LORA))
    fit(trainer, ppo)
    ppo.trainer.save_checkpoint(tmp_path / "a.ckpt")
    names = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name or name.startswith("critic.") for name in names)


def test_a_separate_critic_starts_from_a_causal_reward_model_with_the_same_vocabulary(tmp_path):
    policy = tiny_policy()
    config = type(policy.base.config)(**{**policy.base.config.to_dict(), "num_labels": 1})
    reward_model = AutoModelForSequenceClassification.from_config(config)
    reward_model.save_pretrained(tmp_path / "rm")
    critic = SeparateCritic(policy, init=str(tmp_path / "rm"))
    assert torch.equal(critic.head.weight, reward_model.score.weight)
    AutoModelForSequenceClassification.from_config(
        type(config)(**{**config.to_dict(), "vocab_size": 99})
    ).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="99 token ids"):
        SeparateCritic(policy, init=str(tmp_path / "other"))


def test_metrics_do_not_count_padding(trainer):
    """Every token metric recomputed from the experience with plain loops."""
    ppo = make(tiny_policy(spread=0.15), lr=0.0, ppo_epochs=1, minibatch_size=8,
               sampler=Sampler(max_new_tokens=8, stop_tokens=range(2, 60)))  # fmt: skip
    watch = fit(trainer, ppo, max_epochs=1)
    batch, row = watch.batches[0], watch.rows[0]
    tokens = [(i, t) for i in range(8) for t in range(batch.response_mask.shape[1]) if batch.response_mask[i, t]]
    output = ppo.policy(*tokens_of(batch), entropy=True)
    count = len(tokens)
    assert row["tokens"] == count
    assert row["rollout/response_length"] == pytest.approx(count / 8)
    assert row["policy/entropy"] == pytest.approx(sum(float(output.entropy[i, t]) for i, t in tokens) / count, rel=1e-5)
    assert row["objective/entropy"] == pytest.approx(-sum(float(batch.logprobs[i, t]) for i, t in tokens) / 8, rel=1e-5)
    assert row["returns/mean"] == pytest.approx(sum(float(batch.returns[i, t]) for i, t in tokens) / count, rel=1e-4)
    assert row["loss/policy"] == pytest.approx(-sum(float(batch.advantages[i, t]) for i, t in tokens) / count, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 1.5}, "algorithm.gamma"), ({"gamma": "abc"}, "algorithm.gamma must be .* got 'abc'"),
        ({"whiten_advantages": "off"}, "algorithm.whiten_advantages must be true or false, got 'off'"),
        ({"lam": -0.1}, "algorithm.lam"), ({"critic_lam": 1.1}, "critic_lam"), ({"value_coef": -1.0}, "value_coef"),
        ({"target_kl": 0.0}, "target_kl"), ({"ppo_epochs": 0}, "epochs"), ({"seed": -1}, "seed"),
        ({"kl": AdaptiveKL(horizon=1.0)}, "kl.horizon=1 is too short for 8 episodes"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)
