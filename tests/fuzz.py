"""Fuzzing of what reads outside text, for as long as it is given.

    python -m tests.fuzz                       all targets, a minute each
    python -m tests.fuzz chat data_file --seconds 600

With atheris (``pip install atheris``) the inputs are steered by what code they reach; without it they are drawn by
hypothesis. A finding is shown with its input and makes the exit status 1; it belongs into ``tests/test_fuzz.py`` as a
plain example, and mended. The targets are in ``tests/fuzz_targets.py``.
"""

import argparse
import logging
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # as under pytest


def drawn(name: str, seconds: float) -> int:
    """Tries inputs that hypothesis draws; returns how many."""
    from fuzz_targets import TARGETS
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from test_fuzz import INPUTS

    tried, end = 0, time.monotonic() + seconds

    @settings(
        max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @given(data=INPUTS)
    def once(data: bytes) -> None:
        nonlocal tried
        tried += 1
        if time.monotonic() < end:
            TARGETS[name](data)

    number = 0
    while time.monotonic() < end:
        number += 1
        seed(number)(once)()
    return tried


def steered(name: str, seconds: float) -> None:
    """Tries inputs that atheris makes; does not return."""
    import atheris

    readers = ["data", "overrides", "config", "config_types", "chat", "run_folder", "rewards", "errors", "report_text"]
    with atheris.instrument_imports(include=[f"lit_rlhf.{name}" for name in readers]):
        from fuzz_targets import TARGETS
    from test_fuzz import GOOD

    corpus = Path(tempfile.mkdtemp())
    for number, text in enumerate(GOOD):
        (corpus / str(number)).write_bytes(text)
    options = [f"-max_total_time={seconds:.0f}", "-timeout=20", "-rss_limit_mb=4096", f"-artifact_prefix={corpus}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[name])
    atheris.Fuzz()


def fuzz(name: str, seconds: float) -> None:
    """One target, in a process of its own."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        import atheris  # noqa: F401
    except ImportError:
        try:
            print(f"{name}: {drawn(name, seconds)} inputs, no finding", flush=True)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
    else:
        steered(name, seconds)


def main() -> None:
    from fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(TARGETS):
        parser.error(f"there is no target {min(unknown)}; choose from {', '.join(TARGETS)}")
    found = []
    for name in arguments.targets:
        process = multiprocessing.get_context("spawn").Process(target=fuzz, args=(name, arguments.seconds))
        process.start()
        process.join()
        if process.exitcode:
            found.append(name)
    print(f"findings in: {', '.join(found)}" if found else "no finding")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
