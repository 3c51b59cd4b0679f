"""Taking updates back: the rate that is smaller from then on, and two processes that agree on it."""

from functools import partial

import lightning as L
import pytest
import torch
from ppo_runs import Watch, make
from tiny import Prompts
from torch.optim import lr_scheduler as torch_schedulers
from transformers import get_scheduler

from lit_rlhf.callbacks import Checkpoints, KLGuard
from lit_rlhf.callbacks.checkpoints import written
from lit_rlhf.checkpoint_io import damage
from lit_rlhf.distributed import FSDP2Strategy, rank, run_in_processes, whole


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
    "cosine": partial(torch_schedulers.CosineAnnealingLR, T_max=5, eta_min=0.003),
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


# ---- two processes --------------------------------------------------------------------------------------------------


def run(folder, name, strategy, lr, guard):
    """Two iterations; leaves the weights and rows of this process, the number of rollbacks and the checkpoints."""
    module = make(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr))
    watch, checkpoints = Watch(), Checkpoints(dirpath=folder / name)
    module_trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_progress_bar=False, max_epochs=2,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, default_root_dir=folder,
        callbacks=[watch, checkpoints, *([guard] if guard else [])],
    )  # fmt: skip
    module_trainer.fit(module, datamodule=Prompts())
    clocks = ("time/", "kl_guard/")
    result = {
        "weights": {n: whole(p.detach()).clone() for n, p in module.named_parameters() if p.requires_grad},
        "rows": [{n: x for n, x in row.items() if not n.startswith(clocks) and "per_second" not in n}
                 for row in watch.rows],
        "rollbacks": guard.rollback.count if guard else 0,
        "checkpoints": [(path.name, damage(path)) for path in written(checkpoints.folder)],
    }  # fmt: skip
    torch.save(result, folder / f"{name}.{rank()}.pt")


def run_all(folder):
    for kind, strategy in (("ddp", lambda: "ddp"), ("fsdp2", FSDP2Strategy)):
        guard = KLGuard(max_kl=12, max_rollbacks=10)
        run(folder, f"{kind}_back", strategy(), 0.04, guard)
        run(folder, f"{kind}_slow", strategy(), 0.04 * 0.5**guard.rollback.count, None)


def test_two_processes_go_back_together(tmp_path):
    run_in_processes(run_all, 2, tmp_path)
    for kind in ("ddp", "fsdp2"):
        back, other, slow = (torch.load(tmp_path / f"{kind}_{x}.pt") for x in ("back.0", "back.1", "slow.0"))
        assert back["rollbacks"] == other["rollbacks"] >= 1
        for name, x in slow["weights"].items():
            assert torch.equal(x, back["weights"][name])
            assert torch.equal(x, other["weights"][name])
        assert back["rows"][-2:] == slow["rows"]
        assert back["checkpoints"][:2] == slow["checkpoints"]
        assert {state for _, state in back["checkpoints"]} == {None}
