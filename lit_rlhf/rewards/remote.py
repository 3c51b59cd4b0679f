"""A reward that another process computes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lit_rlhf.checks import check_int
from lit_rlhf.errors import UserError
from lit_rlhf.rewards.failure import check_on_failure
from lit_rlhf.rewards.http import JsonClient


class RemoteReward:
    """Asks a server of the user's own for the scores.

    Each batch is posted as ``{"prompts": [...], "completions": [...], <column>: [...]}`` and answered by
    ``{"scores": [number, ...]}`` or, for several components, ``{"scores": {"name": [number, ...], ...}}``.

    Args:
        url: http or https, without user name and password.
        batch_size: completions in a request.
        concurrency: requests under way at once.
        timeout: seconds that one try may take in all.
        retries: further tries after connection errors, timeouts and the statuses 408, 429 and 5xx.
        max_bytes: the longest answer that is read; one that is compressed is refused.
        columns: columns of the prompts that the server needs.
        token_env: the environment variable that holds a bearer token; None sends none.
        on_failure: when no scores can be had: ``stop`` ends the run, with a checkpoint; ``skip_batch`` goes on with the
            next prompts, at most 4 times in a row.

    Raises:
        UserError: an argument out of its range; called, a request that failed for good or an answer of another form.
    """

    name = "remote"

    def __init__(
        self,
        *,
        url: str,
        batch_size: int = 32,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 3,
        max_bytes: int = 10_000_000,
        columns: Sequence[str] = (),
        token_env: str | None = None,
        on_failure: str = "stop",
    ) -> None:
        self.on_failure = check_on_failure(on_failure)
        listed = isinstance(columns, Sequence) and not isinstance(columns, str)
        if not listed or {"prompts", "completions"} & set(columns):
            raise UserError(
                f"reward.columns={columns!r} must be a list of columns; prompts and completions are sent anyway"
            )
        self.columns = list(columns)
        self._batch_size = check_int("reward.batch_size", batch_size, at_least=1)
        self._client = JsonClient(
            key="reward.url",
            url=url,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            max_bytes=max_bytes,
            token_env=token_env,
        )

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any
    ) -> dict[str, list[float]]:
        whole = {"prompts": prompts, "completions": completions, **{name: columns[name] for name in self.columns}}
        starts = range(0, len(completions), self._batch_size)
        bodies = [{name: list(x[start : start + self._batch_size]) for name, x in whole.items()} for start in starts]
        answers = await self._client.map(lambda post, body: post(body), bodies)
        batches = [self._read(answer, len(b["completions"])) for answer, b in zip(answers, bodies, strict=True)]
        for first, second in pairwise(batches):
            if set(first) != set(second):
                raise self._client.error(f"named the components {sorted(first)}, then {sorted(second)}")
        return {name: [score for batch in batches for score in batch[name]] for name in batches[0]}

    def _read(self, answer: Any, size: int) -> dict[str, list[float]]:
        scores = answer.get("scores") if isinstance(answer, dict) else None
        named = scores if isinstance(scores, dict) else {self.name: scores}
        if not named or not all(_are_numbers(values) for values in named.values()):
            raise self._client.error(
                'must answer {"scores": [numbers]} or {"scores": {"name": [numbers]}}, got '
                f"{self._client.quote(str(answer))}"
            )
        for name, values in named.items():
            if len(values) != size:
                raise self._client.error(f"answered with {len(values)} scores '{name}' for {size} completions")
        return named


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
