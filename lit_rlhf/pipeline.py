"""Training runs in a row, each a normal run in its own subfolder: ``lit-rlhf pipeline experiment=human_ratings``."""

import hashlib
import json
import logging
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from lit_rlhf.config import CONFIG_DIR, command, differences, flatten, refuse_no_member, refuse_unknown, resolved
from lit_rlhf.errors import UserError
from lit_rlhf.overrides import (
    decode_key,
    drop_keys_of_others,
    encode_key,
    give_way,
    quote,
    replace_parts,
)
from lit_rlhf.preemption import Preempted, asked_to_stop, listening
from lit_rlhf.run_folder import CONFIG, read_summary, replace_file
from lit_rlhf.sweep import label_job, stop_between_jobs
from lit_rlhf.terminal import print_result
from lit_rlhf.train import check, optimized_value, train

log = logging.getLogger(__name__)

INPUTS = "inputs.json"  # in a stage's folder: the hashes of the models it was made from

#: What may differ between a complete stage and the same stage asked for again.
_MAY_DIFFER = (
    "ckpt_path", "tags", "optimized_metric", "logger", "callbacks", "paths", "precision_used",
    "trainer.default_root_dir",
)  # fmt: skip


def run_pipeline(config: DictConfig) -> float | None:
    """Runs every stage that is not complete, then writes the report over all of them.

    Returns:
        The last stage's ``optimized_metric``.

    Raises:
        UserError: a mistake in any stage's config; a complete stage was made with another configuration; a stage fails;
            or a key belongs to no stage.
    """
    plain = resolved(config)
    stages: dict[str, list[str]] = plain["stages"]
    folder = Path(config.paths.output_dir).absolute()
    refuse_unknown(config, {"task_name", "tags", "seed", "stages", "paths", "data", *stages})
    refuse_unknown(config, {"output_dir"}, under="paths")
    if "data" in config:
        refuse_unknown(config, set(), under="data")
    configs = {name: configure(name, plain, folder) for name in stages}
    for name, stage in configs.items():  # before the first one trains for hours
        try:
            check(stage, unless_from=folder)
        except UserError as error:
            raise UserError(f"stage {name}: {error}") from error
    value = None
    made: dict[str, str] = {}  # earlier stage -> hash of its model
    for number, (name, stage) in enumerate(configs.items(), start=1):
        if number < len(stages):
            stage.optimized_metric = None  # the last stage's counts, and this one need not have logged its own
        require_same_inputs(folder / name, made)
        if is_complete(folder / name, stage):
            log.info("[%d/%d] %s is complete: %s", number, len(stages), name, folder / name)
            value = optimized_value(read_summary(folder / name), stage.optimized_metric)
        else:
            log.info("[%d/%d] %s: %s", number, len(stages), name, folder / name)
            (folder / name).mkdir(parents=True, exist_ok=True)
            replace_file(folder / name / INPUTS, json.dumps(made, indent=2) + "\n")
            value = train(stage)
        if asked_to_stop() and number < len(stages):
            raise Preempted
        made[name] = hash_model(folder / name / "model")
    from lit_rlhf.report import build_report  # here, because its plotting library takes half a second to import

    report = build_report(folder)
    print_result(folder, list(stages))
    log.info("report: %s", report)
    return value


def configure(name: str, plain: dict[str, Any], folder: Path) -> DictConfig:
    """The config of one stage of a pipeline, whose own config is ``plain``.

    Raises:
        UserError: a key that the pipeline sets itself.
    """
    own = to_overrides(plain.get(name) or {})
    if taken := [o for o in own if o.startswith(("paths.output_dir=", "ckpt_path="))]:
        raise UserError(f"{name}.{taken[0]}: the pipeline sets this key itself")
    stage = compose_stage(
        preset=[f"seed={plain['seed']}", f"tags={quote(plain['tags'])}", *plain["stages"][name]],
        given=[*own, f"paths.output_dir={quote(str(folder / name))}", "ckpt_path=auto"],
    )
    label_job(stage, name)
    if logger := (stage.get("logger") or {}).get("wandb"):
        logger.group = logger.group or plain["task_name"]
        logger.name = logger.name or f"{plain['task_name']}/{name}"
    return stage


