"""``python -m tests.faults``: prints the table; the exit code is 1 if anything was lost."""

import os

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", OMP_NUM_THREADS="1")  # a fork takes no threads along

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/, for its helpers


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--algorithms", nargs="+", default=None, help="or joins such as grpo+guard; default: all")
    parser.add_argument("--faults", type=int, default=5, help="for each algorithm")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults and moments")
    options = parser.parse_args()

    import torch
    from classifiers import save_classifier
    from command_line import write_ratings

    import lit_rlhf.report_charts
    import lit_rlhf.train  # noqa: F401
    from tests.faults.campaign import KILLS, run_campaign
    from tests.faults.tasks import algorithms, joins

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIT_RLHF_CACHE"] = f"{folder}/cache"
        write_ratings(Path(folder) / "cache", 120)
        save_classifier(Path(folder) / "encoder")
        rows, problems = run_campaign(
            Path(folder), options.algorithms or [*algorithms(), *joins()], options.faults, options.seed,
            Path(folder) / "encoder",
            lambda line: print(line, flush=True),
        )  # fmt: skip
    heads = ("algorithm", "fault", "injected", "resumed", "bits different", "rows lost")
    print(f"\n{heads[0]:18}{heads[1]:22}" + "".join(f"{head:>16}" for head in heads[2:]))
    totals = [sum(getattr(row, name) for row in rows) for name in ("injected", "resumed", "bits", "rows")]
    for row in rows:
        print(f"{row.algorithm:18}{row.fault:22}{row.injected:16}{row.resumed:16}{row.bits:16}{row.rows:16}")
    print(f"{'all':18}{'':22}" + "".join(f"{total:16}" for total in totals))
    kills = sum(row.injected for row in rows if row.fault in KILLS)
    print(f"\n{kills} kills, {totals[0] - kills} other faults, {len(problems)} problems")
    return int(bool(problems) or totals[0] != totals[1] or any(totals[2:]))


if __name__ == "__main__":
    sys.exit(main())
