"""How long commands take, started as a user starts them: until the help is there, until the first update, a sweep."""

import statistics
import subprocess
import sys
import tempfile
import time

from tests.benchmarks.host import environment
from tests.benchmarks.works import Plan, Row, Target

#: Random policy, sums as prompts, nothing to download, nothing sent anywhere.
TINY = ("experiment=tiny", "logger=csv")
#: Exit code of a run that ``first_update.Stop`` ended.
FIRST_UPDATE = 77


def timed(plan: Plan, *arguments: str, code: int = 0) -> float:
    """Seconds of ``lit-rlhf ARGUMENTS`` in a folder of its own.

    Raises:
        RuntimeError: it did not exit with ``code``; with the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="lit_rlhf_benchmark_") as folder:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "lit_rlhf", *arguments], cwd=folder, env=environment(plan.threads),
            capture_output=True, text=True,
        )  # fmt: skip
        elapsed = time.perf_counter() - start
    if done.returncode != code:
        raise RuntimeError(f"lit-rlhf {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return elapsed


def start(plan: Plan) -> list[Row]:
    """From the command's start: files are in the system's cache, because a first run does not count."""
    first = ("train", *TINY, "+callbacks.first._target_=tests.benchmarks.first_update.Stop")
    works = (("lit-rlhf --help", ("--help",), 0, 1.0), ("tiny train to its first update", first, FIRST_UPDATE, 8.0))
    rows = []
    for work, arguments, code, bound in works:
        found = [timed(plan, *arguments, code=code) for _ in range(1 + plan.rounds)][1:]
        target = Target(name="seconds", value=statistics.median(found), bound=bound, at_least=False)
        rows.append(Row(work=work, ours=found, targets=[target]))
    return rows


def sweeps(plan: Plan) -> list[Row]:
    """Eight tiny jobs, two at a time, against one after the other."""
    jobs = ("train", "-m", *TINY, f"seed=range(0,{2 if plan.toy else 8})")
    if plan.toy:
        jobs += ("trainer.max_epochs=1",)
    serial, parallel = [], []
    for _ in range(plan.rounds):
        serial.append(timed(plan, *jobs))
        parallel.append(timed(plan, *jobs, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"))
    share = statistics.median(parallel) / statistics.median(serial)
    return [
        Row(
            work="8 tiny jobs, joblib with n_jobs=2 against serial",
            ours=parallel,
            peer=serial,
            targets=[Target(name="of serial", value=share, bound=0.6, at_least=False)],
        )
    ]
