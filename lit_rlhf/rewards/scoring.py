"""Stage 2: calls a reward and checks what it returns."""

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.rewards.failure import NotFinite, RewardFailure, sample_in_hand

Reward = Callable[..., Any]
"""``reward(prompts, completions, **columns)`` -> B numbers, a Tensor (B,), or a dict of named ones. May be async.

A reward that names the argument ``completion_ids`` gets each completion's token ids, a list of lists; one that names
``tokenizer`` gets the policy's. It may return one number per token, as a list of lists of these lengths or as a
Tensor (B, T). A reward with a method ``learn_from(scores)`` gets the ``Scores`` of each training iteration; one with
``state_dict`` and ``load_state_dict`` is saved with the run; where one with ``on_failure = "skip_batch"`` fails, the
run goes on with other prompts, and with ``on_failure = "stop"`` it ends. Of several processes each calls the reward
with its share of the completions, and ``learn_from`` with those of all: a reward that learns there stays the same in
every process.
"""


class Scores(NamedTuple):
    """What a reward says about B completions.

    Attributes:
        components: name -> raw scores, (B,), or (B, T) where every token has its own; fp32 on the CPU.
        weights: what a component counts in the total; one that is not named counts 1.
    """

    components: dict[str, Tensor]
    weights: dict[str, float]

    def weight(self, name: str) -> float:
        return self.weights.get(name, 1.0)

    @property
    def total(self) -> Tensor:
        """(B,): the weighted sum of the components, those of single tokens summed over their completion."""
        return self._sum({name: x.sum(-1) if x.ndim == 2 else x for name, x in self.components.items()})

    @property
    def whole(self) -> Tensor:
        """(B,): the weighted sum of the components that score completions as a whole."""
        return self._sum({name: x for name, x in self.components.items() if x.ndim == 1})

    @property
    def dense(self) -> Tensor | float:
        """(B, T): the weighted sum of the components that score single tokens; 0 if there are none."""
        parts = {name: x for name, x in self.components.items() if x.ndim == 2}
        return self._sum(parts) if parts else 0.0

    def _sum(self, parts: Mapping[str, Tensor]) -> Tensor:
        if not parts:
            return torch.zeros(len(next(iter(self.components.values()))))
        return torch.stack([self.weight(name) * x for name, x in parts.items()]).sum(0)


