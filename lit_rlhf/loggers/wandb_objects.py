"""What W&B gets besides rows of numbers: tables, plots, and artifacts that say where a policy came from."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import wandb
import yaml

from lit_rlhf.run_folder import finite

#: In a run folder: how the artifact of its model is called, its digest, and whether it holds files or references.
_MODEL_NOTE = Path("wandb", "model.json")
_HASHED = 2**30  # bytes of a data file; of a larger one the place alone says which it is


def samples_table(rows: Sequence[Mapping[str, Any]]) -> wandb.Table:
    """Completions, dicts as in samples.jsonl, with a column for every component."""
    plain = ["iteration", "split", "prompt", "completion", "score", "kl", "length"]
    nested = [(kind, name) for kind in ("components", "gold") for name in rows[0].get(kind, {})]
    return wandb.Table(
        columns=[*plain, *(f"{kind}/{name}" for kind, name in nested)],
        data=[
            [
                *(finite(row.get(name)) for name in plain),
                *(finite(row.get(kind, {}).get(name)) for kind, name in nested),
            ]
            for row in rows
        ],
    )


def distributions(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """A histogram of each, and a scatter plot of ``scores`` against ``kl``; what is not finite is left out."""
    kept = {name: [x for x in numbers if math.isfinite(x)] for name, numbers in values.items()}
    logged: dict[str, Any] = {f"distribution/{name}": wandb.Histogram(x) for name, x in kept.items() if x}
    points = [[x, y] for x, y in zip(values["kl"], values["scores"], strict=True) if math.isfinite(x + y)]
    table = wandb.Table(columns=["kl", "score"], data=points)
    return {**logged, "kl_reward": wandb.plot.scatter(table, "kl", "score", title="score against KL, by completion")}


def input_artifacts(config: Mapping[str, Any]) -> Iterator[wandb.Artifact]:
    """What a run with this resolved config reads: its data (configuration, files) and the models of other runs."""
    data = config.get("data")
    if isinstance(data, Mapping) and "_target_" in data:
        artifact = wandb.Artifact(data["_target_"].rpartition(".")[2], "dataset", metadata=dict(data))
        with artifact.new_file("data.yaml") as file:
            yaml.safe_dump(dict(data), file, sort_keys=False)
        for number, path in enumerate(_files(data)):
            artifact.add_reference(path.as_uri(), f"{number}/{path.name}", checksum=path.stat().st_size <= _HASHED)
        yield artifact
    for folder in sorted(_model_folders(config)):
        note = json.loads((folder.parent / _MODEL_NOTE).read_text())
        artifact = _model_artifact(folder, note["name"], files=note["files"])
        # Another digest: the folder was filled anew by a run without W&B.
        if artifact.digest == note["digest"]:
            yield artifact


def output_artifact(folder: Path, name: str, *, files: bool) -> wandb.Artifact:
    """The exported model of a run: its files, or references to them. Runs that read the folder later use the same."""
    artifact = _model_artifact(folder, name, files=files)
    note = folder.parent / _MODEL_NOTE
    note.parent.mkdir(exist_ok=True)
    note.write_text(json.dumps({"name": name, "files": files, "digest": artifact.digest}) + "\n")
    return artifact


def _model_artifact(folder: Path, name: str, *, files: bool) -> wandb.Artifact:
    # The same in every run: W&B joins a run's output to another's input by the name and the hash of the contents.
    artifact = wandb.Artifact(name, "model", metadata={"folder": str(folder)})
    if not files:
        artifact.add_reference(folder.as_uri())  # reads the weights once, for their hash
        return artifact
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        artifact.add_file(str(file), name=str(file.relative_to(folder)), policy="immutable")  # makes no copy
    return artifact


def _files(data: Mapping[str, Any]) -> list[Path]:
    """The files that a configuration's paths name, themselves, by a pattern, or by their folder; the first thousand."""
    named = [
        text for key, value in data.items() if str(key).endswith(("path", "paths", "file")) for text in _texts(value)
    ]
    found = (Path(match).absolute() for text in named for match in glob(text))
    inside = (path for match in found for path in ([match] if match.is_file() else match.rglob("*")))
    return sorted(set(islice((path for path in inside if path.is_file()), 1000)))


def _model_folders(config: Any) -> set[Path]:
    """Every folder in a configuration that is the exported model of a run that W&B knows."""
    named = {Path(text).absolute() for text in _texts(config) if Path(text).name == "model"}
    return {folder for folder in named if folder.is_dir() and (folder.parent / _MODEL_NOTE).is_file()}


def _texts(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        config = list(config.values())
    if isinstance(config, list | tuple):
        for item in config:
            yield from _texts(item)
    elif isinstance(config, str):
        yield config
