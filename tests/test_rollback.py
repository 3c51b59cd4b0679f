"""Taking updates back: the rate that is smaller from then on, and two processes that agree on it."""

from functools import partial

import lightning as L
import pytest
import torch
from ppo_runs import make
from tiny import Prompts
from torch.optim import lr_scheduler as torch_schedulers
from transformers import get_scheduler


class Rates(torch.optim.SGD):
    """Notes the rate of every step."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.01, momentum=0.5)
        self.seen = []

    def step(self, closure=None):
        loss = super().step(closure)
        self.seen.append(float(self.param_groups[0]["lr"]))
        return loss


class SmallerFrom(L.Callback):
    """As a rollback does: half the rate from a step on."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, *_):
        if trainer.global_step == self.step:
            module.lr_scale *= 0.5


def warmup_then_cosine(optimizer):
    parts = [torch_schedulers.LinearLR(optimizer, 0.1, total_iters=3), torch_schedulers.CosineAnnealingLR(optimizer, 5)]
    return torch_schedulers.SequentialLR(optimizer, parts, milestones=[3])


def chained(optimizer):
    parts = [torch_schedulers.ConstantLR(optimizer, 0.5, total_iters=3), torch_schedulers.ExponentialLR(optimizer, 0.9)]
    return torch_schedulers.ChainedScheduler(parts)


SCHEDULERS = {
    "one cycle": partial(torch_schedulers.OneCycleLR, max_lr=0.1, total_steps=16),
    "sequential": warmup_then_cosine,
    "chained": chained,
    "lambda": partial(torch_schedulers.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "cosine": partial(torch_schedulers.CosineAnnealingLR, T_max=5, eta_min=0.003),
    "restarts": partial(torch_schedulers.CosineAnnealingWarmRestarts, T_0=3, eta_min=0.003),
    "cyclic": partial(torch_schedulers.CyclicLR, base_lr=0.001, max_lr=0.1, step_size_up=3),
    "transformers": partial(get_scheduler, "cosine_with_min_lr", num_warmup_steps=2, num_training_steps=16,
                            scheduler_specific_kwargs={"min_lr": 0.001}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rate_is_smaller_whatever_its_schedule(trainer, name):
    """Every later rate is half of what the schedule says, to the bit, and nothing else of the schedule changes."""
    seen = []
    for callbacks in ([], [SmallerFrom(3)]):
        module = make(scheduler=SCHEDULERS[name], optimizer=Rates, rollout_batch_size=4, minibatch_size=2, steps=2)
        trainer(max_epochs=2, callbacks=callbacks).fit(module, datamodule=Prompts())
        seen.append(module.trainer.optimizers[0].seen)
    assert len(set(seen[0])) > 2
    assert seen[1] == [rate * (0.5 if step >= 3 else 1) for step, rate in enumerate(seen[0])]
