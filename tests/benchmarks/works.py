"""What is measured, and the targets: each work gives the rows of the table that are its result."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tests.benchmarks.host import Side, interleave
from tests.benchmarks.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a benchmark is run.

    Attributes:
        rounds: iterations of each side that count.
        threads: of torch, on each side.
        toy: at sizes that only show that everything works.
        peers: run the peers, too.
    """

    rounds: int = 5
    threads: int = 2
    toy: bool = False
    peers: bool = True

    def sized(self, settings: Settings) -> Settings:
        """``settings`` at this plan's size."""
        settings = replace(settings, threads=self.threads)
        if not self.toy:
            return settings
        return replace(
            settings, model="tiny", completions=4, group=min(2, settings.group), prompt_length=8, response_length=6,
            epochs=1, minibatch=2,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound of a number, and what the number is."""

    name: str
    value: float
    bound: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@dataclass(kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        work: what was done.
        ours, peer: seconds of each round, in order; a row without a peer has none.
        targets: what is to be reached.
        memory: peak resident memory in GB, ours and the peer's.
        details: whatever else was measured, for the JSON.
    """

    work: str
    ours: list[float]
    peer: list[float] = field(default_factory=list)
    limit: float | None = None  # fraction of the arithmetic floor
    targets: list[Target] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.peer) / statistics.median(self.ours) if self.peer else None

    @property
    def ratios(self) -> list[float]:
        """Of the peer's and our iteration in each round."""
        return [peer / own for own, peer in zip(self.ours, self.peer, strict=False)]


#: The works that are iterations of an algorithm, all of SmolLM2-135M.
TRAINING = {
    "W1": Settings(precision="32-true", separate_critic=True),
    "W2": Settings(),
    "W3": Settings(lora=True),
    "W5": Settings(work="grpo", group=8, prompt_length=64, epochs=1, accumulate=2),
}


def seconds(replies: Sequence[dict[str, Any]]) -> list[float]:
    """Of the iterations that count: the first one only warms up."""
    return [reply["seconds"] for reply in replies[1:]]


def peak(replies: Sequence[dict[str, Any]]) -> float:
    """The largest resident memory of a side's process over its whole life, in GB."""
    return replies[-1]["peak_gb"]


def compare(
    plan: Plan,
    work: str,
    settings: Settings,
    *,
    peers: dict[str, Side],
    ratio: float,
    floor: float | None = None,
    memory: float | None = None,
) -> list[Row]:
    """Ours against each of ``peers`` on ``settings``, in turns; ``ratio``, ``floor`` and ``memory`` are the targets."""
    sides = [Side(program=f"ours.{settings.work}", settings=settings), *(peers.values() if plan.peers else ())]
    sides = [replace(side, settings=plan.sized(side.settings)) for side in sides]
    with_floor = settings.work != "rollout"
    own, *others = interleave(sides, plan.rounds, extra="floor" if with_floor else None)
    details: dict[str, Any] = {"settings": vars(sides[0].settings), "rounds": own}
    limit = None
    if with_floor:
        details["floor"] = own.pop()
        limit = details["floor"]["seconds"] / statistics.median(seconds(own))
    if not others:
        return [Row(work=work, ours=seconds(own), limit=limit, memory=[peak(own)], details=details)]
    rows = []
    for name, theirs in zip(peers, others, strict=True):
        row = Row(
            work=f"{work} against {name}", ours=seconds(own), peer=seconds(theirs), limit=limit,
            memory=[peak(own), peak(theirs)], details={**details, "peer_rounds": theirs},
        )  # fmt: skip
        row.targets.append(Target(name="ratio", value=row.ratio, bound=ratio))
        if floor is not None:
            row.targets.append(Target(name="of the limit", value=limit, bound=floor))
        if memory is not None:
            share = row.memory[0] / row.memory[1]
            row.targets.append(Target(name="memory", value=share, bound=memory, at_least=False))
        rows.append(row)
    return rows


