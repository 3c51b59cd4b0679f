"""The command line inside this process, and small things for it to work on."""

import contextlib
import io
import logging
import os
import runpy
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from hydra._internal.hydra import Hydra

from lit_rlhf import cli
from lit_rlhf.models.sources import RATING_KINDS, RATING_STEMS

ROOT = Path(__file__).parents[1]
#: A PPO run of seconds; what a test leaves alone.
TINY = [
    "policy=tiny", "policy.hidden_size=16", "policy.intermediate_size=16", "policy.max_position_embeddings=64",
    "data=list", "data.prompts=[A film that,The plot]", "data.batch_size=2", "sampler.max_new_tokens=4",
    "algorithm.rollout_batch_size=4", "algorithm.minibatch_size=2", "algorithm.ppo_epochs=1",
    "trainer.precision=32-true", "trainer.accelerator=cpu", "trainer.max_epochs=1", "logger=csv",
]  # fmt: skip


@dataclass
class Result:
    code: int
    out: str
    err: str


def run_here(*arguments: str | Path, module: str | None = None) -> Result:
    """``lit-rlhf ARGUMENTS`` in this process: the same entry point, without the seconds of importing torch.

    With ``module``, as ``python -m MODULE ARGUMENTS``. Hydra composes every config twice, the first time only to see
    whether it sets ``hydra.mode``; none of conf/ does (``test_no_config_sets_hydras_mode``), so here it does so once.
    """
    no_mode = patch.object(Hydra, "get_mode", lambda *_, **__: None)
    out, err = io.StringIO(), io.StringIO()
    root, old_argv, precision = logging.getLogger(), sys.argv, torch.get_float32_matmul_precision()
    own = logging.getLogger("lit_rlhf")
    handlers, level, own_level = root.handlers[:], root.level, own.level
    sys.argv = ["lit-rlhf", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(), no_mode:
            if module is None:
                cli.main()
            else:
                warnings.simplefilter("ignore", RuntimeWarning)  # that the module was imported before
                runpy.run_module(module, run_name="__main__")
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            err.write(stop.code)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = old_argv
        root.handlers, root.level = handlers, level  # Hydra's would keep writing to `out`
        own.setLevel(own_level)  # which `estimate` raises
        torch.set_float32_matmul_precision(precision)
    return Result(code, out.getvalue(), err.getvalue())


def environment(**changes: str | Path) -> dict[str, str]:
    """For a real subprocess, which must find the package from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in changes.items()}}


def write_module(folder: Path, name: str, text: str) -> None:
    """A module of the user's, for PYTHONPATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(text)


def write_ratings(cache: Path, count: int = 60) -> None:
    """Made-up rated snippets of every domain in the source's format: half of them liked, half disliked by all."""
    folder = cache / "human_ratings"
    folder.mkdir(parents=True, exist_ok=True)
    for domain, stem in RATING_STEMS.items():
        truth, ratings = [], []
        for i in range(count):
            scores = [3, 3, 4, 2] if i % 2 else [-3, -3, -4, -2]
            mean = sum(scores) / 4
            text = f"{domain} snippet number {i} is a {'fine' if i % 2 else 'dull'} thing to see"
            truth.append(f"{i}\t{mean}\t{text}")
            ratings.append(f"{i}\t{mean}\t0.5\t{scores}")
        for kind, lines in zip(RATING_KINDS, (truth, ratings), strict=True):
            (folder / f"{stem}_{kind}.txt").write_bytes("\r\n".join(lines).encode())
