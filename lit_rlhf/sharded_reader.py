"""Sharded checkpoints read without running what may be in them.

PyTorch's reader takes the folder's ``.metadata`` through ``pickle.load``, and everything in the shards that is no
tensor through ``torch.load(weights_only=False)``: either can run any code. Here the first may name only what describes
tensors, and the second only what ``weights_only=True`` lets pass.
"""

import collections
import io
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, ReadItem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from lit_rlhf.errors import UserError

#: What the metadata of a sharded checkpoint is made of.
_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_NAMES = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},  # where it was written to
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return _NAMES[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype | torch.memory_format):
            return found
        # A dotted name could lead from a module to what it imports.
        if module in _MODULES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def load_shards(states: dict[str, Any], path: Path, *, whole: bool = False) -> None:
    """Fills ``states`` from a sharded checkpoint's folder: what is in them, in all processes together.

    With ``whole``, which is for one process alone, they are filled with all that the folder holds.

    Raises:
        UserError: the folder is damaged, or has more in it than tensors and plain values.
    """
    reader = _Reader(path)
    reader.read_metadata()  # else what it says is wrapped
    try:
        if whole:
            _load_state_dict(states, storage_reader=reader, planner=_WholePlanner(), no_dist=True)
        else:
            checkpoint.load(states, storage_reader=reader, planner=_Planner())
    except CheckpointException as error:
        reason = str(next(iter(error.failures.values()))[0]).partition("\n")[0]
        raise UserError(f"the sharded checkpoint {path} cannot be read: {reason}") from error


class _Reader(FileSystemReader):
    def read_metadata(self, *_: Any, **kwargs: Any) -> Metadata:
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        try:
            with open(path, "rb") as file:
                metadata = _Unpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError(f"it is a {type(metadata).__name__}")
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(f"{path} cannot be read as the metadata of a checkpoint: {error}") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        super().load_bytes(read_item, _checked(value))


class _WholePlanner(_EmptyStateDictLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        super().load_bytes(read_item, _checked(value))


def _checked(stream: io.BytesIO) -> io.BytesIO:
    """A stream of ``torch.save`` that is known to be safe, for a base class that loads it again."""
    safe = io.BytesIO()
    torch.save(torch.load(stream, weights_only=True), safe)
    safe.seek(0)
    return safe
