"""The batch types that travel between the numbered stages.

All are frozen and keyword-only. Masks are bool and mean "this token counts". Prompts are padded on the left, responses
on the right, so that in any batch column ``P`` of ``[prompt | response]`` is the first response token of every row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

# The second axis of a (B, X) field: which side ``cat`` pads, and with what.
_PROMPT = {"side": "left", "value": 0}
_RESPONSE = {"side": "right", "value": 0}


class _Rows:
    """What the batch types share: length, rows by index, devices, concatenation, and the shape check."""

    def __post_init__(self) -> None:
        first: dict[str, tuple[str, int]] = {}  # axis -> (field that set it, its size)
        for f in fields(self):
            value = getattr(self, f.name)
            sizes: dict[str, int] = {}
            if isinstance(value, Tensor) and value.ndim:
                sizes["rows"] = value.shape[0]
                if "side" in f.metadata:
                    if value.ndim != 2:
                        raise ValueError(f"{type(self).__name__}.{f.name} must be 2-D, got {tuple(value.shape)}")
                    sizes[f.metadata["side"]] = value.shape[1]
            elif isinstance(value, list):
                sizes["rows"] = len(value)
            if f.name.endswith("mask") and isinstance(value, Tensor) and value.dtype != torch.bool:
                raise TypeError(f"{type(self).__name__}.{f.name} must be bool, got {value.dtype}")
            for axis, size in sizes.items():
                name, expected = first.setdefault(axis, (f.name, size))
                if size != expected:
                    raise ValueError(
                        f"{type(self).__name__}.{f.name} has {size} {axis}, but {name} has {expected}"
                    )

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def _map(self, tensor_fn: Any, list_fn: Any = lambda rows: rows) -> Self:
        changes: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changes[f.name] = tensor_fn(value)
            elif isinstance(value, list):
                changes[f.name] = list_fn(value)
            elif isinstance(value, dict):
                changes[f.name] = {key: list_fn(rows) for key, rows in value.items()}
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> Self:
        """The same batch on ``device``."""
        return self._map(lambda tensor: tensor.to(device))

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Self:
        """The rows at ``index`` (a slice, a list or a tensor of row numbers); scalars stay as they are."""
        if isinstance(index, slice):
            return self._map(lambda t: t[index] if t.ndim else t, lambda rows: rows[index])
        rows = torch.as_tensor(index, dtype=torch.long)
        numbers = rows.tolist()
        return self._map(
            lambda t: t[rows.to(t.device)] if t.ndim else t, lambda items: [items[i] for i in numbers]
        )

    @classmethod
    def cat(cls, batches: Sequence[Self]) -> Self:
        """All rows of ``batches``, padded to the widest prompt and the longest response."""
        if not batches:
            raise ValueError(f"{cls.__name__}.cat needs at least one batch")
        merged: dict[str, Any] = {}
        for f in fields(cls):
            values = [getattr(batch, f.name) for batch in batches]
            if isinstance(values[0], Tensor) and values[0].ndim:
                if "side" in f.metadata:
                    width = max(value.shape[1] for value in values)
                    values = [_pad(value, width, f.metadata["side"], f.metadata["value"]) for value in values]
                merged[f.name] = torch.cat(values)
            elif isinstance(values[0], list):
                merged[f.name] = [row for rows in values for row in rows]
            elif isinstance(values[0], dict):
                merged[f.name] = {key: [r for rows in values for r in rows[key]] for key in values[0]}
            else:
                merged[f.name] = values[0]
        return cls(**merged)


def _pad(x: Tensor, width: int, side: str, value: Any) -> Tensor:
    missing = width - x.shape[1]
    return F.pad(x, (missing, 0) if side == "left" else (0, missing), value=value)


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptBatch(_Rows):
    """Tokenised prompts, ready for stage 1.

    Attributes:
        prompt_ids: (B, P) token ids, padded on the left.
        prompt_mask: (B, P) bool.
        episodes: (B,) the number of each completion within the run; with the seed it fixes its randomness.
        prompts: B prompts as the datamodule gave them (text or chat messages).
        columns: every other column of the datamodule's batch, B values each, for the reward.
    """

    prompt_ids: Tensor = field(metadata=_PROMPT)
    prompt_mask: Tensor = field(metadata=_PROMPT)
    episodes: Tensor
    prompts: list[Any]
    columns: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout(_Rows):
    """Completions of stage 1.

    Attributes:
        prompt_ids, prompt_mask: (B, P), padded on the left.
        response_ids: (B, T), padded on the right.
        response_mask: (B, T) bool; the stop token that the policy emitted is inside it, once.
        logprobs: (B, T) of the sampler, at its temperature, in nats; 0 where the mask is False.
        finished: (B,) bool, False where the completion was cut by the length limit.
        episodes: (B,) long.
    """

    prompt_ids: Tensor = field(metadata=_PROMPT)
    prompt_mask: Tensor = field(metadata=_PROMPT)
    response_ids: Tensor = field(metadata=_RESPONSE)
    response_mask: Tensor = field(metadata=_RESPONSE)
    logprobs: Tensor = field(metadata=_RESPONSE)
    finished: Tensor
    episodes: Tensor

    @property
    def lengths(self) -> Tensor:
        """(B,) response tokens, the stop token included."""
        return self.response_mask.sum(-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Experience(_Rows):
    """What stages 6 to 8 learn from: tokens with the quantities frozen at rollout time.

    Attributes:
        prompt_ids, prompt_mask, response_ids, response_mask: as in :class:`Rollout`.
        logprobs: (B, T) of the policy that made the rollout, by the training forward pass.
        ref_logprobs: (B, T) of the reference.
        advantages, returns: (B, T); ``returns`` and ``values`` are None without a critic.
        weight: scalar. The share of a micro-batch in its minibatch's token mean (see ``RolloutLoader``).
    """

    prompt_ids: Tensor = field(metadata=_PROMPT)
    prompt_mask: Tensor = field(metadata=_PROMPT)
    response_ids: Tensor = field(metadata=_RESPONSE)
    response_mask: Tensor = field(metadata=_RESPONSE)
    logprobs: Tensor = field(metadata=_RESPONSE)
    ref_logprobs: Tensor = field(metadata=_RESPONSE)
    advantages: Tensor = field(metadata=_RESPONSE)
    values: Tensor | None = field(default=None, metadata=_RESPONSE)
    returns: Tensor | None = field(default=None, metadata=_RESPONSE)
    weight: Tensor = field(default_factory=lambda: torch.ones(()))

    def trim(self) -> "Experience":
        """Without the columns that are padding in every row: shorter micro-batches cost less."""
        left = int((~self.prompt_mask.any(0)).sum())
        right = int(self.response_mask.any(0).sum())
        changes = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor) and "side" in f.metadata:
                changes[f.name] = value[:, left:] if f.metadata["side"] == "left" else value[:, :right]
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreferenceBatch(_Rows):
    """Pairs of texts of which people preferred one, tokenised and padded on the right.

    Attributes:
        chosen_ids, chosen_mask: (B, C).
        rejected_ids, rejected_mask: (B, R).
        margin: (B,) how much better the chosen text was rated; 0 where unknown.
    """

    chosen_ids: Tensor
    chosen_mask: Tensor
    rejected_ids: Tensor
    rejected_mask: Tensor
    margin: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class CompletionBatch(_Rows):
    """Completions that somebody else wrote, tokenised: what algorithms of fixed data learn from.

    Attributes:
        prompt_ids, prompt_mask: (B, P), padded on the left.
        response_ids, response_mask: (B, T), padded on the right; the end of sequence is inside the mask, once.
    """

    prompt_ids: Tensor = field(metadata=_PROMPT)
    prompt_mask: Tensor = field(metadata=_PROMPT)
    response_ids: Tensor = field(metadata=_RESPONSE)
    response_mask: Tensor = field(metadata=_RESPONSE)

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of a policy's forward pass."""
        return self.prompt_ids, self.prompt_mask, self.response_ids, self.response_mask

    @property
    def lengths(self) -> Tensor:
        """(B,) response tokens, the end of sequence included."""
        return self.response_mask.sum(-1)

    @property
    def count(self) -> int:
        """All tokens, padding excluded."""
        return int(self.prompt_mask.sum()) + int(self.response_mask.sum())
