"""The losses of GRPO, its siblings and RLOO are those of current TRL on the same tensors (where TRL is installed)."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from tiny import letters, tiny_policy

from lit_rlhf.algorithms import DAPO, GRPO, GSPO, RLOO, DrGRPO
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.batch import Experience
from lit_rlhf.clip import AsymmetricClip
from lit_rlhf.functional import group_advantages, leave_one_out_advantages
from lit_rlhf.kl import FixedKL, NoKL
from lit_rlhf.models.policy import PolicyOutput
from lit_rlhf.rollout.sampler import Sampler

pytest.importorskip("trl")

ROWS, STEPS, LOW, HIGH, BETA = 8, 6, 0.1, 0.3, 0.2
ALONE = SimpleNamespace(
    num_processes=1, sync_gradients=True, gather=lambda x: x, gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)  # fmt: skip


def tensors(seed):
    """Completions of unequal lengths whose ratios spread well beyond the bounds."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(STEPS) < torch.randint(1, STEPS + 1, (ROWS, 1), generator=generator)
    new, old, reference = (-1 - torch.rand(ROWS, STEPS, generator=generator) for _ in range(3))
    return mask, new.requires_grad_(), old, reference, torch.randn(ROWS, generator=generator)


def trl_inputs(mask, old, reference, advantages):
    ids = torch.ones_like(mask).long()
    return {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference,
        "old_logps": torch.where(mask, old, 0.0).sum(-1), "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def trl_loss(name, new, inputs, **settings):
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        model=SimpleNamespace(training=True), accelerator=ALONE, _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        current_gradient_accumulation_steps=1, max_completion_length=STEPS, epsilon_low=LOW, epsilon_high=HIGH,
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm=False, beta=0.0, importance_sampling_level="token", _entropy_bonus_enabled=False,
    )  # fmt: skip
    vars(trainer).update(settings)
    return (RLOOTrainer if name == "rloo" else GRPOTrainer)._compute_loss(trainer, None, inputs)


def our_loss(monkeypatch, algorithm, mask, new, old, reference, advantages, kl=None):
    monkeypatch.setattr(OnlineAlgorithm, "progress", 0.0)
    module = algorithm(
        policy=tiny_policy(), reward=letters, clip=AsymmetricClip(low=LOW, high=HIGH), group_size=4, kl=kl or NoKL(),
        sampler=Sampler(max_new_tokens=STEPS), rollout_batch_size=ROWS, minibatch_size=ROWS,
    )  # fmt: skip
    ids = torch.ones_like(mask).long()
    batch = Experience(
        prompt_ids=ids[:, :1], prompt_mask=mask[:, :1], response_ids=ids, response_mask=mask, logprobs=old,
        ref_logprobs=reference, advantages=torch.where(mask, advantages.unsqueeze(1), 0.0),
    )  # fmt: skip
    output = PolicyOutput(new, torch.zeros_like(new), torch.zeros(ROWS, STEPS + 1, 1), None)
    loss, _ = module.loss(batch, output)
    return loss + BETA * module.kl_loss(batch, output, ()) if kl else loss


CASES = {
    "grpo": (GRPO, {"loss_type": "grpo"}),
    "dr_grpo": (DrGRPO, {"loss_type": "dr_grpo"}),
    "dapo": (DAPO, {"loss_type": "dapo"}),
    "gspo": (GSPO, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "rloo": (RLOO, {}),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_trls(name, seed, monkeypatch):
    algorithm, settings = CASES[name]
    mask, new, old, reference, advantages = tensors(seed)
    theirs = trl_loss(name, new, trl_inputs(mask, old, reference, advantages), **settings)
    ours = our_loss(monkeypatch, algorithm, mask, new, old, reference, advantages)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(loss, new, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    assert gradients[0].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_the_kl_in_the_loss_is_trls(name, monkeypatch):
    algorithm, settings = CASES[name]
    mask, new, old, reference, advantages = tensors(2)
    theirs = trl_loss(name, new, trl_inputs(mask, old, reference, advantages), beta=BETA, **settings)
    kl = FixedKL(coef=BETA, estimator="k3", place="loss")
    ours = our_loss(monkeypatch, algorithm, mask, new, old, reference, advantages, kl)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_group_advantages_are_those_of_trls_formulas():
    """As in its GRPOTrainer (scale_rewards="group") and RLOOTrainer; there they are part of the generation."""
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
    grouped = rewards.view(-1, 4)
    std = grouped.std(dim=1).repeat_interleave(4)
    grpo = (rewards - grouped.mean(dim=1).repeat_interleave(4)) / (std + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, 4), grpo, atol=1e-5, rtol=1e-5)
    rloo = rewards - ((grouped.sum(1, keepdim=True) - grouped) / 3).flatten()
    torch.testing.assert_close(leave_one_out_advantages(rewards, 4), rloo, atol=1e-5, rtol=1e-5)
