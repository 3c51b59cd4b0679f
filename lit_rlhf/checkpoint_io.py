"""How checkpoints reach the disk."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy


class FileCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a file beside its place, which is then renamed: a reader sees the old one or the new one.

    Lightning's own first puts the whole file together in memory, as much again as weights and optimiser state, and then
    takes it through the system's temporary folder, from where it reaches another file system by a copy that a kill can
    cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path) or storage_options is not None:  # no file of this machine
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")  # what a kill leaves, the next checkpoint overwrites
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)


def write_to_files(strategy: Strategy) -> None:
    """Makes a trainer's strategy write checkpoints so, unless the user has chosen another way."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = FileCheckpointIO()
