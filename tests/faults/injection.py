"""What goes wrong in a run, and when: set up in its own process, before its command begins.

A place is where a run can be struck: a kind of thing that it does, such as opening a file of a checkpoint. A run that
nothing happens to counts how often it passes each place; a fault is then put at one of these moments.
"""

import builtins
import json
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Where a run can be killed.
PLACES = ("rollout", "scoring", "update", "checkpoint", "metrics", "export", "report")


class Places:
    """Counts the places that this process passes, and calls ``strike`` at the ``number``-th time of ``place``."""

    def __init__(self, folder: Path, place: str | None, number: int, strike: Callable[[], None]) -> None:
        self.folder, self.place, self.number, self.strike = str(folder), place, number, strike
        self.counts: Counter[str] = Counter()

    def passes(self, place: str) -> None:
        self.counts[place] += 1
        if place == self.place and self.counts[place] == self.number:
            self.strike()

    def install(self) -> None:
        """Watches files by Python's audit events, which come before each is touched, and some functions by wrapping."""
        import lit_rlhf.algorithms.judging as judging
        import lit_rlhf.callbacks.samples as samples
        import lit_rlhf.checkpoint_io as checkpoint_io
        import lit_rlhf.loggers.csv as metrics
        from lit_rlhf.algorithms.base import Algorithm

        sys.addaudithook(self._on_event)
        self._wrap(judging, "score", "scoring")
        self._wrap(Algorithm, "on_before_optimizer_step", "update")
        self._wrap(Algorithm, "optimizer_step", "update")
        self._wrap(Algorithm, "call_hook", "rollout", lambda _, name, phase=None, *rest: phase == "rollout")
        self._wrap_half(checkpoint_io._Summing, "write", "checkpoint")
        for module in (metrics, samples):
            module.open = self._open_half

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.symlink", "os.mkdir"):
            return
        path = str(arguments[1] if event in ("os.rename", "os.symlink") else arguments[0])
        if not path.startswith(self.folder):
            return
        name = path[len(self.folder) + 1 :]
        for beginning, place in (
            ("checkpoints/", "checkpoint"), ("metrics.csv", "metrics"), ("samples.jsonl", "metrics"),
            ("model", "export"), ("report.html", "report"), ("summary.json", "report"), ("config.yaml", "report"),
        ):  # fmt: skip
            if name.startswith(beginning):
                self.passes(place)

    def _wrap(self, owner: Any, name: str, place: str, counts: Callable[..., bool] = lambda *_, **__: True) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            if counts(*arguments, **named):
                self.passes(place)
            result = original(*arguments, **named)
            if counts(*arguments, **named):
                self.passes(place)
            return result

        setattr(owner, name, watched)

    def _wrap_half(self, owner: Any, name: str, place: str) -> None:
        """Passes ``place`` when half of what is written is on its way to the disk."""
        original = getattr(owner, name)

        def watched(writer: Any, part: Any) -> int:
            view = memoryview(part).cast("B")
            half = len(view) // 2
            original(writer, view[:half])
            writer.flush()
            self.passes(place)
            original(writer, view[half:])
            return len(view)

        setattr(owner, name, watched)

    def _open_half(self, *arguments: Any, **named: Any) -> Any:
        file = builtins.open(*arguments, **named)
        write = file.write

        def half(text: str) -> int:
            write(text[: len(text) // 2])
            file.flush()
            self.passes("metrics")
            return write(text[len(text) // 2 :])

        return _Proxy(file, half)


class _Proxy:
    def __init__(self, file: Any, write: Callable[[str], int]) -> None:
        self.file, self.write = file, write

    def __enter__(self) -> "_Proxy":
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def preempt() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


def fill_disk() -> None:
    """From now on no file can grow over 4 kB, which the system says in the middle of a write, as of a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def run_command(arguments: list[str], places: Places, counts: Path, out: int) -> None:
    """``lit-rlhf ARGUMENTS`` in this forked process, which prints to ``out`` and ends with the command's exit code."""
    os.dup2(out, 1)
    os.dup2(out, 2)
    code: Any = 1
    try:
        from lit_rlhf import cli

        places.install()
        sys.argv = ["lit-rlhf", *arguments]
        cli.main()
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        counts.write_text(json.dumps(places.counts))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
