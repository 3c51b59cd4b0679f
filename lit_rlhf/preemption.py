"""Signals that ask a run to stop: SIGTERM, Ctrl-C, and SIGUSR1, which SLURM sends ahead of time if it is asked to.

The first one is only noted. The run finishes its optimiser step, writes a checkpoint (``callbacks/checkpoints.py``) and
ends with the exit code ``PREEMPTED``; the same command continues it. A second one ends the process at once.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: The exit code of a run that was asked to stop and can be continued: EX_TEMPFAIL of sysexits.h, "try again later".
PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ONE = 1.0  # seconds within which several signals are one: a terminal and a parent may both send it


class Preempted(SystemExit):
    """Ends a run that was asked to stop and can be continued."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class _Noted:
    since: float | None = None  # when the first signal came
    outside: dict[int, Any] | None = None  # the handlers that were there before; None while nobody listens
    pass_on: Callable[[int], None] | None = None


def asked_to_stop() -> bool:
    """Whether a signal has come since ``listening`` began; outside it none counts."""
    return _Noted.outside is not None and _Noted.since is not None


@contextmanager
def listening() -> Iterator[None]:
    """Inside, the first signal is noted. Inside another such block, and outside the main thread, this does nothing."""
    if _Noted.outside is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _Noted.since = None
    # What is ignored stays so, as SIGINT is in a command that a shell runs in the background.
    _Noted.outside = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        for number in _Noted.outside:
            signal.signal(number, _note)
        yield
    finally:
        for number, handler in _Noted.outside.items():
            signal.signal(number, handler)
        _Noted.outside = None


@contextmanager
def not_listening() -> Iterator[None]:
    """Inside ``listening``, gives the signals back to whoever had them before."""
    outside = _Noted.outside or {}
    for number, handler in outside.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in outside:
            signal.signal(number, _note)


@contextmanager
def passing_on(pass_on: Callable[[int], None]) -> Iterator[None]:
    """Inside ``listening``, calls ``pass_on(number)`` for every signal: this process's children do the work."""
    _Noted.pass_on = pass_on
    try:
        yield
    finally:
        _Noted.pass_on = None


def _note(number: int, _frame: FrameType | None) -> None:
    now = time.monotonic()
    again = _Noted.since is not None and now - _Noted.since > _ONE
    if _Noted.pass_on is not None:
        _Noted.pass_on(number)
    if again:
        signal.signal(number, _Noted.outside[number])
        signal.raise_signal(number)
    elif _Noted.since is None:
        _Noted.since = now
        name = signal.Signals(number).name
        # Not by logging: the signal may have come while a line was being printed.
        os.write(2, f"{name}: stopping after this step, with a checkpoint. A second signal ends it at once.\n".encode())
