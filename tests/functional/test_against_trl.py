"""The preference losses are those of current TRL on the same tensors (where TRL is installed; it is no dependency)."""

from types import SimpleNamespace

import pytest
import torch

from lit_rlhf.functional import dpo_loss, ipo_loss, kto_loss, odds_ratio_loss, preference_loss, robust_dpo_loss

pytest.importorskip("trl")

ROWS, STEPS = 5, 7
ALONE = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
)
TRAINING = torch.nn.Identity()  # a module in training that is no peft model
TRAINING.is_gradient_checkpointing = False


class Metrics(dict):
    def __missing__(self, name):
        return self.setdefault(name, [])


def completions(rows, seed):
    """Token log-probabilities of policy and reference (rows, STEPS), 0 outside the mask of unequal completions."""
    generator = torch.manual_seed(seed)
    mask = torch.arange(STEPS) < torch.randint(1, STEPS + 1, (rows, 1), generator=generator)
    policy, reference = (-3 * torch.rand(rows, STEPS, generator=generator) * mask for _ in range(2))
    return policy, reference, mask


def model_of(log_probs):
    """A model that says these token log-probabilities, whatever it is asked."""
    nothing = torch.zeros_like(log_probs)
    said = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}
    return lambda **_: SimpleNamespace(log_probs=log_probs, **said)


def inputs_of(mask):
    """TRL's batch: a prompt of one token before each completion."""
    whole = torch.cat([torch.zeros(len(mask), 1), mask], dim=1).long()
    return {"input_ids": torch.ones_like(whole), "attention_mask": torch.ones_like(whole), "completion_mask": whole}


def trl_pair_loss(kind, policy, reference, mask, *, beta, label_smoothing=0.0):
    from trl.trainer.dpo_trainer import DPOTrainer

    model = model_of(policy)
    trainer = SimpleNamespace(
        model=TRAINING, ref_model=model_of(reference), accelerator=ALONE, args=SimpleNamespace(
            gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=False, f_divergence_type="reverse_kl",
        loss_types=[kind], loss_weights=[1.0], beta=beta, label_smoothing=label_smoothing, use_weighting=False,
        _metrics={"train": Metrics()}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    return DPOTrainer._compute_loss(trainer, model, inputs_of(mask), False), trainer._metrics["train"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("kind", "ours", "settings"),
    [
        ("sigmoid", dpo_loss, {}),
        ("robust", robust_dpo_loss, {"label_smoothing": 0.2}),
        ("ipo", ipo_loss, {}),
    ],
)
def test_pair_losses_and_their_metrics(kind, ours, settings, seed):
    policy, reference, mask = completions(2 * ROWS, seed)
    expected, logged = trl_pair_loss(kind, policy, reference, mask, beta=0.3, **settings)
    lengths = mask.sum(1) if kind == "ipo" else torch.ones(2 * ROWS)
    sums = [x.sum(1) / lengths for x in (policy, reference)]
    loss, stats = ours(*sums[0].chunk(2), *sums[1].chunk(2), 0.3, **settings)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    if kind != "ipo":
        names = zip(("chosen_reward", "rejected_reward", "margin", "accuracy"),
                    ("chosen", "rejected", "margins", "accuracies"), strict=True)  # fmt: skip
        for name, theirs in names:
            assert float(stats[name]) == pytest.approx(logged[f"rewards/{theirs}"][0], abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kto_with_its_reference_point(seed):
    from trl.trainer.kto_trainer import KTOTrainer

    policy, reference, mask = completions(ROWS, seed)
    mismatched, mismatched_reference, _ = completions(ROWS, seed + 10)
    desirable = torch.tensor([True, False, True, True, False])
    point = (mismatched - mismatched_reference).sum(1).mean().clamp(min=0)
    trainer = SimpleNamespace(
        model=TRAINING, ref_model=model_of(reference), accelerator=ALONE,
        args=SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False, precompute_ref_logps=False, calculate_KL=True, loss_type="kto", beta=0.3,
        desirable_weight=0.7, undesirable_weight=1.4, _metrics={"train": Metrics()}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    model = model_of(policy)
    said = {id(model): mismatched.sum(1), id(trainer.ref_model): mismatched_reference.sum(1)}
    trainer._compute_kl_logps = lambda which, _batch: said[id(which)]
    expected = KTOTrainer._compute_loss(trainer, model, {**inputs_of(mask), "label": desirable}, False)
    loss, _ = kto_loss(policy.sum(1), reference.sum(1), desirable, point, 0.3, 0.7, 1.4)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_orpo_odds_ratio():
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    chosen, rejected = (-torch.tensor(x) for x in ([0.01, 0.5, 2.0, 9.0, 30.0], [0.7, 0.02, 5.0, 9.0, 0.001]))
    trainer = SimpleNamespace(beta=1.0, accelerator=ALONE)
    losses, *_, log_odds = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    loss, stats = odds_ratio_loss(chosen, rejected)
    torch.testing.assert_close(loss, -losses.mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats["log_odds_ratio"], log_odds, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("margin", "center"), [(None, None), (1.0, None), (None, 0.3), (2.0, 0.1)])
def test_reward_model_with_margin_and_centred_rewards(margin, center):
    from trl.trainer.reward_trainer import RewardTrainer

    scores = torch.randn(2 * ROWS, 1, generator=torch.manual_seed(0))
    chosen, rejected = scores[:, 0].chunk(2)
    margins = None if margin is None else margin * torch.arange(float(ROWS))
    trainer = SimpleNamespace(
        model=TRAINING, accelerator=ALONE, args=SimpleNamespace(center_rewards_coefficient=center),
        _metrics={"train": Metrics()}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {"attention_mask": torch.ones(2 * ROWS, 3)} | ({} if margins is None else {"margin": margins})
    model = lambda **_: SimpleNamespace(logits=scores)  # noqa: E731
    expected = RewardTrainer.compute_loss(trainer, model, inputs)
    ours, _ = preference_loss(chosen, rejected, 0.0 if margins is None else margins)
    ours = ours + (center or 0.0) * (chosen + rejected).square().mean()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
