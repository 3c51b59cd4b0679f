"""An online algorithm's validation: completions of held-out prompts, measured as those of training are."""

from typing import TYPE_CHECKING, Any

import torch

from lit_rlhf.algorithms.attempts import Patience, ScoreError
from lit_rlhf.algorithms.judged import Judged, cat_judged, describe, sample_rows
from lit_rlhf.data.tokenize import split_rows
from lit_rlhf.rewards.failure import RewardFailure
from lit_rlhf.rollout.philox import derive_seed

if TYPE_CHECKING:
    from lit_rlhf.algorithms.online import OnlineAlgorithm

_STREAM = 1  # keeps the random numbers of validation apart from those of training


class HeldOut:
    """The validation of ``algorithm``; its random numbers are the same every time.

    A batch whose reward fails is left out and counted, or ends the run, as in training.
    """

    def __init__(self, algorithm: "OnlineAlgorithm") -> None:
        self.algorithm = algorithm
        self._begin()

    def _begin(self) -> None:
        self.judged: list[Judged] = []  # of the validation under way
        self.rows = 0
        self.skipped = 0
        self.patience = Patience(self.algorithm.guard.limit)

    def step(self, batch: Any) -> None:
        """Completes a batch of held-out prompts; those of several loaders are measured together.

        Raises:
            RewardFailure, Exception: as ``Patience.leave_out``; within a fit there is a checkpoint, which a resume
                validates from.
        """
        rows = split_rows(batch)
        episodes = self.rows + torch.arange(len(rows))
        self.rows += len(rows)
        try:
            judged = self.algorithm.judge(rows, episodes, derive_seed(self.algorithm.seed, _STREAM))
        except (RewardFailure, ScoreError) as error:
            self.patience.leave_out(error, "validation", self._save)
            self.skipped += 1
        else:
            self.judged.append(judged)
            self.patience.reset()

    def _save(self) -> str:
        """Writes a checkpoint of the moment before the validation, if training has brought the run anywhere."""
        trainer = self.algorithm.trainer
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return ""
        self._begin()
        return self.algorithm.save_state()

    def end(self) -> None:
        """Logs the validation's row and samples, or within a fit keeps them for the iteration's."""
        algorithm, trainer = self.algorithm, self.algorithm.trainer
        parts, rows, skipped = self.judged, self.rows, self.skipped
        self._begin()
        if trainer.sanity_checking or not rows:
            return
        fitting = trainer.state.fn == "fit"
        iteration = algorithm.iteration + 1 if fitting else algorithm.iteration
        metrics, samples = {"val/rollout/skipped_batches": float(skipped)}, []
        if parts:
            judged = cat_judged(parts)
            described = describe(judged, algorithm.kl.at(algorithm.progress), charged=algorithm.kl_in_reward)
            metrics |= {f"val/{name}": value for name, value in described.items() if not name.endswith("kl_coef")}
            samples = sample_rows(judged, iteration, "validation")
            algorithm.call_hook("on_validated", samples, metrics)
        if fitting:
            algorithm.pending.update(metrics)
            algorithm.samples += samples
            # For callbacks that monitor them at the validation's end, before the iteration's row is logged.
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        else:
            algorithm.log_row(metrics)
            algorithm.call_hook("on_samples", iteration, samples)

    def run_if_missed(self) -> None:
        """Runs a validation that is due now and that the fit loop passed over.

        It validates after the last batch that it expects, which never comes when updates stop early, and which is not
        repeated when a run resumes right behind it. It passes over the last iteration, too, unless that is a multiple
        of `check_val_every_n_epoch`: then a run's last held-out values would be those of an earlier policy.
        """
        algorithm, trainer = self.algorithm, self.algorithm.trainer
        every, iteration = trainer.check_val_every_n_epoch, algorithm.iteration + 1
        last = algorithm.ends_after(iteration)
        due = trainer.enable_validation and every is not None and (last or iteration % every == 0)
        if due and not any(name.startswith("val/") for name in algorithm.pending):
            algorithm.run_validation()
