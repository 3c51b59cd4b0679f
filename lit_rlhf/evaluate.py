"""What a policy is worth on held-out prompts: ``lit-rlhf eval run=<folder>`` or ``policy=... data=... reward=...``."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lit_rlhf.checks import check_int, check_number
from lit_rlhf.config import command, refuse_unknown
from lit_rlhf.distributed import whole_checkpoint
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation import DistinctN, EmptyRate, PassAtK, RefusalRate, SelfBLEU, WinRate, bootstrap
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.reference import make_reference
from lit_rlhf.pipeline import compose_stage
from lit_rlhf.run_folder import CONFIG, SAMPLES, finite, replace_file
from lit_rlhf.train import Run, build, read_checkpoint

log = logging.getLogger(__name__)

EVALUATION = "evaluation.json"
#: Parts of a config that can be chosen here.
_PARTS = ("policy", "data", "reward", "gold", "sampler")
#: Of a validation's metrics those that are no mean of a completion's own number; they have no interval.
_PLAIN = ("rollout/eos_rate", "rollout/truncated_rate", "objective/kl_per_token", "objective/entropy")

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Contestant:
    """A policy that is measured.

    Attributes:
        name: in tables and files.
        config: of a run whose policy it is, with the data, rewards and sampler of all.
        checkpoint: whose weights it has; None: those that the run starts from.
        has_reference: whether there is something that its KL can be measured to.
    """

    name: str
    config: DictConfig
    checkpoint: Path | None
    has_reference: bool


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Completes held-out prompts with a policy, and with those that it is compared with, at several temperatures.

    All get the same prompts and random numbers. ``evaluation.json`` in the command's output folder holds, by policy and
    temperature, every component of the reward and of the gold score, KL, length, diversity and rates of empty, refusing
    and right completions, with 95 % intervals bootstrapped over prompts; and the shares of prompts on which the policy
    is preferred to each other one by the reward and by every gold score, also at equal length. All completions are in
    ``samples.jsonl``.

    Returns:
        What is in ``evaluation.json``.

    Raises:
        UserError: the folder holds no online run or no such checkpoint, the data has no held-out prompts, or a value is
            out of its range.
    """
    own = {"task_name", "run", "checkpoint", "reference", "against", "temperatures", "samples_per_prompt", "overrides"}
    refuse_unknown(config, {*own, *_PARTS, "paths"})
    samples = check_int("samples_per_prompt", config.samples_per_prompt, at_least=1)
    for key in ("against", "temperatures"):
        if not isinstance(config[key], ListConfig):
            raise UserError(f"{key}={config[key]} must be a list, such as {key}='[one, two]'")
    temperatures = [check_number("temperatures", t, at_least=0) for t in config.temperatures] or [None]
    if len(set(temperatures)) < len(temperatures):
        raise UserError(f"temperatures={list(config.temperatures)} names one twice")
    output = Path(config.paths.output_dir).absolute()
    if (output / CONFIG).exists():
        raise UserError(f"paths.output_dir={output} holds a run, whose files an evaluation would change")
    measured: dict[str, dict[str, Rows]] = {}
    policies: dict[str, dict[str, Any]] = {}
    for contestant in contestants(config, output):
        run = build(contestant.config)
        if not run.algorithm.online:
            name = contestant.config.task_name
            raise UserError(f"run={config.run} is a {name} run; eval takes one that completes prompts, such as PPO")
        if config.reference is not None and contestant.has_reference:
            run.algorithm.reference = make_reference(Policy.from_pretrained(path=config.reference))
        _repeat(run.datamodule, samples)
        measured[contestant.name], policies[contestant.name] = {}, {}
        for number, temperature in enumerate(temperatures):
            if temperature is not None:
                run.algorithm.sampler.temperature = temperature
            key = f"{run.algorithm.sampler.temperature:g}"
            rows, metrics = complete(run, None if number else contestant.checkpoint)
            if len(rows) % samples:
                raise UserError("samples_per_prompt: the data gives other held-out prompts when it is asked again")
            measured[contestant.name][key] = rows
            policies[contestant.name][key] = summarize(rows, metrics, samples, contestant.has_reference)
    (first, *others) = measured
    result = {
        "prompts": len(next(iter(measured[first].values()))) // samples,
        "samples_per_prompt": samples,
        "policies": policies,
        "win_rates": {
            other: {key: win_rates(rows, measured[other][key]) for key, rows in measured[first].items()}
            for other in others
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / EVALUATION, json.dumps(finite(result), indent=2) + "\n")
    lines = [
        {"policy": name, "temperature": float(key), **{k: v for k, v in row.items() if k not in ("iteration", "split")}}
        for name, by_key in measured.items() for key, rows in by_key.items() for row in rows
    ]  # fmt: skip
    text = "".join(json.dumps(finite(line), ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    replace_file(output / SAMPLES, text)
    return result


# ---- who is measured ------------------------------------------------------------------------------------------------


def contestants(config: DictConfig, output: Path) -> list[Contestant]:
    """The policy, and those that it is compared with."""
    base = _base(config)
    base.paths.output_dir = str(output)
    base.logger, base.callbacks = None, None
    base.trainer.update({"enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 1.0})
    base.trainer.update({"devices": 1, "num_nodes": 1, "strategy": "auto"})  # of a run in several processes, too
    for part, node in config.overrides.items():
        if isinstance(node, DictConfig) and "_target_" in node:
            base.pop(part, None)  # of another class: the keys of the run's own would go to a class that has none such
    base = OmegaConf.merge(base, config.overrides)
    checkpoint = None
    if config.run is not None and config.checkpoint is not None and not config.get("policy"):
        checkpoint = Path(config.run) / "checkpoints" / f"{config.checkpoint}.ckpt"
        if not checkpoint.exists():
            raise UserError(f"checkpoint={config.checkpoint}: {checkpoint} does not exist")
        read_checkpoint(checkpoint)  # refuses what is no checkpoint
    reference, own = config.reference is not None, config.run is not None and not config.get("policy")
    found = [Contestant("policy", base, checkpoint, reference or own)]
    if reference:
        found.append(Contestant("reference", _of(base, str(config.reference)), None, False))
    elif checkpoint is not None:
        found.append(Contestant("reference", base, None, False))
    for other in map(str, config.against):
        if other in [contestant.name for contestant in found]:
            raise UserError(f"against={list(config.against)} names {other} twice")
        found.append(Contestant(other, _of(base, other), None, False))
    return found


def _base(config: DictConfig) -> DictConfig:
    """The config of a run with the chosen parts in the places of its own."""
    given = {part: config[part] for part in _PARTS if config.get(part)}
    if config.run is not None:
        base = _run_config(Path(config.run))
    else:
        if missing := [part for part in ("policy", "data", "reward") if part not in given]:
            raise UserError(
                f"eval needs a run=<folder>, or else a policy, data and a reward, such as policy=smollm2 "
                f"data=human_ratings_prompts reward=vader; there is no {missing[0]}"
            )
        base = compose_stage(["algorithm=reinforce"])  # it has no critic
    OmegaConf.set_struct(base, False)
    for part, node in given.items():
        base[part] = node
    return base


def _of(base: DictConfig, policy: str) -> DictConfig:
    """``base`` with the policy of a run folder or a model: what it exported, or what is found by that name."""
    path = Path(policy) / "model" if (Path(policy) / CONFIG).exists() else policy
    config = base.copy()
    config.policy = {"_target_": "lit_rlhf.models.Policy.from_pretrained", "path": str(path)}
    return config


def _run_config(folder: Path) -> DictConfig:
    try:
        stored: Any = OmegaConf.load(folder / CONFIG)
    except FileNotFoundError:
        raise UserError(f"run={folder} is no run folder: it has no {CONFIG}") from None
    except Exception as error:  # of YAML or OmegaConf
        raise UserError(f"{folder / CONFIG} cannot be read: {' '.join(str(error).split())}") from error
    if missing := {"algorithm", "data", "trainer", "paths", "seed"} - set(stored):
        raise UserError(f"{folder / CONFIG} is not the config of a run: it has no '{min(missing)}'")
    stored.pop("precision_used", None)
    return stored


# ---- completions ----------------------------------------------------------------------------------------------------


class _Keep(L.Callback):
    """Keeps the rows of a validation."""

    def __init__(self) -> None:
        self.rows: Rows = []

    def on_samples(self, _trainer: Any, _module: Any, _iteration: int, rows: Rows) -> None:
        self.rows = rows


def complete(run: Run, checkpoint: Path | None) -> tuple[Rows, dict[str, float]]:
    """The rows and metrics of all held-out prompts, with the weights of ``checkpoint`` or those that there are."""
    keep = _Keep()
    run.trainer.callbacks.append(keep)
    with whole_checkpoint(checkpoint) as path:
        settings = {"ckpt_path": path, "weights_only": True, "verbose": False}
        run.trainer.validate(run.algorithm, datamodule=run.datamodule, **settings)
    run.trainer.callbacks.remove(keep)
    if not keep.rows:
        raise UserError("there are no held-out prompts: the data's val_dataloader is empty")
    names = run.algorithm.last_row.items()
    return keep.rows, {name.removeprefix("val/"): value for name, value in names if name.startswith("val/")}


def _repeat(datamodule: L.LightningDataModule, times: int) -> None:
    """Lets a datamodule give its held-out prompts several times over, which are then other episodes."""
    single = datamodule.val_dataloader

    def repeated() -> Any:
        loaders = single()
        return list(loaders if isinstance(loaders, list | tuple) else [loaders]) * times

    if times > 1:
        datamodule.val_dataloader = repeated


# ---- numbers --------------------------------------------------------------------------------------------------------


def summarize(rows: Rows, metrics: Mapping[str, float], samples: int, has_reference: bool) -> dict[str, Any]:
    """What there is to say about completions, the same prompts ``samples`` times over.

    Values with an interval are ``{"value": ..., "low": ..., "high": ...}``.
    """

    def interval(name: str, column: list[float]) -> None:
        found[name] = bootstrap(torch.tensor(column).reshape(samples, -1).mean(0))._asdict()

    found: dict[str, Any] = {}
    interval("objective/scores", [row["score"] for row in rows])
    for prefix, part in (("reward", "components"), ("gold", "gold")):
        for name in rows[0][part]:
            interval(f"{prefix}/{name}", [row[part][name] for row in rows])
    if has_reference:
        interval("objective/kl", [row["kl"] for row in rows])
    interval("rollout/response_length", [float(row["length"]) for row in rows])
    left_out = () if has_reference else ("objective/kl_per_token",)
    found |= {name: metrics[name] for name in _PLAIN if name in metrics and name not in left_out}
    texts = [row["completion"] for row in rows]
    of_texts = {f"text/distinct_{n}": DistinctN(n) for n in (1, 2, 3)}
    of_texts |= {"text/self_bleu": SelfBLEU(), "text/empty_rate": EmptyRate(), "text/refusal_rate": RefusalRate()}
    for name, metric in of_texts.items():
        metric.update(texts)
        found[name] = float(metric.compute())
    for name in rows[0]["components"]:
        right = torch.tensor([row["components"][name] for row in rows]).reshape(samples, -1).T
        if samples > 1 and set(right.flatten().tolist()) <= {0.0, 1.0}:  # as a verifier's
            for k in sorted({1, samples}):
                metric = PassAtK(k)
                metric.update(right)
                found[f"{name}/pass@{k}"] = float(metric.compute())
    return found


def win_rates(rows: Rows, others: Rows) -> dict[str, Any]:
    """How often completions are preferred to others of the same prompts, by the score and every gold score.

    Intervals are over completions: with several of a prompt they are too narrow where prompts differ much.
    """
    judges = {"score": [[row["score"] for row in side] for side in (rows, others)]}
    for name in rows[0]["gold"]:
        judges[f"gold/{name}"] = [[row["gold"][name] for row in side] for side in (rows, others)]
    lengths = [torch.tensor([row["length"] for row in side]) for side in (rows, others)]
    found = {}
    for name, (scores, other_scores) in judges.items():
        metric = WinRate()
        metric.update(torch.tensor(scores), torch.tensor(other_scores), *lengths)
        found[name] = {kind: interval._asdict() for kind, interval in metric.compute()._asdict().items()}
    return found


# ---- the table ------------------------------------------------------------------------------------------------------


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The numbers of an evaluation, a table for every temperature with a column for every policy."""
    names = list(result["policies"])
    for key in result["policies"][names[0]]:
        shown = Table(f"temperature {key}", *names)
        for column in shown.columns[1:]:
            column.justify = "right"
        summaries = [result["policies"][name][key] for name in names]
        for metric in dict.fromkeys(metric for summary in summaries for metric in summary):
            shown.add_row(metric, *(_shown(summary.get(metric)) for summary in summaries))
        shown.add_section()
        judges = dict.fromkeys(judge for by_key in result["win_rates"].values() for judge in by_key[key])
        for judge in judges:
            for kind, words in (("plain", ""), ("length_controlled", ", equal length")):
                rates = [result["win_rates"].get(name, {}).get(key, {}).get(judge, {}).get(kind) for name in names]
                shown.add_row(f"policy wins by {judge}{words}", *map(_shown, rates))
        yield shown


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['value']:.3f} ± {(value['high'] - value['low']) / 2:.3f}"
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


@command("eval")
def main(config: DictConfig) -> None:
    result = evaluate(config)
    print(f"{result['prompts']} prompts, completions of each: {result['samples_per_prompt']}; ± half a 95 % interval")
    for table in tables(result):
        Console().print(table)
    log.info("%s", Path(config.paths.output_dir).absolute() / EVALUATION)


if __name__ == "__main__":
    main()
