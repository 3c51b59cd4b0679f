"""Training runs in a row, each a normal run in its own subfolder: ``lit-rlhf pipeline experiment=human_ratings``."""

import logging
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from lit_rlhf.config import CONFIG_DIR, command, differences, flatten, refuse_unknown, resolved
from lit_rlhf.errors import UserError
from lit_rlhf.run_folder import CONFIG, read_summary
from lit_rlhf.terminal import print_result
from lit_rlhf.train import optimized_value, train

log = logging.getLogger(__name__)

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
        UserError: a complete stage was made with another configuration, a stage fails, or a key belongs to no stage.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    stages: dict[str, list[str]] = plain["stages"]
    folder = Path(plain["paths"]["output_dir"]).absolute()
    refuse_unknown(config, {"task_name", "tags", "seed", "stages", "paths", "data", *stages})
    refuse_unknown(config, {"output_dir"}, under="paths")
    if "data" in config:
        refuse_unknown(config, set(), under="data")
    value = None
    fresh: str | None = None  # the first stage that ran anew in this call
    for number, (name, overrides) in enumerate(stages.items(), start=1):
        own = to_overrides(plain.get(name) or {})
        if taken := [o for o in own if o.startswith(("paths.output_dir=", "ckpt_path="))]:
            raise UserError(f"{name}.{taken[0]}: the pipeline sets this key itself")
        stage = compose_stage(
            [
                f"seed={plain['seed']}",
                f"tags={quote(plain['tags'])}",
                *overrides,
                *own,
                f"paths.output_dir={quote(str(folder / name))}",
                "ckpt_path=auto",
            ]
        )
        if number < len(stages):
            stage.optimized_metric = None  # the last stage's counts, and this one need not have logged its own
        if "wandb" in (stage.get("logger") or {}):
            stage.logger.wandb.group = plain["task_name"]
            stage.logger.wandb.name = f"{plain['task_name']}/{name}"
        if is_complete(folder / name, stage, fresh):
            log.info("[%d/%d] %s is complete: %s", number, len(stages), name, folder / name)
            value = optimized_value(read_summary(folder / name), stage.optimized_metric)
            continue
        log.info("[%d/%d] %s: %s", number, len(stages), name, folder / name)
        if not (folder / name / "checkpoints" / "last.ckpt").exists():
            fresh = fresh or name
        value = train(stage)
    from lit_rlhf.report import build_report  # here, because its plotting library takes half a second to import

    report = build_report(folder)
    print_result(folder, list(stages))
    log.info("report: %s", report)
    return value


def compose_stage(overrides: list[str]) -> DictConfig:
    """A ``train`` config from overrides, as the command line would compose it."""
    # Hydra keeps one composer per process, and the pipeline's own is in use: put it back afterwards.
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
            return compose("train", overrides=[*overrides, f"hydra.searchpath={quote(user_config_dirs())}"])
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


def is_complete(folder: Path, stage: DictConfig, fresh: str | None) -> bool:
    """Whether a stage's folder holds a complete run of this very configuration.

    Raises:
        UserError: it is complete with another configuration, or an earlier stage has just been made anew under it.
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
    if fresh is not None:
        raise UserError(
            f"the stage '{fresh}' was just run anew, but {folder} was made from the one before it. "
            "Remove that folder to run the stage again."
        )
    return True


def to_overrides(values: dict[str, Any]) -> list[str]:
    """``{"kl": {"coef": 0.1}}`` to ``["kl.coef=0.1"]``, quoted for Hydra.

    >>> to_overrides({"kl": {"coef": 0.1}, "critic": "separate", "tags": ["a b"]})
    ['kl.coef=0.1', 'critic=separate', "tags=['a b']"]
    """
    return [f"{key}={quote(value)}" for key, value in flatten(values).items()]


def quote(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # A bare word, unless Hydra would read another type from it
        if re.fullmatch(r"[A-Za-z_/][\w./-]*", value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
            return value
        return QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, list):
        return "[" + ",".join(quote(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{quote(item)}" for key, item in value.items()) + "}"
    return str(value)


@command("pipeline")
def _main(config: DictConfig) -> float | None:
    return run_pipeline(config)


def main() -> None:
    """Adds ``++`` to overrides such as ``ppo.kl.coef=0.1``: the pipeline's config does not list a stage's keys."""
    stage_key = re.compile(r"(\w+)\.[\w.@/]+=")
    own = ("paths.", "hydra.", "stages.", "data.")
    sys.argv[1:] = [
        f"++{argument}" if stage_key.match(argument) and not argument.startswith(own) else argument
        for argument in sys.argv[1:]
    ]
    _main()


if __name__ == "__main__":
    main()
