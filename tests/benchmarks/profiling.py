"""Where our time goes: the stages of an iteration, beside their arithmetic floor, and the operators that take most."""

import statistics
from collections.abc import Iterator
from typing import Any

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
            replies = [ours.ask("iterate")["stages"] for _ in range(1 + plan.rounds)][1:]
            floor = ours.ask("floor")
            yield f"## {name}\n\n{_stages(replies, floor)}\n\n{_besides(floor)}\n\n{_operators(ours)}\n"


def _stages(replies: list[dict[str, float]], floor: dict[str, Any]) -> str:
    floors = {stage: found["seconds"] for stage, found in floor["stages"].items()} | {"iteration": floor["seconds"]}
    lines = ["| stage | seconds | floor | GFLOP |", "|---|---|---|---|"]
    for stage in STAGES:
        middle = statistics.median(reply.get(f"time/{stage}", 0.0) for reply in replies)
        gflop = floor["gflop"] if stage == "iteration" else floor["stages"].get(stage, {}).get("gflop", 0.0)
        lines.append(f"| {stage} | {middle:.3f} | {floors.get(stage, 0.0):.3f} | {gflop:.0f} |")
    return "\n".join(lines)


def _besides(floor: dict[str, Any]) -> str:
    lines = ["| update and anchors, besides products | seconds alone |", "|---|---|"]
    lines += [f"| {name} | {seconds:.3f} |" for name, seconds in floor["besides"].items()]
    return "\n".join([*lines, f"| together | {sum(floor['besides'].values()):.3f} |"])


def _operators(ours: Contender) -> str:
    reply = ours.ask("profile")
    lines = [f"| operator, in {reply['seconds']:.2f} s | calls | seconds by itself |", "|---|---|---|"]
    for kind in ("operators", "operators_by_shape"):
        lines += [f"| `{o['name']}` | {o['calls']} | {o['seconds']:.3f} |" for o in reply[kind]]
    return "\n".join(lines)
