"""What a policy is worth on held-out data: ``lit-rlhf eval run=<folder>`` or ``policy=... data=... reward=...``."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from lit_rlhf.checks import check_int, check_number
from lit_rlhf.config import CONFIG_DIR, command, instantiate, read_config, refuse_unknown
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.bench import POLICY, REFERENCE, Bench, Measured, Subject, contestants, names_of, prefer
from lit_rlhf.evaluation.held_out import measure_pairs
from lit_rlhf.evaluation.policies import ENDING, exported, named_by, policy_config, require_policy, run_of
from lit_rlhf.evaluation.summary import Rows, differences, judged_rate, win_rates
from lit_rlhf.imports import find
from lit_rlhf.overrides import quote
from lit_rlhf.pipeline import compose_stage
from lit_rlhf.quiet import quiet
from lit_rlhf.rewards.scoring import freeze
from lit_rlhf.run_folder import CONFIG, EVALUATION, SAMPLES, finite, json_lines, replace_file, writing
from lit_rlhf.train import read_checkpoint

log = logging.getLogger(__name__)

#: Parts of a config that can be chosen here.
_PARTS = ("policy", "data", "reward", "gold", "sampler")
_OWN = (
    "task_name", "run", "checkpoint", "reference", "against", "temperatures", "samples_per_prompt", "verifiers", "text",
    "pairs", "judge", "overrides", "paths",
)  # fmt: skip


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Measures a policy, and those that it is compared with, one after another, by the same rewards on the same data.

    Three things, as far as there is data for them:

    - held-out prompts (``data``), completed at every temperature with the same random numbers by all policies: every
      component of the reward and of the gold score, KL, length, diversity, rates of empty, refusing and right
      completions; and the shares of prompts on which the policy is preferred to each other one by the reward, by every
      gold score and by a judge of pairs, also at equal length;
    - held-out texts (``text``): perplexity;
    - held-out pairs (``pairs``): accuracy and calibration of the rewards.

    Intervals are of 95 %, over prompts, texts or the texts of pairs. ``evaluation.json`` and ``report.html`` in the
    command's output folder hold all numbers, ``samples.jsonl`` all completions.

    Returns:
        What is in ``evaluation.json``.

    Raises:
        UserError: there is nothing to measure or nothing to measure it on, or a value is out of its range.
    """
    quiet()
    refuse_unknown(config, {*_OWN, *_PARTS})
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
    subject = find_subject(config, output)
    names = names_of(config, subject)
    for key, others in (("against", config.against), ("reference", [config.reference])):
        for name in others:
            if name is not None:
                with named_by(key):
                    require_policy(str(name))  # before others are measured for hours
    judge = instantiate(config.get("judge"), "judge")
    if judge is not None and (len(names) < 2 or "completions" not in subject.measures):
        raise UserError("judge: there are no two policies whose completions it could compare; name one in against")
    bench = Bench(subject, samples, temperatures, config)
    measured = Measured()
    for name, policy in contestants(config, subject, bench):
        bench.measure(name, policy, measured)
    result: dict[str, Any] = {"subject": describe(config)}
    measured = measured.in_order(names)
    own = measured.rows.get(POLICY, {})

    def compared(how: Callable[[Rows, Rows], Any]) -> dict[str, Any]:
        others = {name: rows for name, rows in measured.rows.items() if name != POLICY}
        return {name: {key: how(own[key], rows[key]) for key in own} for name, rows in others.items()}

    if own:
        result |= {
            "prompts": len(next(iter(own.values()))) // samples,
            "samples_per_prompt": samples,
            "policies": measured.policies,
            "win_rates": compared(lambda rows, other: win_rates(rows, other, samples)),
            "differences": compared(lambda rows, other: differences(rows, other, samples)),
        }
    if measured.perplexity:
        result["perplexity"] = measured.perplexity
    if "pairs" in subject.measures:
        result["pairs"] = measure_pairs(bench.judges, subject.config.pairs, bench.device)
    write(output, result, measured)
    if judge is not None:  # which may fail: what was measured is safe
        freeze(judge, bench.device)
        judged = compared(lambda rows, other: judged_rate(rows, other, samples, prefer(judge, rows, other)))
        for name, by_key in judged.items():
            for key, rate in by_key.items():
                result["win_rates"][name][key] |= rate
        write(output, result, measured)
    return result


def describe(config: DictConfig) -> dict[str, str]:
    """What the names of policies stand for, as far as the command says it."""
    policy = config.run or (config.checkpoint if _is_path(config.checkpoint) else "")
    if config.get("policy"):
        policy = config.policy.get("path", config.policy._target_)
    elif config.run is not None:
        policy += f", checkpoint {config.checkpoint}" if config.checkpoint is not None else ", before training"
    return {POLICY: str(policy), REFERENCE: str(config.reference or "what the policy started from")}


def write(output: Path, result: dict[str, Any], measured: Measured) -> None:
    """Leaves ``evaluation.json``, ``samples.jsonl`` and ``report.html`` behind."""
    from lit_rlhf.report_evaluation import build_evaluation  # here, because its plotting library is slow to import

    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    replace_file(output / EVALUATION, json.dumps(finite(result), indent=2) + "\n")
    lines = [
        {"policy": name, "temperature": float(key), **{k: v for k, v in row.items() if k not in ("iteration", "split")}}
        for name, by_key in measured.rows.items() for key, rows in by_key.items() for row in rows
    ]  # fmt: skip
    replace_file(output / SAMPLES, json_lines(lines))
    build_evaluation(output)


# ---- who is measured ------------------------------------------------------------------------------------------------