def score(
    reward: Reward,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    completion_ids: Sequence[Sequence[int]] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Scores:
    """Calls ``reward`` on B completions and checks what it says.

    A reward that returns plain numbers has one component, named after it. A reward with an attribute ``weights`` (name
    -> number) says there, once it was called, what its components count in the total.

    Raises:
        RewardFailure: a UserError of the reward's, another number of scores than completions or tokens, something that
            is no number, NaN or infinity (the first bad sample is named). It skips the batch if the reward has an
            attribute ``on_failure`` that is "skip_batch"; for NaN and infinity also if it has none.
        Exception: whatever else the reward raises, with a note that names the sample.
    """
    try:
        return _score(reward, prompts, completions, columns, completion_ids, tokenizer)
    except RewardFailure:
        raise  # that of a reward within this one
    except UserError as error:
        on_failure = getattr(reward, "on_failure", None)
        spoiled = isinstance(error, NotFinite) and on_failure is None
        raise RewardFailure(str(error), skips=spoiled or on_failure == "skip_batch", spoiled=spoiled) from error
    except Exception as error:
        if not getattr(error, "__notes__", None):
            number = sample_in_hand(error.__traceback__, list(completions))
            which = f"for one of {len(completions)} samples, of which the first is " if number is None else "for "
            error.add_note(
                f"The reward '{reward_name(reward)}' raised this {which}{_sample(number or 0, prompts, completions)}."
            )
        raise


def _score(
    reward: Reward,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    completion_ids: Sequence[Sequence[int]] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Scores:
    offered = {"completion_ids": completion_ids, "tokenizer": tokenizer}
    asked_for = {name: value for name, value in offered.items() if name in _parameters(reward)}
    result = reward(prompts=list(prompts), completions=list(completions), **columns, **asked_for)
    if inspect.isawaitable(result):
        # In a thread of its own, because a notebook's event loop is running in this one.
        with ThreadPoolExecutor(1) as thread:
            result = thread.submit(asyncio.run, _wait(result)).result()
    named = result if isinstance(result, Mapping) else {reward_name(reward): result}
    if not named:
        raise UserError(f"reward '{reward_name(reward)}' returned no components")
    if odd := [name for name in map(str, named) if not name.isprintable()]:  # which no file gives back as it was
        raise UserError(f"reward '{reward_name(reward)}' named a component {odd[0]!a}; a name has printable characters")
    components = {
        str(name): _checked(str(name), _padded(str(name), values, completion_ids), prompts, completions)
        for name, values in named.items()
    }
    weights = getattr(reward, "weights", None)
    return Scores(components, dict(weights) if isinstance(weights, Mapping) else {})


def reward_name(reward: Reward) -> str:
    """What a reward's only component is called: its ``name``, else the function's or class's name."""
    if isinstance(reward, functools.partial):
        return reward_name(reward.func)
    name = getattr(reward, "name", None) or getattr(reward, "__name__", None)
    return name if isinstance(name, str) else type(reward).__name__


def _parameters(reward: Reward) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(reward.forward if isinstance(reward, nn.Module) else reward).parameters
    except (TypeError, ValueError):  # some callables written in C have no signature
        return {}


def required_columns(reward: Reward) -> list[str]:
    """The columns that a reward cannot do without: those in its ``columns``, and arguments without a default."""
    named = list(getattr(reward, "columns", []))
    given = {"prompts", "completions", "completion_ids", "tokenizer"}
    return named + [
        name
        for name, parameter in _parameters(reward).items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and name not in given
    ]


def require_columns(key: str, reward: Reward, columns: Mapping[str, Any]) -> None:
    """Raises UserError if the prompts lack a column that ``reward`` reads; ``key`` is "reward" or "gold"."""
    if missing := sorted(set(required_columns(reward)) - set(columns)):
        has = f"their columns are {', '.join(sorted(columns))}" if columns else "they have no columns"
        raise UserError(
            f"config key '{key}': {reward_name(reward)} reads the column '{missing[0]}' of the prompts, but {has} (a "
            "reward gets prompts=, completions= and each column by its name)"
        )


def freeze(reward: Reward, device: torch.device | str, cast: torch.dtype | None = None) -> None:
    """Moves a reward that has weights to ``device``; a network is also switched to evaluation and never trained.

    Rewards with ``place(device, cast)``, those of this library that hold a model, then score in ``cast``, without it in
    fp32; a user's own network computes in what it was made in.
    """
    if isinstance(reward, nn.Module):
        reward.eval().requires_grad_(False)
    if hasattr(reward, "place"):
        reward.place(device, cast)
    elif hasattr(reward, "to"):
        reward.to(device)


async def _wait(result: Any) -> Any:
    return await result


def _padded(name: str, values: Any, completion_ids: Sequence[Sequence[int]] | None) -> Any:
    """Token rewards as a list of lists, of each completion's own length, to a Tensor (B, T); anything else as it is."""
    if completion_ids is None or not isinstance(values, Sequence) or len(values) != len(completion_ids):
        return values
    if not any(isinstance(row, list | tuple) for row in values):
        return values
    for number, (row, ids) in enumerate(zip(values, completion_ids, strict=True)):
        if not isinstance(row, list | tuple) or len(row) != len(ids):
            found = f"{len(row)} token rewards" if isinstance(row, list | tuple) else repr(row)
            raise UserError(f"reward '{name}' returned {found} for sample {number}, which has {len(ids)} tokens")
    return pad_sequence([torch.tensor(row, dtype=torch.float32) for row in values], batch_first=True)


def _checked(name: str, values: Any, prompts: Sequence[Any], completions: Sequence[str]) -> Tensor:
    if isinstance(values, Tensor):
        scores = values.detach().float().cpu()
    else:
        if not isinstance(values, Sequence) and not hasattr(values, "__array__"):
            raise UserError(
                f"reward '{name}' returned {type(values).__name__}; it must return one number per completion"
            )
        for number, value in enumerate(values):
            if value is None or isinstance(value, str):
                raise UserError(f"reward '{name}' returned {value!r} for {_sample(number, prompts, completions)}")
        try:
            scores = torch.as_tensor(values, dtype=torch.float32)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last two: numbers beyond all floats
            raise UserError(f"reward '{name}' returned something that is not numbers: {error}") from error
    if scores.ndim not in (1, 2) or len(scores) != len(completions):
        raise UserError(
            f"reward '{name}' returned {len(scores) if scores.ndim else 1} scores of shape {tuple(scores.shape)} for "
            f"{len(completions)} completions"
        )
    bad = ~torch.isfinite(scores).reshape(len(scores), -1).all(-1)
    if bad.any():
        number = int(bad.nonzero()[0])
        value = scores[number].tolist()
        shown = value if not isinstance(value, list) else next(v for v in value if not math.isfinite(v))
        raise NotFinite(f"reward '{name}' returned {shown} for {_sample(number, prompts, completions)}")
    return scores


def _sample(number: int, prompts: Sequence[Any], completions: Sequence[str]) -> str:
    return f"sample {number} (prompt {str(prompts[number])[:80]!r}, completion {completions[number][:80]!r})"
