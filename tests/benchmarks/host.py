"""The harness's side of a comparison: starts the contenders, asks them in turn, checks that they did the same work.

It imports nothing heavy, so that nothing of it runs beside a contender.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.benchmarks.settings import Settings

ROOT = Path(__file__).parents[2]
#: What a side needs besides the project's own environment; put into the cache, never into the environment.
PACKAGES = {"trl.ppo": "trl==1.12.0", "trl.grpo": "trl==1.16.0"}


@dataclass(frozen=True, kw_only=True)
class Side:
    """A program of ``contender.PROGRAMS`` with what it is told."""

    program: str
    settings: Settings


def environment(threads: int, *folders: str | Path) -> dict[str, str]:
    """Of the processes that are measured: so many threads, the project and ``folders`` importable, nothing online."""
    path = os.pathsep.join(map(str, [*folders, ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]))
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **offline, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


def run_module(module: str, *arguments: str, threads: int = 1, cwd: Path | None = None) -> str:
    """What ``python -m MODULE ARGUMENTS`` prints, run in the folder ``cwd``.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment(threads), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def installed(package: str, folder: Path) -> Path:
    """Where in ``folder`` a peer's package is; pip puts it there at the first call. Its needs are the project's."""
    folder = folder / package.replace("==", "-")
    if not folder.exists():
        fresh = folder.with_name(f".{folder.name}.new")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps", "--target", str(fresh)]
        subprocess.run([*pip, package], check=True)
        fresh.rename(folder)
    return folder


def require_same_work(side: Side, reply: dict[str, Any]) -> None:
    """Raises RuntimeError if a side's iteration generated another number of tokens than its work asks for.

    ``exact`` says whether every single completion has the right length, where a side knows.
    """
    if reply["tokens"] != side.settings.tokens or not reply.get("exact", True):
        raise RuntimeError(
            f"{side.program} generated {reply['tokens']} tokens and not {side.settings.tokens}, or in other lengths"
        )


class Contender:
    """A side's process."""

    def __init__(self, side: Side, materials: str, folder: Path) -> None:
        folder.mkdir()
        self.side = side
        self._log = (folder / "log.txt").open("w+")
        cache = Path(json.loads(materials)["folder"])
        packages = [installed(PACKAGES[side.program], cache)] if side.program in PACKAGES else []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.contender", side.program, side.settings.dumps(), materials],
            cwd=folder, env=environment(side.settings.threads, *packages), text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip

    def __enter__(self) -> Self:
        try:
            self._read()
        except RuntimeError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def ask(self, what: str) -> dict[str, Any]:
        """The reply to a request: ``iterate``, ``profile`` or ``floor``.

        Raises:
            RuntimeError: the process ended, or it generated another number of tokens than it should.
        """
        self._process.stdin.write(json.dumps({"do": what}) + "\n")
        self._process.stdin.flush()
        reply = self._read()
        if what != "floor":
            require_same_work(self.side, reply)
        return reply

    def _read(self) -> dict[str, Any]:
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._log.flush()
        self._log.seek(0)
        raise RuntimeError(f"{self.side.program} ended early:\n{self._log.read()[-4000:]}")


@contextmanager
def contenders(sides: list[Side]) -> Iterator[list[Contender]]:
    """The processes of ``sides``, ready to be asked."""
    with tempfile.TemporaryDirectory(prefix="lit_rlhf_benchmark_") as folder, ExitStack() as stack:
        materials = run_module("tests.benchmarks.materials", sides[0].settings.dumps()).splitlines()[-1]
        # One after the other: loading is not measured, but it would disturb what another one measures.
        yield [
            stack.enter_context(Contender(side, materials, Path(folder) / str(number)))
            for number, side in enumerate(sides)
        ]


def interleave(sides: list[Side], rounds: int, *, extra: str | None = None) -> list[list[dict[str, Any]]]:
    """The replies of every side: an iteration that warms up, then ``rounds`` of them, A B A B ...

    ``extra`` is a last request to the first side; its reply is that side's last.
    """
    with contenders(sides) as ready:
        replies = [[] for _ in sides]
        for _ in range(1 + rounds):
            for contender, own in zip(ready, replies, strict=True):
                own.append(contender.ask("iterate"))
        if extra is not None:
            replies[0].append(ready[0].ask(extra))
    return replies
