"""A guard against updates that carry the policy away from the reference: it ends the run, or takes them back."""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_rlhf.callbacks.checkpoints import Checkpoints
from lit_rlhf.checks import check_int, check_number
from lit_rlhf.errors import UserError
from lit_rlhf.rollout.loader import RolledBack

log = logging.getLogger(__name__)

ACTIONS = ("stop", "rollback")


class KLGuard(Callback):
    """Ends a run, or rolls it back, when an iteration's KL to the reference passes ``max_kl`` or is not finite.

    A rollout measures what the updates of the iteration before have made of the policy. If its KL is too high, the run
    goes back to the beginning of that iteration and does it again, with the same prompts and completions and a smaller
    learning rate, which it keeps. Rows and samples of what was taken back are cut, as by a resume. ``kl.budget`` is how
    far a run is meant to go; this is for a policy that breaks.

    It keeps a checkpoint of the last good beginning in ``<trainer.default_root_dir>/kl_guard``, written in each
    iteration; so a resumed run can go back as well.

    Args:
        max_kl: in nats per completion, > 0; far above what a run should reach.
        action: ``stop`` ends the run with an error that names the checkpoint; ``rollback`` goes on from there.
        lr_factor: what a rollback multiplies the learning rate by, above 0 and below 1.
        max_rollbacks: of a run, at least 1; then it ends as by ``stop``.

    Raises:
        UserError: a value is out of its range; in a run, a KL that ends it.
        RolledBack: in a run, after a rollback.
    """

    def __init__(
        self, *, max_kl: float, action: str = "rollback", lr_factor: float = 0.5, max_rollbacks: int = 3
    ) -> None:
        if action not in ACTIONS:
            raise UserError(f"callbacks.kl_guard.action must be one of {', '.join(ACTIONS)}, got {action!r}")
        self.max_kl = check_number("callbacks.kl_guard.max_kl", max_kl, above=0)
        self.action = action
        self.lr_factor = check_number("callbacks.kl_guard.lr_factor", lr_factor, above=0, below=1)
        self.max_rollbacks = check_int("callbacks.kl_guard.max_rollbacks", max_rollbacks, at_least=1)
        self.rollbacks = 0  # so far in the run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        del stage
        if not pl_module.online:
            raise UserError("callbacks.kl_guard is for algorithms that complete prompts; this one has no rollouts")
        self._good = Path(trainer.default_root_dir) / "kl_guard" / "good.ckpt"
        self._next = self._good.with_name("next.ckpt")

    def on_rollout_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called by the algorithm when an iteration begins, before prompts are drawn."""
        del pl_module
        trainer.save_checkpoint(self._next, weights_only=False)

    def on_rollout(self, trainer: Trainer, pl_module: LightningModule, metrics: Mapping[str, float]) -> None:
        """Called by the algorithm with what was measured about an iteration's completions."""
        kl = metrics["objective/kl"]
        if kl <= self.max_kl:
            self._promote(trainer)
            pl_module.pending["kl_guard/rollbacks"] = float(self.rollbacks)
            return
        # Of the completions that this iteration began with; the one before made the policy what it is.
        done = pl_module.iteration
        what = f"iteration {done + 1}: the KL is {kl:.4g} nats, over callbacks.kl_guard.max_kl={self.max_kl:g}"
        stored = trainer.strategy.load_checkpoint(self._good, weights_only=True) if self._good.exists() else None
        if stored is None or stored["lit_rlhf"]["iteration"] != done - 1:
            raise UserError(f"{what}, and there is no checkpoint from before the updates that led there")
        if self.action == "stop" or self.rollbacks == self.max_rollbacks:
            tried = f" after {self.rollbacks} rollbacks" if self.rollbacks else ""
            raise UserError(
                f"{what}{tried}: the updates of iteration {done} went too far. {self._good} is the checkpoint from "
                "before them. A smaller optimizer.lr, more kl.coef or algorithm.target_kl may help"
            )
        self.rollbacks += 1
        log.warning(
            "%s: the updates of iteration %d are taken back, and done again at %g times the learning rate (rollback %d "
            "of at most %d)", what, done, self.lr_factor, self.rollbacks, self.max_rollbacks,
        )  # fmt: skip
        before = stored["callbacks"][self.state_key]["rollbacks"]
        restore(trainer, pl_module, stored)
        slow_down(trainer, self.lr_factor ** (self.rollbacks - before))
        keep_state(trainer, pl_module)
        raise RolledBack

    def _promote(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            if self._good.is_dir():  # a sharded one
                shutil.rmtree(self._good)
            os.replace(self._next, self._good)
        trainer.strategy.barrier()

    def state_dict(self) -> dict[str, Any]:
        return {"rollbacks": self.rollbacks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rollbacks = state_dict["rollbacks"]


def restore(trainer: Trainer, module: LightningModule, stored: dict[str, Any]) -> None:
    """Puts a fit that runs back to a checkpoint that it wrote at this same place: weights, optimiser, loops, module.

    Callbacks keep what they know; rows and samples from after the checkpoint are cut.
    """
    connector = trainer._checkpoint_connector
    connector._loaded_checkpoint = stored
    connector.restore_model()
    connector.restore_training_state()
    connector._loaded_checkpoint = {}
    _go_on(trainer.fit_loop)
    module.loader.load_state_dict(stored["lit_rlhf"]["loader"])
    module._loader_state = None  # it is loaded
    module.cut_rows(module.last_logged)


def keep_state(trainer: Trainer, module: LightningModule) -> None:
    """Writes the checkpoint that a resume begins from, not from what was taken back."""
    for callback in trainer.checkpoint_callbacks:
        if hasattr(callback, "_last_global_step_saved"):
            callback._last_global_step_saved = 0  # else it takes the step for one that it has saved
    if isinstance(trainer.checkpoint_callback, Checkpoints):
        trainer.checkpoint_callback.on_rollback(trainer)
    else:
        module.save_state()


def _go_on(loop: Any) -> None:
    """Lets a loop and those inside it run on, which would take a loaded state for the beginning of a resume."""
    loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
    for inner in vars(loop).values():
        if hasattr(inner, "_resuming_from_checkpoint"):
            _go_on(inner)


def slow_down(trainer: Trainer, factor: float) -> None:
    """Multiplies every learning rate, those that schedulers start from too, by ``factor``."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name in {"lr", "initial_lr"} & set(group):
                group[name] = group[name] * factor
    for config in trainer.lr_scheduler_configs:
        if hasattr(config.scheduler, "base_lrs"):
            config.scheduler.base_lrs = [rate * factor for rate in config.scheduler.base_lrs]
