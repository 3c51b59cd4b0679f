"""The tiny run of every algorithm, as a command line."""

from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from lit_rlhf.config import CONFIG_DIR
from lit_rlhf.run_folder import read_metrics

_SHARED = [
    "policy=tiny", "policy.hidden_size=16", "policy.intermediate_size=16", "logger=csv", "trainer.accelerator=cpu",
    "trainer.precision=32-true", "callbacks.checkpoint.every_n_steps=3",
]  # fmt: skip
_ONLINE = ["experiment=tiny", "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2"]
_OFFLINE = [
    "data.batch_size=8", "trainer.limit_train_batches=8", "trainer.limit_val_batches=1", "trainer.max_epochs=2",
    "trainer.accumulate_grad_batches=2", "algorithm.log_every_n_steps=1", "algorithm.max_length=64",
]  # fmt: skip
#: What an algorithm's run has besides: every part that keeps something from one iteration to the next.
_OWN = {
    "ppo": [
        "kl=adaptive", "kl.target=0.1", "kl.horizon=500", "entropy=target", "critic=separate", "scheduler=linear",
        "algorithm.scores.normalize=true", "algorithm.ppo_epochs=2", "trainer.accumulate_grad_batches=2",
    ],
    "a2c": ["policy.lora={r: 4, lora_alpha: 8, target_modules: all-linear}"],
    "grpo": ["algorithm.target_kl=0.001"],
    "raft": ["algorithm.minibatch_size=8"],
}  # fmt: skip


def _above_0(column: str) -> Callable[[Path], bool]:
    return lambda run: any(row.get(column, 0) > 0 for row in read_metrics(run))


def _halved(run: Path) -> bool:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["lit_rlhf"]["halving"] == ["update"]


#: <algorithm>+<join> is that algorithm's run with more that can go wrong in it: the arguments, and whether it did.
JOINS: dict[str, tuple[str, list[str], Callable[[Path], bool]]] = {
    "guard": (
        "grpo", ["callbacks=kl_guard", "callbacks.kl_guard.max_kl=0.85", "optimizer.lr=0.03"],
        _above_0("kl_guard/rollbacks"),
    ),
    "wandb": (
        "ppo", ["logger=csv_wandb", "logger.wandb.mode=offline"], lambda run: any(run.glob("wandb/*run-*/*.wandb")),
    ),
    "reward": (
        "rloo", ["reward=none", "+reward._target_=tests.faults.parts.Flaky"], _above_0("rollout/skipped_batches"),
    ),
    "memory": ("grpo", ["+callbacks.tight._target_=tests.faults.parts.Tight", "+callbacks.tight.rows=16"], _halved),
    "two": (
        "ppo", ["trainer=ddp", "trainer.devices=2", "+callbacks.struck._target_=tests.faults.parts.Struck"],
        _above_0("time/gather"),
    ),
    "two_shards": (
        "grpo",
        ["trainer=fsdp2", "trainer.devices=2", "+callbacks.struck._target_=tests.faults.parts.Struck"],
        lambda run: (run / "checkpoints" / "last.ckpt").is_dir(),
    ),
}  # fmt: skip


def joins() -> list[str]:
    return [f"{algorithm}+{name}" for name, (algorithm, *_) in JOINS.items()]


def is_several(task: str) -> bool:
    """Whether a task's run has several processes."""
    return "+two" in task


def is_meant(task: str, run: Path) -> bool:
    """Whether what a join is about went wrong in a run of it."""
    return "+" not in task or JOINS[task.partition("+")[2]][2](run)


def is_offline(algorithm: str) -> bool:
    """Whether an algorithm learns from fixed data."""
    algorithm = algorithm.partition("+")[0]
    defaults = yaml.safe_load((CONFIG_DIR / "algorithm" / f"{algorithm}.yaml").read_text())["defaults"]
    based = [d.removeprefix("/algorithm/") for d in defaults if isinstance(d, str) and d in algorithms()]
    return {"override /callbacks": "offline"} in defaults or any(map(is_offline, based))


def algorithms() -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / "algorithm").glob("*.yaml"))


def command(algorithm: str, folder: Path, encoder: Path) -> list[str]:
    """The arguments of ``lit-rlhf`` that train in ``folder``, and continue there.

    ``algorithm`` is a member of conf/algorithm, or one of ``joins``.
    """
    algorithm, _, join = algorithm.partition("+")
    kind = _OFFLINE if is_offline(algorithm) else _ONLINE
    shared = [f"algorithm.model_path={encoder}", *_SHARED[3:]] if algorithm == "reward_model" else _SHARED
    own = [*_OWN.get(algorithm, []), *(JOINS[join][1] if join else [])]
    return ["train", f"algorithm={algorithm}", *shared, *kind, *own, f"paths.output_dir={folder}", "ckpt_path=auto"]
