"""Taking updates back: a run goes on from the beginning of an earlier iteration, with a smaller learning rate.

For callbacks that judge an iteration by what is measured of its rollout::

    def __init__(self):
        self.rollback = Rollback("callbacks.mine", lr_factor=0.5, most=3)

    def setup(self, trainer, pl_module, stage):
        self.rollback.setup(trainer, pl_module)

    def on_rollout_start(self, trainer, pl_module):
        self.rollback.begin(trainer, pl_module)

    def on_rollout(self, trainer, pl_module, metrics):
        if good:
            self.rollback.keep(trainer)
        else:
            self.rollback.go_back(trainer, pl_module, "what is wrong")

    def state_dict(self):
        return self.rollback.state_dict()

    def load_state_dict(self, state_dict):
        self.rollback.load_state_dict(state_dict)
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_rlhf.callbacks.checkpoints import Checkpoints
from lit_rlhf.checks import check_int, check_number
from lit_rlhf.errors import UserError
from lit_rlhf.generators import from_plain, set_generators
from lit_rlhf.rollout.loader import RolledBack

log = logging.getLogger(__name__)


class Rollback:
    """The way back to the beginning of the last iteration that its owner, a callback, called good.

    The iteration is done again with the same prompts and completions; the learning rate, whatever schedule it follows,
    is smaller from then on. Rows and samples of what was taken back are cut, as by a resume. The place is one of the
    checkpoints of ``Checkpoints``, which keeps it for as long as it may be needed, so a resumed run can go back as
    well.

    Args:
        owner: the callback's config key, for messages; no two callbacks have the same.
        lr_factor: what each way back multiplies the learning rate by, above 0 and below 1.
        most: ways back in a run, at least 1.

    Raises:
        UserError: a value is out of its range.
    """

    def __init__(self, owner: str, *, lr_factor: float = 0.5, most: int = 3) -> None:
        self.owner = owner
        self.lr_factor = check_number(f"{owner}.lr_factor", lr_factor, above=0, below=1)
        self.most = check_int(f"{owner}.max_rollbacks", most, at_least=1)
        self.count = 0  # so far in the run

    def setup(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises UserError where there are no rollouts, or no checkpoints, to go back to."""
        if not pl_module.online:
            raise UserError(f"{self.owner} is for algorithms that complete prompts; this one has no rollouts")
        if not any(isinstance(callback, Checkpoints) for callback in trainer.checkpoint_callbacks):
            raise UserError(f"{self.owner} needs lit_rlhf.callbacks.Checkpoints (callbacks=checkpoint) to go back to")
        _checkpoints(trainer).expect(self.owner)

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For ``on_rollout_start``: makes sure that there is a checkpoint of the iteration's beginning."""
        _checkpoints(trainer).save(trainer, pl_module)

    def keep(self, trainer: Trainer) -> None:
        """For ``on_rollout``: what led to this iteration is good, and the way back leads to its beginning from now."""
        _checkpoints(trainer).pin(trainer, self.owner)

    def place(self, trainer: Trainer) -> Path | None:
        """The checkpoint that ``go_back`` leads to, None if there is none yet."""
        return _checkpoints(trainer).pinned(self.owner)

    def go_back(
        self, trainer: Trainer, pl_module: LightningModule, what: str, then: Callable[[], None] = lambda: None
    ) -> None:
        """Goes back because of ``what``; every process must call it, within ``on_rollout``.

        ``then`` is called when the run is back, before the checkpoint is written that a resume begins from.

        Raises:
            RolledBack: it is done, and the rollout under way is void.
            UserError: there is nowhere to go, it was done ``most`` times, or the checkpoint cannot be read or written.
        """
        place = self.place(trainer)
        if place is None or self.count == self.most:
            raise UserError(self.refusal(trainer, what))
        self.count += 1
        log.warning(
            "%s: back to %s, from where it is done again at %g times the learning rate (rollback %d of at most %d)",
            what, place.name, self.lr_factor, self.count, self.most,
        )  # fmt: skip
        scale = pl_module.lr_scale * self.lr_factor
        states = restore(trainer, pl_module, place)
        pl_module.lr_scale = scale
        pl_module.call_hook("on_taken_back", states)
        then()
        _checkpoints(trainer).on_rollback(trainer)
        raise RolledBack

    def refusal(self, trainer: Trainer, what: str) -> str:
        """The message of a run that ends because of ``what``, with the place to go on from."""
        tried = f" after {self.count} rollbacks" if self.count else ""
        place = self.place(trainer)
        if place is None:
            return f"{what}{tried}, and there is no checkpoint from before the updates that led there"
        return (
            f"{what}{tried}. {place} is the checkpoint from before the updates that led there; ckpt_path={place} goes "
            "on from it. A smaller optimizer.lr, more kl.coef or algorithm.target_kl may help"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"rollbacks": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["rollbacks"]


def _checkpoints(trainer: Trainer) -> Checkpoints:
    return next(callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints))


def restore(trainer: Trainer, module: LightningModule, path: Path) -> dict[str, Any]:
    """Puts a fit, within a rollout, back to the beginning of an earlier iteration: weights, optimiser, loops, module.

    Rows and samples from after the checkpoint are cut. Callbacks keep what they know, unless they have a hook
    ``on_taken_back``; it returns the states of then, by their ``state_key``.

    Args:
        path: a checkpoint of the end of an iteration, or of the beginning of one.
    """
    stored = trainer.strategy.load_checkpoint(path, weights_only=True)
    connector = trainer._checkpoint_connector
    connector._loaded_checkpoint = stored
    connector.restore_model()
    connector.restore_training_state()
    connector._loaded_checkpoint = {}
    _begin_epoch(trainer.fit_loop)
    module.loader.load_state_dict(stored["lit_rlhf"]["loader"])
    module._loader_state = None  # it is loaded
    set_generators(from_plain(module._generators))
    module._generators = None  # they are, too
    module.cut_rows(module.last_logged)
    return stored["callbacks"]


def _begin_epoch(fit_loop: Any) -> None:
    """Puts loops with a loaded state to where they are when an epoch has just begun, which is where they run on.

    The state may be of the end of the epoch before, and a loaded state is taken for the beginning of a resume.
    """
    for progress in (fit_loop.epoch_progress.total, fit_loop.epoch_progress.current):
        progress.completed = progress.processed
        progress.ready = progress.started = progress.processed + 1
    fit_loop.epoch_loop.batch_progress.reset_on_run()
    fit_loop.epoch_loop.scheduler_progress.reset_on_run()
    fit_loop.epoch_loop.automatic_optimization.optim_progress.reset_on_run()
    fit_loop.epoch_loop.val_loop.batch_progress.total.reset()
    _go_on(fit_loop)


def _go_on(loop: Any) -> None:
    loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
    for inner in vars(loop).values():
        if hasattr(inner, "_resuming_from_checkpoint"):
            _go_on(inner)
