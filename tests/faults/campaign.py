"""Runs with faults, restarts by the same command, and the comparison with runs that nothing happened to."""

import json
import os
import random
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lit_rlhf.callbacks.checkpoints import written
from lit_rlhf.preemption import PREEMPTED
from tests.faults import injection
from tests.faults.comparison import compare
from tests.faults.injection import PLACES, Places, run_command
from tests.faults.tasks import command, is_meant, is_offline, is_several


@dataclass
class Row:
    """A line of the table: what was done to one algorithm, and what came of it."""

    algorithm: str
    fault: str
    injected: int = 0
    resumed: int = 0
    bits: int = 0
    rows: int = 0


@dataclass
class Ended:
    code: int  # the exit code; minus the signal for a process that was killed
    text: str  # what it printed
    seconds: float


class Campaign:
    """The faults of one algorithm, one after another, in runs that are restarted until they are complete.

    Args:
        folder: where everything goes.
        algorithm: a member of conf/algorithm, or one of ``tasks.joins``.
        encoder: a model for ``algorithm=reward_model`` to start from.
        rng: chooses the moments.
    """

    def __init__(self, folder: Path, algorithm: str, encoder: Path, rng: random.Random) -> None:
        self.folder, self.algorithm, self.encoder, self.rng = folder / algorithm, algorithm, encoder, rng
        self.folder.mkdir(parents=True)
        self.rows: dict[str, Row] = {}
        self.problems: list[str] = []
        self.pending: list[str] = []  # faults of the run in `cut` that is not compared yet
        ended = self.start("whole")
        if ended.code:
            raise RuntimeError(f"the undisturbed run of {algorithm} failed:\n{ended.text}")
        self.counts = json.loads((self.folder / "counts.json").read_text())
        self.seconds = ended.seconds
        if not is_meant(algorithm, self.folder / "whole"):
            self.problems.append(f"{algorithm}: nothing of what it is about happened in the undisturbed run")

    def start(
        self, run: str, place: str | None = None, number: int = 0, strike: Callable[[], None] = injection.kill,
        after: float | None = None,
    ) -> Ended:  # fmt: skip
        """Runs the command in a process of its own, to its end or to a fault's."""
        folder, counts = self.folder / run, self.folder / "counts.json"
        arguments = command(self.algorithm, folder, self.encoder)
        began = time.monotonic()
        out, into = os.pipe()
        if (child := os.fork()) == 0:
            os.setsid()
            os.chdir(self.folder)
            if strike is kill_one:
                os.environ["STRIKE"] = str(number)
            run_command(arguments, Places(folder, place, number, strike), counts, into)
        os.close(into)
        if after is not None:
            time.sleep(after)
            os.killpg(child, signal.SIGKILL)  # with the processes that it started
        with open(out, errors="replace") as printed:
            text = printed.read()
        return Ended(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text, time.monotonic() - began)

    def inject(self, fault: str) -> None:
        """Lets one fault happen in the run ``cut``, from wherever that is; begins a new one if that is complete."""
        for attempt in range(8):
            strike, places = {**FAULTS, **FAULTS_OF_SEVERAL}[fault]
            place = self.rng.choice([p for p in places if self.counts.get(p)] or ["update"])
            # A run that was begun before has less to do: look for an early moment if none was reached.
            passed = PHASES if fault == KILL_ONE else self.counts.get(place, 0)
            number = self.rng.randint(1, max(1, passed // (attempt + 1)))
            if fault in DAMAGES:  # late, when there are two checkpoints
                self.finish(self.start("cut"))
                number = self.counts[place] - number // 3
            if fault == "kill at any moment":
                ended = self.start("cut", after=self.rng.uniform(0.2, self.seconds))
            else:
                ended = self.start("cut", place, number, strike)
            if self.has_happened(fault, place, number, ended):
                row = self.rows.setdefault(fault, Row(self.algorithm, fault))
                row.injected += 1
                self.pending.append(fault)
                if fault in DAMAGES:
                    self.damage(fault)
                return
            self.finish(ended)
        self.problems.append(f"{self.algorithm}: no moment was found for '{fault}'")

    def has_happened(self, fault: str, place: str, number: int, ended: Ended) -> bool:
        if fault == KILL_ONE:
            return ended.code == 1 and "process 1 of 2 ended early" in ended.text
        expected = {"disk full": 1, "SIGTERM": PREEMPTED, "SIGUSR1": PREEMPTED}.get(fault, -signal.SIGKILL)
        if ended.code == expected:
            if fault == "disk full" and "cannot be written" not in ended.text:
                self.problems.append(f"{self.algorithm}, {fault}: no clear message:\n{ended.text[-2000:]}")
            return fault not in DAMAGES or len(written(self.folder / "cut" / "checkpoints")) > 1
        if ended.code != 0:
            self.problems.append(f"{self.algorithm}, {fault} at {place} {number}: ended with {ended.code}:\n"
                                 f"{ended.text[-3000:]}")  # fmt: skip
        return False

    def damage(self, fault: str) -> None:
        """Cuts or changes the newest checkpoint; the next run must say so and take the one before."""
        newest = written(self.folder / "cut" / "checkpoints")[0]
        content = bytearray(newest.read_bytes())
        if fault == "newest cut short":
            newest.write_bytes(content[: self.rng.randrange(len(content))])
        else:
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
            newest.write_bytes(content)
        self.finish(self.start("cut"), named=newest.name)

    def finish(self, ended: Ended, named: str = "") -> None:
        """Continues the run until it is complete, compares it, and makes room for a new one."""
        for _ in range(3):
            if named and named not in ended.text:
                self.problems.append(f"{self.algorithm}: no warning names {named}:\n{ended.text[-2000:]}")
            named = ""
            if ended.code == 0:
                break
            ended = self.start("cut")
        if ended.code != 0:
            self.problems.append(f"{self.algorithm} after {self.pending}: ended with {ended.code}:\n"
                                 f"{ended.text[-3000:]}")  # fmt: skip
        elif self.pending:
            difference = compare(self.folder / "whole", self.folder / "cut")
            if difference.where:
                places = ", ".join(difference.where[:6])
                self.problems.append(f"{self.algorithm} after {', '.join(self.pending)}: {places}")
            for fault in self.pending:
                self.rows[fault].resumed += 1
                self.rows[fault].bits += difference.bits
                self.rows[fault].rows += difference.rows
        self.pending = []
        shutil.rmtree(self.folder / "cut", ignore_errors=True)


def kill_one() -> None:
    """Stands for what ``parts.Struck`` does in a process that the run has started."""


_WORK = ("rollout", "scoring", "update")
KILL_ONE = "kill one of two"
PHASES = 40  # and steps, that a process of a run of two passes at least
#: name -> (what is done, the places where it may be done)
FAULTS: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "kill at any moment": (injection.kill, ("update",)),
    **{f"kill in {place}": (injection.kill, (place,)) for place in PLACES},
    "newest cut short": (injection.kill, _WORK),
    "a bit flipped": (injection.kill, _WORK),
    "disk full": (injection.fill_disk, ("checkpoint",)),
    "SIGTERM": (injection.terminate, _WORK),
    "SIGUSR1": (injection.preempt, _WORK),
}
DAMAGES = ("newest cut short", "a bit flipped")
#: Those of a run in several processes, where only what comes from outside can be told where to strike.
FAULTS_OF_SEVERAL = {"kill at any moment": FAULTS["kill at any moment"], KILL_ONE: (kill_one, ("phases",))}
KILLS = [KILL_ONE, *(name for name in FAULTS if name.startswith("kill"))]


def plan(algorithms: list[str], faults: int, rng: random.Random) -> dict[str, list[str]]:
    """``faults`` for every algorithm, each kind as often as any other that the algorithm can have."""
    chosen: dict[str, list[str]] = defaultdict(list)
    queue: list[str] = []
    for algorithm in algorithms:
        if is_several(algorithm):
            kinds = list(FAULTS_OF_SEVERAL)
            chosen[algorithm] = [kinds[number % len(kinds)] for number in range(faults)]
            continue
        cannot = {"kill in rollout", "kill in scoring"} if is_offline(algorithm) else set()
        while len(chosen[algorithm]) < faults:
            possible = [name for name in queue if name not in cannot]
            if not possible:
                queue += rng.sample(list(FAULTS), len(FAULTS))
                continue
            queue.remove(possible[0])
            chosen[algorithm].append(possible[0])
    return chosen


def run_campaign(
    folder: Path, algorithms: list[str], faults: int, seed: int, encoder: Path, tell: Callable[[str], None]
) -> tuple[list[Row], list[str]]:
    """The rows of the table, and what went wrong."""
    rng = random.Random(seed)
    rows, problems = [], []
    for algorithm, chosen in plan(algorithms, faults, rng).items():
        began = time.monotonic()
        campaign = Campaign(folder, algorithm, encoder, rng)
        for fault in chosen:
            campaign.inject(fault)
        campaign.finish(campaign.start("cut"))
        rows += campaign.rows.values()
        problems += campaign.problems
        tell(f"{algorithm}: {len(chosen)} faults in {time.monotonic() - began:.0f} s")
        for problem in campaign.problems:
            tell(f"PROBLEM {problem}")
        if not campaign.problems:
            shutil.rmtree(campaign.folder)
    return rows, problems
