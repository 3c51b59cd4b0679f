"""How checkpoints reach the disk, and how it is found out whether one is still what was written.

A checkpoint is written to a name beside its place, brought to the disk, and then renamed. Its SHA-256 stands beside it
in ``<name>.sha256``, in the format of ``sha256sum -c``; a sharded checkpoint, a folder, has a line for every file. A
kill between two steps leaves a whole checkpoint or none.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from lit_rlhf.errors import UserError
from lit_rlhf.run_folder import sync, writing

SUMS = ".sha256"  # follows the checkpoint's name
UNFINISHED = ".tmp"  # follows the name while it is written; what a kill leaves there is overwritten or removed


class FileCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint, with its checksum, to a file beside its place, which is then renamed.

    A reader sees the old one or the new one. Lightning's own first puts the whole file together in memory, as much
    again as weights and optimiser state, and then takes it through the system's temporary folder, from where it
    reaches another file system by a copy that a kill can cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Raises UserError where it cannot be written; what was there before stays."""
        if "://" in str(path) or storage_options is not None:  # no file of this machine
            return super().save_checkpoint(checkpoint, path, storage_options)
        with written_to(Path(path)) as temporary, open(temporary, "wb") as file:
            summing = _Summing(file)
            torch.save(checkpoint, summing)
            summing.flush()
            os.fsync(file.fileno())
            place(temporary, Path(path), {".": summing.sum.hexdigest()})

    def remove_checkpoint(self, path: str | Path) -> None:
        if "://" in str(path):
            return super().remove_checkpoint(path)
        remove(Path(path))


class _Summing:
    """A file that is written once from its beginning to its end, and the hash of what was written."""

    def __init__(self, file: Any) -> None:
        self.file, self.sum = file, hashlib.sha256()

    def write(self, part: Any) -> int:
        self.sum.update(part)
        return self.file.write(part)

    def flush(self) -> None:
        self.file.flush()


def write_to_files(strategy: Strategy) -> None:
    """Makes a trainer's strategy write checkpoints so, unless the user has chosen another way."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = FileCheckpointIO()


@contextmanager
def written_to(path: Path) -> Iterator[Path]:
    """Where to write the checkpoint ``path`` to before it is placed; removed if that fails.

    Raises:
        UserError: the disk is full, or something else keeps it from being written.
    """
    temporary = path.with_name(path.name + UNFINISHED)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
    except BaseException:
        _delete(temporary)
        raise


def place(temporary: Path, path: Path, sums: dict[str, str]) -> None:
    """Puts a checkpoint that is on the disk in its place, with the SHA-256 of its files ("." is the file itself)."""
    listed = path.with_name(path.name + SUMS)
    names = {file: path.name if file == "." else f"{path.name}/{file}" for file in sums}
    lines = "".join(f"{sums[file]}  {name}\n" for file, name in sorted(names.items()))
    unfinished = listed.with_name(listed.name + UNFINISHED)
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
    _delete(listed)  # before the checkpoint that it belongs to goes: whole and unlisted is better than
    if path.is_dir() and not path.is_symlink():  # a whole one that looks damaged
        shutil.rmtree(path)
    os.replace(temporary, path)
    os.replace(unfinished, listed)
    sync(path.parent)


def folder_sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in ``folder``, each brought to the disk."""
    sums = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            sync(file)
            sums[str(file.relative_to(folder))] = _sum(file)
    sync(folder)
    return sums


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's bytes; None if they are those that were written, or nothing says which were."""
    path = Path(os.path.realpath(path))  # last.ckpt and best.ckpt are links; Path's own raises where they go in circles
    if not os.path.lexists(path):
        return f"{path.name} is missing"
    listed = path.with_name(path.name + SUMS)
    for place in (path, listed):
        # Of a pipe or a device, reading might never end.
        if os.path.lexists(place) and not (place.is_file() or (place.is_dir() and place == path)):
            return f"{place.name} is no file"
    try:
        lines = listed.read_text().splitlines() if listed.exists() else []
        if listed.exists() and not any(line.strip() for line in lines):
            return f"{listed.name} is empty"
        for line in lines:
            expected, _, name = line.partition("  ")
            file = path.parent / name
            if not file.is_file():
                return f"{name} is missing"
            if (found := _sum(file)) != expected:
                return f"the SHA-256 of {name} is {found[:12]}, but {listed.name} says {expected[:12]}"
    except (OSError, UnicodeDecodeError) as error:
        return str(error)
    return None


def remove(path: Path) -> None:
    """Removes a checkpoint and its checksum."""
    _delete(path)  # first: a checksum without a checkpoint is nothing
    _delete(path.with_name(path.name + SUMS))


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        # Renamed first, for a kill would leave half a folder under the name of a whole one.
        gone = path if path.name.endswith(UNFINISHED) else path.with_name(path.name + UNFINISHED)
        if gone != path:
            shutil.rmtree(gone, ignore_errors=True)
            os.replace(path, gone)
        shutil.rmtree(gone)
    else:
        path.unlink(missing_ok=True)


def _sum(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def require_undamaged(path: Path) -> None:
    """Raises UserError if a checkpoint is not what was written."""
    if found := damage(path):
        raise UserError(f"{path} cannot be read as a checkpoint: {found}")
