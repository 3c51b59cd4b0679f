"""Where our time goes: the stages of an iteration, beside their arithmetic floor, and the operators that take most."""

import statistics
from collections.abc import Iterator

from tests.benchmarks.host import Contender, Side, contenders
from tests.benchmarks.works import TRAINING, Plan

#: Of the library's ``time/<stage>``.
STAGES = ("rollout", "score", "anchor", "advantage", "update", "iteration")


def profile(plan: Plan, names: list[str]) -> Iterator[str]:
    """Markdown tables of our side of the works ``names``, one after the other.

    The stages are medians of ``plan.rounds`` iterations; the operators are those of one more, under torch's profiler,
    which makes it slower.
    """
    for name in names:
        settings = plan.sized(TRAINING[name])
        with contenders([Side(program=f"ours.{settings.work}", settings=settings)]) as (ours,):
            yield f"## {name}\n\n{_stages(ours, plan.rounds)}\n\n{_operators(ours)}\n"


def _stages(ours: Contender, rounds: int) -> str:
    replies = [ours.ask("iterate")["stages"] for _ in range(1 + rounds)][1:]
    floor = ours.ask("floor")
    floors = {stage: found["seconds"] for stage, found in floor["stages"].items()} | {"iteration": floor["seconds"]}
    lines = ["| stage | seconds | floor | GFLOP |", "|---|---|---|---|"]
    for stage in STAGES:
        middle = statistics.median(reply.get(f"time/{stage}", 0.0) for reply in replies)
        gflop = floor["gflop"] if stage == "iteration" else floor["stages"].get(stage, {}).get("gflop", 0.0)
        lines.append(f"| {stage} | {middle:.3f} | {floors.get(stage, 0.0):.3f} | {gflop:.0f} |")
    return "\n".join(lines)


def _operators(ours: Contender) -> str:
    reply = ours.ask("profile")
    lines = [f"| operator, in {reply['seconds']:.2f} s | calls | seconds by itself |", "|---|---|---|"]
    for kind in ("operators", "operators_by_shape"):
        lines += [f"| `{o['name']}` | {o['calls']} | {o['seconds']:.3f} |" for o in reply[kind]]
    return "\n".join(lines)