def training(name: str, work: str, **targets: float) -> Callable[[Plan], list[Row]]:
    """The comparison of ``TRAINING[name]`` with TRL's trainer of the same algorithm."""

    def run(plan: Plan) -> list[Row]:
        settings = TRAINING[name]
        peers = {f"TRL {settings.work.upper()}": Side(program=f"trl.{settings.work}", settings=settings)}
        return compare(plan, f"{name} {work}", settings, peers=peers, **targets)

    return run


def rollouts(plan: Plan) -> list[Row]:
    """Prompts of 8 to 128 tokens, completions of 2 to 256: most are short, two or more run to the limit."""
    rows = []
    for model, completions in (("tiny", 64),) if plan.toy else (("tiny", 64), ("smollm2", 32)):
        settings = Settings(
            work="rollout", model=model, completions=completions, prompt_length=128, response_length=256
        )
        peers = {
            f"generate, {dtype}": Side(program="transformers.generate", settings=replace(settings, dtype=dtype))
            for dtype in ("float32", "bfloat16")
        }
        rows += compare(plan, f"W4 rollouts, {model}", settings, peers=peers, ratio=3.0)
    return rows


def growth(plan: Plan) -> list[Row]:
    """Time per token from few to many prompts, time from short to long responses, the update's memory."""
    base = plan.sized(Settings(update_memory=True))
    counts, lengths = ((4, 8), (4, 8)) if plan.toy else ((8, 64, 256), (16, 64, 256))
    short = replace(base, completions=counts[0])

    def run(settings: Settings) -> tuple[list[float], float]:
        (own,) = interleave([Side(program="ours.ppo", settings=settings)], plan.rounds)
        return seconds(own), own[0]["update_peak_gb"]

    by_count = {n: run(replace(base, completions=n)) for n in counts}
    by_length = {n: run(replace(short, response_length=n)) for n in lengths}
    first, last = counts[0], counts[-1]
    per_token = {n: [s / (n * base.response_length) for s in found] for n, (found, _) in by_count.items()}
    slower = statistics.median(per_token[last]) / statistics.median(per_token[first])
    updates = [by_count[n][1] for n in (last, first)]
    longer = statistics.median(by_length[lengths[-1]][0]) / statistics.median(by_length[lengths[0]][0])
    beyond = longer / (lengths[-1] / lengths[0])
    return [
        Row(
            work=f"time per token, {last} prompts against {first}",
            ours=per_token[last],
            peer=per_token[first],
            targets=[Target(name="growth", value=slower, bound=1.2, at_least=False)],
            details={"seconds_per_token": per_token},
        ),
        Row(
            work=f"response length {lengths[-1]} against {lengths[0]}",
            ours=by_length[lengths[-1]][0],
            peer=by_length[lengths[0]][0],
            targets=[Target(name="of linear", value=beyond, bound=1.3, at_least=False)],
            details={"seconds": {n: found for n, (found, _) in by_length.items()}},
        ),
        Row(
            work=f"memory of the update, {last} prompts against {first}",
            ours=[],
            memory=updates,
            # Their experience is a few megabytes.
            targets=[Target(name="growth", value=updates[0] / updates[1], bound=1.05, at_least=False)],
            details={"update_peak_gb": {n: memory for n, (_, memory) in by_count.items()}},
        ),
    ]


WORKS: dict[str, Callable[[Plan], list[Row]]] = {
    "W1": training("W1", "PPO, fp32, separate critic", ratio=1.5, memory=0.8),
    "W2": training("W2", "PPO, own defaults", ratio=3.3, floor=0.8, memory=0.45),
    "W3": training("W3", "PPO, LoRA", ratio=3.5),
    "W4": rollouts,
    "W5": training("W5", "GRPO, 2 prompts x 8", ratio=2.0),
    "growth": growth,
}
