"""Stage 2: calls a reward and checks what it returns."""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lit_rlhf.errors import UserError

Reward = Callable[..., Any]
"""``reward(prompts, completions, **columns)`` -> B numbers, a Tensor (B,), or a dict of named ones. May be async.

A reward that names the argument ``completion_ids`` gets each completion's token ids, a list of lists; it may return one
number per token, as a list of lists of these lengths or as a Tensor (B, T).
"""


def score(
    reward: Reward,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    completion_ids: Sequence[Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Calls ``reward`` on B completions and returns its components, each (B,) or (B, T) in fp32 on the CPU.

    A reward that returns plain numbers has one component, named after it. Its total is the sum of the components (see
    ``CompositeReward`` for weights).

    Raises:
        UserError: another number of scores than completions or tokens, something that is no number, NaN or infinity.
            The first bad sample is named, and nothing is learned from the batch.
    """
    tokens = {"completion_ids": completion_ids} if takes(reward, "completion_ids") else {}
    result = reward(prompts=list(prompts), completions=list(completions), **columns, **tokens)
    if inspect.isawaitable(result):
        # In a thread of its own, because a notebook's event loop is running in this one.
        with ThreadPoolExecutor(1) as thread:
            result = thread.submit(asyncio.run, _wait(result)).result()
    named = result if isinstance(result, Mapping) else {reward_name(reward): result}
    if not named:
        raise UserError(f"reward '{reward_name(reward)}' returned no components")
    return {
        str(name): _checked(str(name), _padded(str(name), values, completion_ids), prompts, completions)
        for name, values in named.items()
    }


def total(components: Mapping[str, Tensor]) -> Tensor:
    """(B,): the sum of the components of each sample; dense components (B, T) are summed over their tokens."""
    return torch.stack([c.sum(-1) if c.ndim == 2 else c for c in components.values()]).sum(0)


def reward_name(reward: Reward) -> str:
    """What a reward's only component is called: its ``name``, else the function's or class's name."""
    name = getattr(reward, "name", None) or getattr(reward, "__name__", None)
    return name if isinstance(name, str) else type(reward).__name__


def takes(reward: Reward, name: str) -> bool:
    """Whether a reward's signature names the argument ``name``."""
    try:
        return name in inspect.signature(reward.forward if isinstance(reward, nn.Module) else reward).parameters
    except (TypeError, ValueError):  # some callables written in C have no signature
        return False


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
        except (TypeError, ValueError) as error:
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
        raise UserError(f"reward '{name}' returned {shown} for {_sample(number, prompts, completions)}")
    return scores


def _sample(number: int, prompts: Sequence[Any], completions: Sequence[str]) -> str:
    return f"sample {number} (prompt {str(prompts[number])[:80]!r}, completion {completions[number][:80]!r})"
