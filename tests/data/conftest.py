"""A cache of its own for every test, and the means to fill it without a network."""

import dataclasses
import hashlib
import statistics
from pathlib import Path

import datasets
import pytest
from fake_artefacts import STEMS

from lit_rlhf.models import sources


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LIT_RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty working folder, and elsewhere an empty cache."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "work"


@pytest.fixture
def no_index(monkeypatch):
    """pip finds nothing, whatever this machine's pip is configured to search."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip searches instead of an index; use it with `no_index`."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def write_ratings(cache):
    """Writes a domain's two files in the source's format: rows of (id, text, scores)."""

    def write(rows: list[tuple[str, str, list[int]]], domain: str = "movies") -> Path:
        folder = cache / "human_ratings"
        folder.mkdir(parents=True, exist_ok=True)
        truth = [f"{key}\t{statistics.fmean(scores)}\t{text}" for key, text, scores in rows]
        ratings = [f"{key}\t{statistics.fmean(scores)}\t0.5\t{scores}" for key, _, scores in rows]
        (folder / f"{STEMS[domain]}_GroundTruth.txt").write_bytes("\r\n".join(truth).encode())
        (folder / f"{STEMS[domain]}_anonDataRatings.txt").write_bytes("\r\n".join(ratings).encode())
        return folder

    return write


@pytest.fixture
def pin(monkeypatch):
    """Pins a local file as the artefact of that name."""

    def pin_file(name: str, path: Path) -> None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        artefact = dataclasses.replace(sources.ARTEFACTS[name], sha256=digest, size=path.stat().st_size)
        monkeypatch.setitem(sources.ARTEFACTS, name, artefact)

    return pin_file
