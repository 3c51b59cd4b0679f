"""Held-out prompts through a finished run: ``lit-rlhf eval run=<folder>``."""

import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lit_rlhf.config import command, refuse_unknown
from lit_rlhf.distributed import whole_checkpoint
from lit_rlhf.errors import UserError
from lit_rlhf.run_folder import CONFIG, SAMPLES, replace_file
from lit_rlhf.train import build, read_checkpoint

log = logging.getLogger(__name__)


def evaluate(config: DictConfig) -> dict[str, float]:
    """Completes the run's held-out prompts with its policy and measures reward, gold score, KL and length.

    The metrics go to ``evaluation.json`` and the completions to ``samples.jsonl`` in this command's own output folder.

    Raises:
        UserError: the folder holds no online run or no such checkpoint, or the data has no held-out prompts.
    """
    refuse_unknown(config, {"task_name", "run", "checkpoint", "overrides", "paths"})
    folder, output = Path(config.run), Path(config.paths.output_dir).absolute()
    stored = _run_config(folder)
    checkpoint = None if config.checkpoint is None else folder / "checkpoints" / f"{config.checkpoint}.ckpt"
    if checkpoint is not None and not checkpoint.exists():
        raise UserError(f"checkpoint={config.checkpoint}: {checkpoint} does not exist")
    stored.paths.output_dir = str(output)
    stored.logger, stored.callbacks = None, {"samples": {"_target_": "lit_rlhf.callbacks.Samples"}}
    stored.trainer.enable_checkpointing = False
    stored.trainer.update({"devices": 1, "num_nodes": 1, "strategy": "auto"})  # of a run in several processes, too
    for part, node in config.overrides.items():
        if isinstance(node, DictConfig) and "_target_" in node:
            stored.pop(part, None)  # of another class: the keys of the run's own would go to a class that has none such
    merged = OmegaConf.merge(stored, config.overrides)
    run = build(merged)
    if not run.algorithm.online:
        raise UserError(f"run={folder} is a {stored.task_name} run; eval takes one that completes prompts, such as PPO")
    output.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None:
        read_checkpoint(checkpoint)  # refuses what is no checkpoint
    with whole_checkpoint(checkpoint) as path:
        run.trainer.validate(run.algorithm, datamodule=run.datamodule, ckpt_path=path, verbose=False)
    metrics = {name: value for name, value in run.algorithm.last_row.items() if name.startswith("val/")}
    if not metrics:
        raise UserError(f"the data of run={folder} has no held-out prompts: its val_dataloader is empty")
    replace_file(output / "evaluation.json", json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    for name, value in sorted(metrics.items()):
        log.info("%-32s %10.4f", name.removeprefix("val/"), value)
    log.info("completions: %s", output / SAMPLES)
    return metrics


def _run_config(folder: Path) -> DictConfig:
    try:
        stored: Any = OmegaConf.load(folder / CONFIG)
    except FileNotFoundError:
        raise UserError(f"run={folder} is no run folder: it has no {CONFIG}") from None
    except Exception as error:  # of YAML or OmegaConf
        raise UserError(f"{folder / CONFIG} cannot be read: {' '.join(str(error).split())}") from error
    if missing := {"algorithm", "data", "trainer", "paths", "seed"} - set(stored):
        raise UserError(f"{folder / CONFIG} is not the config of a run: it has no '{min(missing)}'")
    stored.pop("precision_used", None)
    return stored


@command("eval")
def main(config: DictConfig) -> None:
    evaluate(config)


if __name__ == "__main__":
    main()