def find_subject(config: DictConfig, output: Path) -> Subject:
    """The policy that is evaluated, in the config of a run, with the chosen parts in the places of its own."""
    given = {part: config[part] for part in _PARTS if config.get(part)}
    stored, checkpoint = _stored(config), None
    online = stored is not None and find("algorithm._target_", stored.algorithm._target_).online
    held_out: dict[str, Any] = {}
    if online:
        base = stored
    else:
        base = compose_stage(["algorithm=reinforce"])  # which has no critic
        base.policy = base.data = base.reward = None
        if stored is not None:
            base.seed = stored.seed
            base.trainer.update({key: stored.trainer[key] for key in ("accelerator", "precision")})
        if config.run is not None:
            held_out = _take_offline(base, stored, config)
    if "policy" not in given and (online or (config.run is None and _is_path(config.checkpoint))):
        checkpoint = _checkpoint(config)
        if not online:
            base.policy = policy_config(checkpoint, read_checkpoint(checkpoint))
    OmegaConf.set_struct(base, False)
    for part, node in given.items():
        base[part] = node
    base.update({"paths": {"output_dir": str(output)}, "logger": None, "callbacks": None})
    base.update({name: config.get(name) or held_out.get(name) for name in ("text", "pairs")})
    base.trainer.update({"enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 1.0})
    base.trainer.update({"devices": 1, "num_nodes": 1, "strategy": "auto"})  # of a run in several processes, too
    overrides = config.overrides or {}
    for part, node in overrides.items():
        if isinstance(node, DictConfig) and "_target_" in node:
            base.pop(part, None)  # of another class: the keys of the run's own would go to a class that has none such
    base = OmegaConf.merge(base, overrides)
    own_reward = "reward" not in given and "_target_" not in (overrides.get("reward") or {})
    measures = {name for name in ("text", "pairs") if base.get(name)}
    if online or "data" in given or not measures:
        measures.add("completions")
    needed = {"completions": ("policy", "data", "reward"), "text": ("policy",), "pairs": ("reward",)}
    if "completions" in measures and not base.get("policy") and config.run is not None:
        raise UserError(
            f"run={config.run} is of a reward model, which writes nothing: name a policy's run, or leave out data= to "
            "measure the reward model on pairs"
        )
    for measure in sorted(measures):
        if missing := [part for part in needed[measure] if not base.get(part)]:
            raise UserError(
                f"eval needs a run=<folder>, or else a policy, data and a reward, such as policy=smollm2 "
                f"data=human_ratings_prompts reward=vader; a policy and data@text=..., or a reward and data@pairs=...; "
                f"there is no {missing[0]}"
            )
    started = bool(base.get("policy")) and "policy" not in given and (online or checkpoint is not None)
    return Subject(base, checkpoint, started, own_reward, frozenset(measures))


def _take_offline(base: DictConfig, stored: DictConfig, config: DictConfig) -> dict[str, Any]:
    """Puts the model of an offline run into ``base``: a policy, or a reward; says what it was validated on."""
    if config.checkpoint != "last":
        raise UserError(f"checkpoint={config.checkpoint}: of an offline run eval takes the model, or a path")
    model = str(exported(config.run))
    if "policy" in stored:
        base.policy = {"_target_": "lit_rlhf.models.Policy.from_pretrained", "path": model}
        return {"text": stored.data} if stored.algorithm._target_.endswith(".SFT") else {}
    base.reward = {"_target_": "lit_rlhf.rewards.ModelReward", "path": model, "on": stored.algorithm.get("on", "text")}
    return {"pairs": stored.data}


def _stored(config: DictConfig) -> DictConfig | None:
    """The config of the run that is named, or in whose folder the checkpoint lies that is named by its path."""
    folder = Path(config.run) if config.run is not None else None
    if folder is None and _is_path(config.checkpoint):
        folder = run_of(_checkpoint(config))
    if folder is None:
        return None
    stored = read_config(folder, needs=("algorithm", "data", "trainer", "paths", "seed"))
    stored.pop("precision_used", None)
    return stored


def _is_path(checkpoint: str | None) -> bool:
    return str(checkpoint).endswith(ENDING)


def _checkpoint(config: DictConfig) -> Path | None:
    """``checkpoint=``: a path, or a name in the run's folder; null is the start."""
    if config.checkpoint is None:
        return None
    name = str(config.checkpoint)
    path = Path(name) if _is_path(name) else Path(config.run) / "checkpoints" / f"{name}{ENDING}"
    if not path.exists():
        raise UserError(f"checkpoint={name}: {path} does not exist")
    return path


# ---- the command ----------------------------------------------------------------------------------------------------


@command("eval")
def _main(config: DictConfig) -> None:
    from lit_rlhf.report_evaluation import print_tables

    print_tables(evaluate(config))
    log.info("%s", Path(config.paths.output_dir).absolute() / EVALUATION)


def main() -> None:
    """Lets the policy be a path or a hub name: ``policy=<run folder>``, ``policy=<checkpoint>``, ``policy=<model>``."""
    sys.argv[1:] = [part for argument in sys.argv[1:] for part in _by_path(argument)]
    _main()


def _by_path(argument: str) -> list[str]:
    key, _, value = argument.partition("=")
    if key == "checkpoint" and value.endswith(ENDING):
        return [f"checkpoint={quote(value)}"]
    if key != "policy" or value == "null" or (CONFIG_DIR / "policy" / f"{value}.yaml").exists():
        return [argument]
    path = Path(value)
    if value.endswith(ENDING):
        return [f"checkpoint={quote(value)}"]
    if (path / CONFIG).exists():
        return [f"run={quote(value)}"]
    if path.exists() or "/" in value:
        return ["policy=pretrained", f"policy.path={quote(value)}"]
    return [argument]  # a member of a config folder of the user's


if __name__ == "__main__":
    main()
