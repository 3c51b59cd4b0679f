"""The tiny run of every algorithm, as a command line."""

from pathlib import Path

import yaml

from lit_rlhf.config import CONFIG_DIR

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


def is_offline(algorithm: str) -> bool:
    """Whether an algorithm learns from fixed data."""
    defaults = yaml.safe_load((CONFIG_DIR / "algorithm" / f"{algorithm}.yaml").read_text())["defaults"]
    based = [d.removeprefix("/algorithm/") for d in defaults if isinstance(d, str) and d in algorithms()]
    return {"override /callbacks": "offline"} in defaults or any(map(is_offline, based))


def algorithms() -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / "algorithm").glob("*.yaml"))


def command(algorithm: str, folder: Path, encoder: Path) -> list[str]:
    """The arguments of ``lit-rlhf`` that train in ``folder``, and continue there."""
    kind = _OFFLINE if is_offline(algorithm) else _ONLINE
    shared = [f"algorithm.model_path={encoder}", *_SHARED[3:]] if algorithm == "reward_model" else _SHARED
    own = _OWN.get(algorithm, [])
    return ["train", f"algorithm={algorithm}", *shared, *kind, *own, f"paths.output_dir={folder}", "ckpt_path=auto"]
