"""A policy by whatever names it: a run folder, a checkpoint, a model folder, a short name or a hub name."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig

from lit_rlhf.config import instantiate, read_config
from lit_rlhf.distributed import whole_checkpoint
from lit_rlhf.errors import UserError
from lit_rlhf.models.policy import Policy, require_language_model
from lit_rlhf.models.sources import NO_CODE, not_loaded, resolve_model
from lit_rlhf.run_folder import CONFIG
from lit_rlhf.train import newest_good, read_checkpoint

#: Of a checkpoint file; FSDP2's is a folder of such a name.
ENDING = ".ckpt"
#: What makes a policy and runs nobody else's code.
_LOADERS = ("lit_rlhf.models.Policy.from_pretrained", "lit_rlhf.models.Policy.from_config")


@contextmanager
def named_by(key: str) -> Iterator[None]:
    """Lets an error of loading a policy name the config key that the policy was named by."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("policy.path=", f"{key}=")) from error


@contextmanager
def said_of(name: str) -> Iterator[None]:
    """Lets an error say which of several policies it is of."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def load_policy(name: str) -> Policy:
    """The policy that ``name`` stands for, in evaluation mode.

    A run folder means the model that it exported, or, while it has none, its newest checkpoint. A checkpoint holds what
    was trained; see ``policy_config`` for the rest.

    Raises:
        UserError: there is no such policy.
    """
    path = Path(name)
    if _exports_nothing_yet(path):
        path = newest_good(path / "checkpoints")[0]
        if path is None:
            raise UserError(f"policy.path={name} has neither a model nor a checkpoint yet")
    if path.suffix == ENDING and path.exists():
        return _of_checkpoint(path).eval()
    return Policy.from_pretrained(path=str(exported(name))).eval()


def require_policy(name: str) -> None:
    """Raises UserError where nothing of this name could be loaded; of a model it reads the config alone."""
    path = Path(name)
    if path.suffix == ENDING or _exports_nothing_yet(path):
        if not path.exists():
            raise UserError(f"policy.path={name}: there is no such checkpoint")
        return
    folder = resolve_model(str(exported(name)))
    if (Path(folder) / "adapter_config.json").exists():
        return
    try:
        config = AutoConfig.from_pretrained(folder, **NO_CODE)
    except Exception as error:  # of whatever is in the folder
        raise not_loaded("policy.path", name, "causal language model", error) from error
    require_language_model(name, config)


def _exports_nothing_yet(path: Path) -> bool:
    """Whether this is a run's folder that has no model."""
    return (path / CONFIG).exists() and not (path / "model").exists()


def exported(name: str) -> Path | str:
    """The folder of a run's model; anything else as it is."""
    return Path(name) / "model" if (Path(name) / CONFIG).exists() else name


def _of_checkpoint(path: Path) -> Policy:
    stored = read_checkpoint(path)
    policy = instantiate(policy_config(path, stored), "policy")
    load_weights(policy, path, stored)
    return policy


def run_of(path: Path) -> Path | None:
    """The run folder in whose ``checkpoints`` a checkpoint lies, if it does."""
    folder = path.resolve().parent.parent
    return folder if (folder / CONFIG).exists() else None


def policy_config(path: Path, stored: dict[str, Any]) -> DictConfig:
    """What a checkpoint's policy is made from, by its run's config, or by itself where it lies elsewhere.

    A run folder's config is code, which its user trusts; a file that comes from somewhere is not, so of its own config
    only a policy that this package loads is taken.

    Raises:
        UserError: there is no such policy.
    """
    run = run_of(path)
    if run is not None:
        config = read_config(run).get("policy")
    else:
        whole = stored["config"]
        plain = (whole.get("policy") or {}) if isinstance(whole, dict) else {}
        if not isinstance(plain, dict):
            raise UserError(f"{path} holds no policy")
        made_by = plain.get("_target_")
        others = {key: value for key, value in plain.items() if key != "_target_"}
        if plain and (made_by not in _LOADERS or not _says_only_itself(others)):
            raise UserError(f"{path} is of a policy made by {made_by!r}, which could run anything; name its run folder")
        if plain.get("trust_remote_code"):
            raise UserError(f"{path} asks to trust_remote_code, which could run anything; name its run folder")
        config = OmegaConf.create(plain)
    if not config:
        raise UserError(f"{path} holds no policy")
    return config


def _says_only_itself(value: Any) -> bool:
    """Whether nothing in a part of a config is made, called or looked up when it is instantiated, however deep."""
    if isinstance(value, dict):
        return all(not str(key).startswith("_") and _says_only_itself(part) for key, part in value.items())
    if isinstance(value, list):
        return all(map(_says_only_itself, value))
    return not isinstance(value, str) or "${" not in value


def load_weights(policy: Policy, path: Path, stored: dict[str, Any]) -> None:
    """Gives a policy the weights that a checkpoint of its run holds; ``stored`` is what ``read_checkpoint`` says of it.

    Raises:
        UserError: they are not those of this policy, or it would be another one without what else was trained.
    """
    with whole_checkpoint(path) as file:
        weights = stored["state_dict"] if file == path else _read(file)
        own = {name.removeprefix("policy."): x for name, x in weights.items() if name.startswith("policy.")}
        sizes = {name: x.shape for name, x in policy.named_parameters() if x.requires_grad}
        if wrong := {name for name in sizes.keys() | own.keys()
                     if name not in own or sizes.get(name) != own[name].shape}:  # fmt: skip
            raise UserError(
                f"{path} belongs to another policy: {len(wrong)} trained weights differ, e.g. '{min(wrong)}'"
            )
        if any(name.startswith("q_heads.") for name in weights):
            raise UserError(f"{path}: its policy decodes with Q heads; name its run folder, whose model has them")
        policy.load_state_dict(own, strict=False)


def _read(file: Path) -> dict[str, Any]:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
