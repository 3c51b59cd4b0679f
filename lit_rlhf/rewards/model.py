"""A trained reward model, or any sequence classifier, as a reward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.checks import check_bool, check_int, check_text
from lit_rlhf.errors import UserError
from lit_rlhf.halving import Halving
from lit_rlhf.models.cast import cast_layers, leave_file
from lit_rlhf.models.scorer import Scorer
from lit_rlhf.rewards.text import Scope, check_scope, tokens_to_score


class ModelReward:
    """The score that a sequence classifier gives a text; frozen, without dropout.

    By itself, and in evaluations, it scores in fp32. In training with ``trainer.precision=bf16-mixed`` or ``bf16-true``
    the backbone's products are in bfloat16, several times as fast and in half the memory; the head stays in fp32.

    With one label (a reward model) the score is its logit. With several it is the log-odds of ``positive_label``,

        log p - log(1 - p),    p = softmax(logits)[positive_label],

    which for two labels is the difference of their logits.

    Args:
        path: hub name or folder, e.g. the ``model`` folder of a reward-model run.
        batch_size: texts in one forward pass; where that takes more memory than there is, half as many.
        max_length: longer texts lose their end, conversations their beginning, in tokens; by default what the model was
            trained with.
        on: ``text`` scores the prompt with its completion, ``completion`` the completion alone. A chat is part of the
            text where the model's tokenizer has a chat template, which renders it with the answer.
        positive_label: name or number of the label that is wanted; required with several labels.
        full_precision: score in fp32 in training, too, whatever ``trainer.precision``.
        trust_remote_code: run the Python code that comes with the model, which can do anything.

    Raises:
        UserError: nothing to load, no such label, or a label missing.
    """

    name = "model"

    def __init__(
        self,
        *,
        path: str,
        batch_size: int = 64,
        max_length: int | None = None,
        on: Scope = "text",
        positive_label: str | int | None = None,
        full_precision: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.batch_size = check_int("reward.batch_size", batch_size, at_least=1)
        self.on = check_scope(on)
        if max_length is not None:
            check_int("reward.max_length", max_length, at_least=1)
        try:
            check_text("reward.path", path)
            scorer = Scorer.from_pretrained(path=path, max_length=max_length, trust_remote_code=trust_remote_code)
        except UserError as error:  # of an argument of the same name
            raise UserError(f"reward.{error}" if str(error).startswith("path=") else str(error)) from error
        self.scorer = scorer.eval().requires_grad_(False)
        self.label = _label(self.scorer.model.config.id2label, positive_label, path)
        self.full_precision = check_bool("reward.full_precision", full_precision)
        self.device: torch.device | str = "cpu"
        self.cast: torch.dtype | None = None
        model = self.scorer.model
        for part in model.children() if model.base_model is not model else ():
            if part is not model.base_model and next(part.parameters(), None) is not None:
                hooks = _FullPrecision()
                part.register_forward_pre_hook(hooks.enter, with_kwargs=True)
                part.register_forward_hook(hooks.leave, always_call=True)
        self.halving = Halving()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **_columns: Any) -> Tensor:
        rows = tokens_to_score(self.scorer, prompts, completions, self.on)
        return self.halving.run("score", self.batch_size, lambda size: self._score_all(rows, size))

    def _score_all(self, rows: list[list[int]], batch_size: int) -> Tensor:
        # Texts of similar length share a batch: less padding.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = torch.empty(len(rows))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            scores[part] = self._score(*self.scorer.pad([rows[i] for i in part])).cpu()
        return scores

    @torch.no_grad()
    def _score(self, ids: Tensor, mask: Tensor) -> Tensor:
        # Its own precision, whatever surrounds it.
        with torch.autocast(torch.device(self.device).type, dtype=self.cast, enabled=self.cast is not None):
            logits = self.scorer(ids.to(self.device), mask.to(self.device))
        if self.label is None:
            return logits[:, 0]
        logprobs = logits.log_softmax(-1)
        others = torch.cat([logprobs[:, : self.label], logprobs[:, self.label + 1 :]], dim=-1)
        return logprobs[:, self.label] - others.logsumexp(-1)

    def to(self, device: torch.device | str) -> "ModelReward":
        self.scorer.to(device)
        self.device = device
        return self

    def place(self, device: torch.device | str, cast: torch.dtype | None) -> None:
        """Moves the model to ``device``, to score in ``cast`` from now on; None is fp32. Cast weights stay rounded."""
        self.to(device)
        model = self.scorer.model
        self.cast = None if self.full_precision or model.base_model is model else cast
        if model.base_model is not model:
            cast_layers(model.base_model, self.cast or torch.float32)
        if self.cast is not None:
            leave_file(model)


class _FullPrecision:
    """Hooks that let a head compute in fp32 under autocast: logits in bfloat16 have steps of 1/64 at 2, and so ties."""

    def __init__(self) -> None:
        self.contexts: list[torch.autocast] = []

    def enter(self, head: nn.Module, arguments: tuple[Any, ...], settings: dict[str, Any]) -> tuple[Any, Any]:
        self.contexts.append(torch.autocast(next(head.parameters()).device.type, enabled=False))
        self.contexts[-1].__enter__()
        return tuple(map(_in_fp32, arguments)), {name: _in_fp32(value) for name, value in settings.items()}

    def leave(self, *_: Any) -> None:
        self.contexts.pop().__exit__(None, None, None)


def _in_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _label(names: dict[int, str], wanted: str | int | None, path: str) -> int | None:
    """The number of the wanted label; None where the model has a single output."""
    choices = ", ".join(f"{number} ({name})" for number, name in names.items())
    if len(names) == 1:
        if wanted is not None:
            raise UserError(f"reward.positive_label={wanted}: {path} has one output, so there is no label to choose")
        return None
    if wanted is None:
        raise UserError(f"{path} has {len(names)} labels: set reward.positive_label to one of {choices}")
    matches = [n for n, name in names.items() if wanted == n or str(wanted).lower() == str(name).lower()]
    if len(matches) != 1:
        raise UserError(f"reward.positive_label={wanted}: {path} has the labels {choices}")
    return matches[0]
