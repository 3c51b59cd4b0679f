"""A guard against updates that carry the policy away from the reference: it ends the run, or takes them back."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_rlhf.callbacks.rollback import Rollback
from lit_rlhf.checks import check_number
from lit_rlhf.errors import UserError

ACTIONS = ("stop", "rollback")


class KLGuard(Callback):
    """Ends a run, or rolls it back, when an iteration's KL to the reference passes ``max_kl`` or is not finite.

    A rollout measures what the updates of the iteration before have made of the policy. If its KL is too high, the run
    goes back to the beginning of that iteration and does it again, with the same prompts and completions and a smaller
    learning rate, which it keeps (``callbacks/rollback.py``). ``kl.budget`` is how far a run is meant to go; this is
    for a policy that breaks.

    No rollout follows the last iteration. There the validation's KL counts, and a run in which it is too high ends as
    by ``stop``; without a validation nobody measures these updates.

    Args:
        max_kl: in nats per completion, > 0; far above what a run should reach.
        action: ``stop`` ends the run with an error that names the checkpoint; ``rollback`` goes on from there.
        lr_factor: what a rollback multiplies the learning rate by, above 0 and below 1.
        max_rollbacks: of a run, at least 1; then it ends as by ``stop``.

    Raises:
        UserError: a value is out of its range; there is no ``Checkpoints``; in a run, a KL that ends it.
        RolledBack: in a run, after a rollback.
    """

    def __init__(
        self, *, max_kl: float, action: str = "rollback", lr_factor: float = 0.5, max_rollbacks: int = 3
    ) -> None:
        if action not in ACTIONS:
            raise UserError(f"callbacks.kl_guard.action must be one of {', '.join(ACTIONS)}, got {action!r}")
        self.max_kl = check_number("callbacks.kl_guard.max_kl", max_kl, above=0)
        self.action = action
        self.rollback = Rollback("callbacks.kl_guard", lr_factor=lr_factor, most=max_rollbacks)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.rollback.setup(trainer, pl_module)

    def on_rollout_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called by the algorithm when an iteration begins, before prompts are drawn."""
        self.rollback.begin(trainer, pl_module)

    def on_rollout(self, trainer: Trainer, pl_module: LightningModule, metrics: Mapping[str, float]) -> None:
        """Called by the algorithm with what was measured about an iteration's completions."""
        kl = metrics["objective/kl"]
        if kl <= self.max_kl:
            self.rollback.keep(trainer)
            pl_module.pending["kl_guard/rollbacks"] = float(self.rollback.count)
            return
        what = f"{self._too_high(pl_module.iteration + 1, 'KL', kl)}: the updates of iteration {pl_module.iteration} "
        if self.action == "stop":
            raise UserError(self.rollback.refusal(trainer, f"{what}went too far"))
        self.rollback.go_back(trainer, pl_module, f"{what}went too far")

    def on_row(self, trainer: Trainer, pl_module: LightningModule, row: Mapping[str, float]) -> None:
        """Called by the algorithm with each row that it logs: after the last one comes no rollout."""
        last = pl_module.ends_after(row["iteration"])
        kl = row.get("val/objective/kl", 0.0)
        if last and not kl <= self.max_kl and trainer.state.fn == "fit":
            what = self._too_high(row["iteration"], "validation's KL", kl)
            raise UserError(self.rollback.refusal(trainer, f"{what}: the updates of the last iteration went too far"))

    def _too_high(self, iteration: int, name: str, kl: float) -> str:
        return f"iteration {iteration}: the {name} is {kl:.4g} nats, over callbacks.kl_guard.max_kl={self.max_kl:g}"

    def state_dict(self) -> dict[str, Any]:
        return self.rollback.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rollback.load_state_dict(state_dict)
