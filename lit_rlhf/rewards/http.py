"""Asks a server: JSON out, JSON back, many requests at once, each bounded in time, size and tries."""

import asyncio
import json
import logging
import os
import random
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from lit_rlhf.checks import check_int, check_number, check_text
from lit_rlhf.errors import UserError

FIRST_WAIT = 0.5  # seconds before the second try; doubled before each further one
LONGEST_WAIT = 60.0  # seconds, also where the server asks for more
SHOWN = 200  # characters of an answer that an error shows

Post = Callable[[Any], Awaitable[Any]]
"""Sends one JSON body, returns the JSON of the answer."""
Item = TypeVar("Item")
Result = TypeVar("Result")

# At INFO it logs every URL with its query, where some services take their keys.
logging.getLogger("httpx").setLevel(logging.WARNING)


class JsonClient:
    """Posts JSON to one URL.

    Connection errors, timeouts and the statuses 408, 429 and 5xx are tried again, after 0.5, 1, 2, ... seconds (times a
    random 0.5 to 1) or as long as Retry-After asks, at most a minute. Redirects are not followed.

    Args:
        key: the config key of the URL, for messages.
        url: http or https, without user name and password.
        concurrency: requests under way at once, at least 1.
        timeout: seconds that one try may take in all, > 0.
        retries: further tries after the first, at least 0.
        max_bytes: of an answer; reading stops there.
        token_env: the environment variable that holds the bearer token; None sends none.

    Raises:
        UserError: a URL that is refused, a number out of its range, or no token where one is wanted.
    """

    def __init__(
        self,
        *,
        key: str,
        url: str,
        concurrency: int,
        timeout: float,
        retries: int,
        max_bytes: int,
        token_env: str | None,
    ) -> None:
        self._key = key
        self._url = _checked_url(key, url)
        self._concurrency = check_int("reward.concurrency", concurrency, at_least=1)
        self._timeout = check_number("reward.timeout", timeout, above=0)
        self._tries = check_int("reward.retries", retries, at_least=0) + 1
        self._max_bytes = check_int("reward.max_bytes", max_bytes, at_least=1)
        self._token_env = None if token_env is None else check_text("reward.token_env", token_env)
        self._token()
        self._jitter = random.Random()  # its own: the global one is part of what a resumed run repeats

    async def map(self, ask: Callable[[Post, Item], Awaitable[Result]], items: Iterable[Item]) -> list[Result]:
        """``ask(post, item)`` for all items at once; the results stand in the order of the items.

        Raises:
            UserError: a request failed for good; the others are then given up.
        """
        token = self._token()
        authorization = {"Authorization": f"Bearer {token}"} if token else {}
        # Without compression, so that few bytes cannot become many; an answer that comes with it is refused.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **authorization}
        limits = httpx.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency)
        slots = asyncio.Semaphore(self._concurrency)
        async with httpx.AsyncClient(headers=headers, limits=limits, timeout=None, follow_redirects=False) as http:
            tasks = [asyncio.ensure_future(ask(lambda body: self._post(http, slots, body), item)) for item in items]
            try:
                return await asyncio.gather(*tasks)
            finally:  # of what one failure leaves under way, before the connections close
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def error(self, reason: str) -> UserError:
        """An error that names the URL."""
        shown = self._url.copy_with(query=None, fragment=None)
        return UserError(f"{self._key}: POST {shown} {reason}")

    def quote(self, text: str) -> str:
        """The beginning of what the server said, for an error; a token that it repeats is left out."""
        token = self._token()
        return repr((text.replace(token, "***") if token else text)[:SHOWN])

    def _token(self) -> str | None:
        """The token, read anew at each use, so that no attribute holds it."""
        if self._token_env is None:
            return None
        token = os.environ.get(self._token_env, "")
        if not token or not all("!" <= character <= "~" for character in token):
            # What was given is not shown: it may be the token itself.
            raise UserError(
                "reward.token_env must name an environment variable that holds the token; the one it names is not set, "
                "empty, or has blanks in it"
            )
        return token

    async def _post(self, http: httpx.AsyncClient, slots: asyncio.Semaphore, body: Any) -> Any:
        try:
            content = json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise self.error(f"cannot be sent as JSON: {error}") from error
        tries = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, _Failure) and error.passing),
            stop=stop_after_attempt(self._tries),
            wait=self._wait,
            reraise=True,
        )
        try:
            return await tries(self._try, http, slots, content)
        except _Failure as failure:
            raise self.error(f"{failure} (try {tries.statistics['attempt_number']} of {self._tries})") from failure

    async def _try(self, http: httpx.AsyncClient, slots: asyncio.Semaphore, content: bytes) -> Any:
        received = bytearray()
        try:
            async with (
                slots,
                asyncio.timeout(self._timeout),
                http.stream("POST", self._url, content=content) as response,
            ):
                if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
                    reason = f"answered with the Content-Encoding {self.quote(encoding)}, which it was not asked for"
                    raise _Failure(reason, passing=_passes(response.status_code))
                async for chunk in response.aiter_raw():
                    received += chunk
                    if len(received) > self._max_bytes:
                        break
        except TimeoutError as error:
            raise _Failure(f"had no whole answer within {self._timeout:g} s", passing=True) from error
        except httpx.HTTPError as error:
            reason = f"failed: {type(error).__name__} {self.quote(str(error))}"
            raise _Failure(reason, passing=isinstance(error, httpx.TransportError)) from error
        return self._read(response, received.decode(errors="replace"), whole=len(received) <= self._max_bytes)

    def _read(self, response: httpx.Response, text: str, *, whole: bool) -> Any:
        if not response.is_success:
            status = response.status_code
            hint = "; redirects are not followed, give the final address" if response.is_redirect else ""
            raise _Failure(
                f"answered {status}: {self.quote(text)}{hint}",
                passing=_passes(status),
                wait=_seconds(response.headers.get("Retry-After", "")),
            )
        if not whole:
            raise _Failure(f"answered with more than reward.max_bytes={self._max_bytes} bytes: {self.quote(text)}")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _Failure(f"answered with something that is no JSON: {self.quote(text)}") from error

    def _wait(self, state: RetryCallState) -> float:
        backoff = FIRST_WAIT * 2 ** (state.attempt_number - 1) * self._jitter.uniform(0.5, 1)
        return min(max(backoff, state.outcome.exception().wait), LONGEST_WAIT)


class _Failure(Exception):
    """A try that failed; a ``passing`` failure is worth another one, after ``wait`` seconds if the server says so."""

    def __init__(self, reason: str, *, passing: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.passing = passing
        self.wait = wait


def _passes(status: int) -> bool:
    return status in (408, 429) or status >= 500


def _checked_url(key: str, url: str) -> httpx.URL:
    """``url`` parsed. No message repeats one that may hold a password."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        raise UserError(f"{key} is no valid URL; give one such as http://localhost:8000/score") from None
    if parsed.userinfo:
        raise UserError(f"{key} holds a user name or password; name the environment variable of a token instead")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"{key} must begin with http:// or https:// and name a host; its scheme is {parsed.scheme!r}")
    return parsed


def _seconds(retry_after: str) -> float:
    """A Retry-After header (RFC 9110, section 10.2.3) in seconds: it is a number of them or a date; 0 if neither.

    >>> _seconds("120"), _seconds("soon")
    (120.0, 0.0)
    """
    try:
        return float(retry_after)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
