"""What ``lit-rlhf eval`` measures, at every validation of a run: diversity, win rate against the start, perplexity."""

import math
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_rlhf.checks import check_int
from lit_rlhf.errors import UserError
from lit_rlhf.rewards.group import learns

Rows = list[dict[str, Any]]
#: What of a completion a win rate is of.
_KEPT = ("prompt", "completion", "score", "components", "gold", "length")


class Evaluation(Callback):
    """Adds to the metrics of a validation, for any datamodule with a ``val_dataloader``:

    - ``val/text/...``: distinct n-grams, self-BLEU, shares of empty and refusing completions, and the perplexity of
      held-out texts where there are any;
    - ``val/win_rate/<judge>`` and ``val/win_rate/<judge>/equal_length``: against the completions of the run's first
      validation, of the same prompts and random numbers, by the score and by every gold score. ``lit-rlhf train`` makes
      that validation before training, with the policy that the run starts from. Scores of a reward that changes as it
      learns cannot be compared over time, so by those there is no win rate.

    How often there is a validation is ``trainer.check_val_every_n_epoch``. ``optimized_metric`` may name any of these.

    Args:
        text: a datamodule of held-out texts, whose batches have ``text``, or ``prompt`` and ``completion``; None for no
            perplexity.
        max_texts: how many of them at most, the first ones; each is read at every validation.

    Raises:
        UserError: a value is too small, or no datamodule; at the start, the algorithm completes no prompts.
    """

    def __init__(self, *, text: LightningDataModule | None = None, max_texts: int = 200) -> None:
        if text is not None and not isinstance(text, LightningDataModule):
            raise UserError(f"Evaluation: text must be a LightningDataModule, got {text!r}")
        self.text = text
        self.max_texts = check_int("Evaluation: max_texts", max_texts, at_least=1)
        self._start: Rows = []
        self._texts: list[tuple[Any, str]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = state_dict["start"]

    def on_taken_back(self, trainer: Trainer, pl_module: LightningModule, states: dict[str, Any]) -> None:
        """Called when a callback has put the run back, with all callbacks' states there: the start may be ahead."""
        del trainer, pl_module
        if self.state_key in states:
            self.load_state_dict(states[self.state_key])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        del trainer, stage
        if not getattr(pl_module, "online", False):
            raise UserError(f"callbacks.evaluation: {type(pl_module).__name__} completes no prompts in its validation")
        if self.text is not None and not self._texts:
            from lit_rlhf.evaluation.held_out import held_out_batches
            from lit_rlhf.evaluation.perplexity import text_rows

            for batch in held_out_batches(self.text, "callbacks.evaluation.text"):
                self._texts += text_rows(batch)
                if len(self._texts) >= self.max_texts:
                    break
            self._texts = self._texts[: self.max_texts]

    def on_validated(
        self, trainer: Trainer, pl_module: LightningModule, rows: Rows, metrics: dict[str, float]
    ) -> None:
        """Called by the algorithm with a validation's completions and metrics, to which this adds its own."""
        del trainer
        # Here, because sacrebleu and torchmetrics take half a second to import.
        from lit_rlhf.evaluation.summary import text_metrics, win_rates

        found = text_metrics([row["completion"] for row in rows])
        if not self._start:
            self._start = [{key: row[key] for key in _KEPT} for row in rows]
        now, then = _of_both(rows, self._start)
        if now:
            rates = win_rates(now, then, samples=1, intervals=False)
            if learns(pl_module.reward):
                del rates["score"]
            for judge, kinds in rates.items():
                found[f"win_rate/{judge}"] = kinds["plain"]["value"]
                found[f"win_rate/{judge}/equal_length"] = kinds["length_controlled"]["value"]
        if self._texts:
            found["text/perplexity"] = self._perplexity(pl_module)
        # NaN says that there was nothing to measure, such as pairs of words: a row without it says the same.
        metrics |= {f"val/{name}": value for name, value in found.items() if not math.isnan(value)}

    def _perplexity(self, module: Any) -> float:
        """Of all texts, by every process: of sharded weights each has to make the same forward passes."""
        from lit_rlhf.evaluation.perplexity import Perplexity, text_nats

        metric = Perplexity(sync_on_compute=False)
        with module.autocast_for_many():
            metric.update(*text_nats(module.policy, self._texts))
        return metric.compute().perplexity.value


def _of_both(rows: Rows, start: Rows) -> tuple[Rows, Rows]:
    """The rows of the same prompts in the same order, of which one side may lack batches whose reward failed.

    None where they are of other prompts.
    """
    longer, shorter = (rows, start) if len(rows) >= len(start) else (start, rows)
    rest = iter(longer)
    found = [row for one in shorter for row in [next((r for r in rest if r["prompt"] == one["prompt"]), None)] if row]
    if len(found) < len(shorter):
        return [], []
    return (found, shorter) if longer is rows else (shorter, found)
