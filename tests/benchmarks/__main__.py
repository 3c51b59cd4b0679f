"""Speed and memory against the peers, side by side on this machine: one table.

    python -m tests.benchmarks                           everything; installs the peers into the cache
    python -m tests.benchmarks W2 W3 --rounds 9          some of it
    python -m tests.benchmarks --toy --rounds 1          shows that everything works, in minutes
    python -m tests.benchmarks W2 W3 --profile           where our time goes: stages and operators of one iteration

Both sides of a comparison are processes that live side by side and do an iteration in turns, A B A B, so that whatever
slows the machine down slows both. A first iteration of each does not count. The table shows medians with quartiles,
and ratios with the quartiles of the rounds' own. Memory is each process's largest resident size over its life. Every
side's generated tokens are counted, and must be as many as the work asks for. "Of the limit" is the share of our time
that the iteration's matrix products would take alone, measured in the same process, see ``floor.py``.

W1  PPO of SmolLM2-135M, all weights, fp32 on both sides, a critic and a reward model of the policy's size
W2  the same, each library at its own defaults for precision, critic and attention
W3  the same with LoRA, rank 16 on all linear layers; TRL's critic still trains all of its weights
W4  rollouts alone against ``generate``: prompts of 8 to 128 tokens, most completions short, some of 256
W5  GRPO against TRL 1.16, 2 prompts with 8 completions each
growth, start, sweeps: how time and memory grow; how soon a command is there; jobs in parallel
"""

import argparse
import json
import sys
from pathlib import Path

from tests.benchmarks.commands import start, sweeps
from tests.benchmarks.profiling import profile
from tests.benchmarks.table import markdown, to_json
from tests.benchmarks.works import TRAINING, WORKS, Plan

ALL = {**WORKS, "start": start, "sweeps": sweeps}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("works", nargs="*", help=f"some of {', '.join(ALL)}; all by default")
    parser.add_argument("--rounds", type=int, default=5, help="iterations of each side that count")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on each side")
    parser.add_argument("--json", type=Path, default=Path("outputs/benchmarks.json"), help="where all numbers go")
    parser.add_argument("--toy", action="store_true", help="at sizes that only show that everything works")
    parser.add_argument("--ours-only", action="store_true", help="without the peers")
    parser.add_argument("--profile", action="store_true", help="profile our side of W1, W2, W3 or W5 instead")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    if unknown := sorted(set(options.works) - set(ALL)):
        parser.error(f"there is no {unknown[0]}, but {', '.join(ALL)}")
    plan = Plan(rounds=options.rounds, threads=options.threads, toy=options.toy, peers=not options.ours_only)
    if options.profile:
        if unknown := sorted(set(options.works) - set(TRAINING)):
            parser.error(f"{unknown[0]} is no training; --profile takes {', '.join(TRAINING)}")
        for part in profile(plan, options.works or ["W2", "W3"]):
            print(part, flush=True)
        return
    rows = []
    for name in options.works or ALL:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += ALL[name](plan)
        # After each: what is measured is kept if a later one fails.
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(to_json(rows, plan), indent=1) + "\n")
    print(markdown(rows))
    print(f"\n{options.json}")


if __name__ == "__main__":
    main()