def compose_stage(given: list[str], preset: Sequence[str] = ()) -> DictConfig:
    """A ``train`` config from a user's overrides, which follow a stage's own, as the command line would compose it."""
    refuse_no_member([*preset, *given])
    preset, given = replace_parts(list(preset)), replace_parts(given)
    where = [f"hydra.searchpath={quote(user_config_dirs())}"]
    # Hydra keeps one composer per process, and the pipeline's own is in use: put it back afterwards.
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
            config = compose("train", [*where, *give_way(preset, given), *given], return_hydra_config=True)
            choices = config.hydra.runtime.choices
            with open_dict(config):
                del config.hydra
            drop_keys_of_others(config, partial(compose, "train"), choices, where, preset, given)
            return config
    finally:
        GlobalHydra.instance().clear()
        if outer is not None:
            GlobalHydra.instance().initialize(outer)


def user_config_dirs() -> list[str]:
    """The folders of ``--config-dir`` and ``hydra.searchpath``, where a stage's configs may lie, too."""
    if not HydraConfig.initialized():
        return []
    sources = HydraConfig.get().runtime.config_sources
    users = ("command-line", "hydra.searchpath")
    return [f"{source.schema}://{source.path}" for source in sources if source.provider.startswith(users)]


def require_same_inputs(folder: Path, made: dict[str, str]) -> None:
    """Raises UserError if the stage in ``folder`` was begun with other models of earlier stages than there are now."""
    if not (folder / INPUTS).exists():
        return
    begun = json.loads((folder / INPUTS).read_text())
    if changed := sorted(name for name in made if begun.get(name) != made[name]):
        raise UserError(
            f"{folder} was made from another '{changed[0]}' than the one that is there now. "
            "Remove that folder to run the stage again."
        )


def hash_model(folder: Path) -> str:
    """SHA-256 over the weights that a stage left behind."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def is_complete(folder: Path, stage: DictConfig) -> bool:
    """Whether a stage's folder holds a complete run of this very configuration.

    Raises:
        UserError: it is complete with another configuration.
    """
    if read_summary(folder).get("status") != "completed":
        return False
    done = yaml.safe_load((folder / CONFIG).read_text())
    if changed := differences(done, resolved(stage), _MAY_DIFFER):
        raise UserError(
            f"the stage in {folder} is complete, but with another configuration (there -> now):\n  "
            + "\n  ".join(changed)
            + "\nRemove that folder to run the stage again, or choose another one with paths.output_dir=..."
        )
    return True


def to_overrides(values: dict[str, Any]) -> list[str]:
    """``{"kl": {"coef": 0.1}}`` to ``["kl.coef=0.1"]``, quoted for Hydra.

    >>> to_overrides({"kl": {"coef": 0.1}, "critic": "separate", "tags": ["a b"]})
    ['kl.coef=0.1', 'critic=separate', "tags=['a b']"]
    """
    return [f"{decode_key(key)}={quote(value)}" for key, value in flatten(values).items()]


@command("pipeline")
def _main(config: DictConfig) -> float | None:
    with listening():
        value = run_pipeline(config)
        stop_between_jobs(value)
    return value


def main() -> None:
    """Turns ``ppo.kl.coef=0.1`` into a new key of the node ``ppo``: the pipeline's config lists no stage's keys."""
    own = ("paths.", "hydra.", "stages.", "data.")
    for number, argument in enumerate(sys.argv[1:], start=1):
        found = re.match(r"(\w+)\.([\w.@/]+)(=.*)", argument, flags=re.S)
        if found and not argument.startswith(own):
            stage, key, value = found.groups()
            sys.argv[number] = f"++{stage}.{encode_key(key)}{value}"
    _main()


if __name__ == "__main__":
    main()
