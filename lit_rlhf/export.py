"""A run's model to give away: ``lit-rlhf export`` makes a Hugging Face folder with a model card, or uploads one."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel

from lit_rlhf.checks import check_bool, check_text
from lit_rlhf.config import command, read_config, refuse_unknown
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.policies import ENDING, load_policy
from lit_rlhf.metrics import AXES
from lit_rlhf.models.sources import HUB_IDS
from lit_rlhf.quiet import quiet
from lit_rlhf.report_text import number, settings_line
from lit_rlhf.run_folder import CONFIG, EVALUATION, read_metrics, replace_file, writing

_KEYS = [
    "task_name", "run", "output", "checkpoint", "adapter", "base_model", "license", "evaluation", "push_to_hub",
    "private", "paths",
]  # fmt: skip
#: Of the models that have short names.
_LICENSES = {"smollm2": "apache-2.0", "minilm": "apache-2.0"}
#: Parts of a config that say nothing of the model, but of the machine that it was trained on.
_PLACES = ("paths", "logger", "callbacks", "ckpt_path")
#: Parts of a config with a line of their own in a card.
_PARTS = {
    "algorithm": "Algorithm", "reward": "Reward", "gold": "Gold score", "kl": "KL to the reference", "data": "Data",
}  # fmt: skip


def export(
    run: Path,
    output: Path,
    *,
    checkpoint: str | None = None,
    adapter: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    evaluation: Path | None = None,
    for_others: bool = False,
) -> Path:
    """Makes the folder ``output`` of a finished run's model, with a model card as ``README.md``; returns it.

    ``for_others`` says that it leaves this machine.

    Raises:
        UserError: there is no such run, checkpoint or evaluation, the folder is there already, or an adapter is asked
            for that the run does not have, that names no base model, or whose base model others do not have.
    """
    config = _config(run)
    if output.exists():
        raise UserError(f"output={output} exists; choose another folder")
    started = base_of(config)
    base = base_model or started
    if adapter or checkpoint is not None:
        name = checkpoint or "last"
        path = run / "checkpoints" / f"{name}{ENDING}"
        if not path.exists():
            raise UserError(f"checkpoint={name}: {path} does not exist")
        policy = load_policy(str(path))
        if adapter and not isinstance(policy.model, PeftModel):
            raise UserError(f"adapter=true: {run} has no adapter, it trained all weights")
        if adapter and base is None:
            raise UserError("adapter=true needs base_model=<name or folder>: the run's policy was made at random")
        if adapter:
            path = config["policy"]["path"]
            where = base_model or HUB_IDS.get(path, path)
            if for_others and Path(where).exists():
                raise UserError(
                    f"push_to_hub: the adapter belongs on {where}, which is on this machine alone; push that model and "
                    "name it by base_model=<hub name>, or push the merged model by adapter=false"
                )
        with writing(output):
            if adapter:
                policy.model.peft_config["default"].base_model_name_or_path = where
                policy.model.save_pretrained(output, save_embedding_layers=False)
                policy.tokenizer.save_pretrained(output)
            else:
                policy.save(output)
    else:
        if not (run / "model").is_dir():
            raise UserError(f"{run} has no model yet; checkpoint=last exports its newest checkpoint")
        with writing(output):
            shutil.copytree(run / "model", output)
    found = _evaluation(evaluation) if evaluation is not None else {}
    text = model_card(
        config, read_metrics(run), name=output.absolute().name, base=base, adapter=adapter,
        license=license or _LICENSES.get(str(_first(config)), None), evaluation=found,
    )  # fmt: skip
    replace_file(output / "README.md", text)
    return output


def _config(run: Path) -> dict[str, Any]:
    return OmegaConf.to_container(read_config(run))


def _evaluation(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"evaluation={folder}: {EVALUATION} cannot be read: {error}") from None


def _first(config: Mapping[str, Any]) -> str | None:
    """What a model was first made from: runs start from the models of other runs."""
    name = (config.get("policy") or {}).get("path") or (config.get("algorithm") or {}).get("model_path")
    seen = set()
    while name is not None and name not in seen and (Path(name).parent / CONFIG).is_file():
        seen.add(name)
        before = _config(Path(name).parent)
        name = (before.get("policy") or {}).get("path") or before["algorithm"].get("model_path")
    return name


def base_of(config: Mapping[str, Any]) -> str | None:
    """The name of the model that a run, or the first of those before it, started from; None if it was random."""
    name = _first(config)
    return HUB_IDS.get(name, name)


def model_card(
    config: Mapping[str, Any],
    rows: list[dict[str, float]],
    *,
    name: str,
    base: str | None,
    adapter: bool,
    license: str | None,
    evaluation: Mapping[str, Any],
) -> str:
    """A model card of the hub: what the model is, how it was trained, and its numbers on held-out data.

    Args:
        config: the run's.
        rows: its metrics.
        name: of the model.
        base: the model that it was made from.
        adapter: whether the folder holds an adapter alone.
        license: an identifier of the hub.
        evaluation: what ``lit-rlhf eval`` found; may be empty.
    """
    kind = str(config["algorithm"]["_target_"]).rpartition(".")[2]
    scores = "policy" not in config  # a reward model
    head = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if scores else "text-generation",
        "tags": ["lit_rlhf", "rlhf", kind.lower()],
        **({"base_model": base} if base and not Path(base).is_absolute() else {}),
        **({"license": license} if license else {}),
    }
    what = "A reward model" if scores else "An adapter (LoRA)" if adapter else "A language model"
    config = {key: _without_places(value) for key, value in config.items() if key not in _PLACES}
    settings = [
        f"- **{title}**: {_code(settings_line(config[part]))}" for part, title in _PARTS.items() if config.get(part)
    ]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {name}",
        f"{what} trained by {kind} with lit_rlhf{f' from {_code(_without_places(base))}' if base else ''}.",
        "\n".join(settings),
        _usage(name, scores=scores, adapter=adapter),
        "\n".join(["## On held-out data", "", *(_measured(evaluation) or _validated(rows))]),
        f"## Configuration\n\n{_block('yaml', yaml.safe_dump(config, sort_keys=False, allow_unicode=True))}",
    ]
    return "\n\n".join(parts) + "\n"


def _without_places(value: Any) -> Any:
    """A config without the folders of the machine: of an absolute path the end stays."""
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~")) and Path(value).name:
        return "/".join(["...", *Path(value).parts[-3:]]) if len(Path(value).parts) > 4 else value
    return value


def _usage(name: str, *, scores: bool, adapter: bool) -> str:
    if adapter:
        loader = "AutoPeftModelForCausalLM"
        lines = [f"from peft import {loader}", f'model = {loader}.from_pretrained("{name}")']
    else:
        task = "text-classification" if scores else "text-generation"
        more = ', function_to_apply="none"' if scores else ""
        lines = ["from transformers import pipeline", f'pipeline("{task}", model="{name}")("A film that"{more})']
    return _block("python", "\n".join(lines) + "\n")


def _validated(rows: list[dict[str, float]]) -> list[str]:
    """The first and last validation of the run."""
    held_out = [row for row in rows if any(key.startswith("val/") for key in row)]
    if not held_out:
        return ["It was not measured on held-out data."]
    first, last = held_out[0], held_out[-1]
    names = [key for key in last if key.startswith("val/") and key.removeprefix("val/") not in AXES]
    lines = ["| metric | before | after |", "|---|---|---|"]
    for key in names:
        lines.append(f"| {_code(key.removeprefix('val/'))} | {number(first.get(key))} | {number(last[key])} |")
    return lines


def _measured(evaluation: Mapping[str, Any]) -> list[str]:
    """An evaluation's numbers with their 95 % intervals."""
    policies = evaluation.get("policies", {})
    columns = [(name, key) for name, by_key in policies.items() for key in by_key]
    if not columns:
        return []
    metrics = dict.fromkeys(metric for name, key in columns for metric in policies[name][key])
    lines = [
        f"{evaluation['prompts']} prompts, completions of each: {evaluation['samples_per_prompt']}; 95 % intervals in "
        "brackets.",
        "",
        "| metric | " + " | ".join(f"{name}, temperature {key}" for name, key in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for metric in metrics:
        cells = [_cell(policies[name][key].get(metric)) for name, key in columns]
        lines.append(f"| {_code(metric)} | " + " | ".join(cells) + " |")
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, Mapping) and value["low"] is None:  # of a single prompt
        return number(value["value"])
    if isinstance(value, Mapping):
        return f"{number(value['value'])} ({number(value['low'])} to {number(value['high'])})"
    return "" if value is None else number(value)


def _block(language: str, text: str) -> str:
    """Text as a block of code, which nothing in it can end."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text}{fence}"


def _code(text: str) -> str:
    """Text as code in Markdown, whatever is in it, also in a table."""
    return "`" + " ".join(text.replace("`", "'").replace("|", "/").split()) + "`"


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads a folder to a repository of the hub, which is made if need be; returns its address.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Upload by lit-rlhf export")
    except Exception as error:  # of the hub, or of the HTTP client that the installed huggingface_hub has
        raise UserError(f"push_to_hub={repository}: {(str(error).splitlines() or [repr(error)])[0]}") from error
    return str(address)


@command("export")
def main(config: DictConfig) -> None:
    quiet()
    refuse_unknown(config, _KEYS)
    names = {key: check_text(key, config[key]) for key in ("run", "output")}
    optional = ("checkpoint", "base_model", "license", "evaluation", "push_to_hub")
    names |= {key: None if config[key] is None else check_text(key, config[key]) for key in optional}
    private = check_bool("private", config.private)
    folder = export(
        Path(names["run"]),
        Path(names["output"]),
        checkpoint=names["checkpoint"],
        adapter=check_bool("adapter", config.adapter),
        base_model=names["base_model"],
        license=names["license"],
        evaluation=None if names["evaluation"] is None else Path(names["evaluation"]),
        for_others=names["push_to_hub"] is not None,
    )
    print(folder)
    if names["push_to_hub"] is not None:
        print(push(folder, names["push_to_hub"], private=private))


if __name__ == "__main__":
    main()
