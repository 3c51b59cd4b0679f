"""How scores, KLs, advantages and ratios are distributed in an iteration, for loggers that draw it."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_rlhf.batch import Experience
from lit_rlhf.errors import UserError


class Distributions(Callback):
    """Hands the numbers behind an iteration's means to every logger that has `log_distributions(values, step)`.

    `values` holds lists: `scores` and `kl`, one number a training completion; `advantages`, as the loss takes them,
    one a token; `ratios`, the probability ratio of each token to the rollout policy as the loss saw it, before the
    step, in the iteration's last pass over its experience. Where updates stopped early or a run was resumed within
    that pass, the ratios are those of its part that this process ran. No forward pass is made for them.

    Args:
        every_n_iterations: how often, at least 1.

    Raises:
        UserError: the value is too small.
    """

    def __init__(self, *, every_n_iterations: int = 1) -> None:
        if every_n_iterations < 1:
            raise UserError(f"Distributions: every_n_iterations={every_n_iterations}: give 1 or more.")
        self.every_n_iterations = every_n_iterations
        self._log_ratios: list[tuple[Tensor, Tensor]] = []  # with their masks
        self._advantages: list[float] = []

    def on_update(self, trainer: Trainer, pl_module: LightningModule, batch: Experience, logprobs: Tensor) -> None:
        """Called by the algorithm before each loss, with the policy's log-probabilities of the batch's tokens."""
        del trainer
        loader = pl_module.loader
        if (loader.position - 1) % (loader.minibatches * loader.micro_batches) == 0:  # a new pass
            self._log_ratios = []
        # Selected and copied only at the end, because either would wait for the GPU.
        self._log_ratios.append((logprobs - batch.logprobs, batch.response_mask))

    def on_experience(self, trainer: Trainer, pl_module: LightningModule, experience: Experience) -> None:
        """Called by the algorithm at the end of an iteration, before `on_samples`."""
        del trainer, pl_module
        self._advantages = experience.advantages[experience.response_mask].tolist()

    def on_samples(
        self, trainer: Trainer, pl_module: LightningModule, iteration: int, rows: list[dict[str, Any]]
    ) -> None:
        """Called by the algorithm at the end of an iteration with all its completions."""
        del pl_module
        train = [row for row in rows if row["split"] == "train"]
        log_ratios, self._log_ratios = self._log_ratios, []
        if not train or iteration % self.every_n_iterations:
            return
        values = {
            "scores": [row["score"] for row in train],
            "kl": [row["kl"] for row in train],
            "advantages": self._advantages,
            "ratios": [ratio for x, mask in log_ratios for ratio in x[mask].exp().tolist()],
        }
        for logger in trainer.loggers:
            if hasattr(logger, "log_distributions"):
                logger.log_distributions(values, step=iteration)
