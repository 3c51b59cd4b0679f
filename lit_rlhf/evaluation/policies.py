"""A policy by whatever names it: a run folder, a checkpoint, a model folder, a short name or a hub name."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from lit_rlhf.config import instantiate
from lit_rlhf.distributed import whole_checkpoint
from lit_rlhf.errors import UserError
from lit_rlhf.models.policy import Policy
from lit_rlhf.run_folder import CONFIG
from lit_rlhf.train import newest_good, read_checkpoint

#: Of a checkpoint file; FSDP2's is a folder of such a name.
ENDING = ".ckpt"


def load_policy(name: str) -> Policy:
    """The policy that ``name`` stands for, in evaluation mode.

    A run folder means the model that it exported, or, while it has none, its newest checkpoint. A checkpoint file holds
    the config of its run, from which the rest of the policy is made.

    Raises:
        UserError: there is no such policy.
    """
    path = Path(name)
    if (path / CONFIG).exists() and not (path / "model").exists():
        path = newest_good(path / "checkpoints")[0]
        if path is None:
            raise UserError(f"{name} has neither a model nor a checkpoint yet")
    if path.suffix == ENDING and path.exists():
        return _of_checkpoint(path).eval()
    return Policy.from_pretrained(path=str(exported(name))).eval()


def exported(name: str) -> Path | str:
    """The folder of a run's model; anything else as it is."""
    return Path(name) / "model" if (Path(name) / CONFIG).exists() else name


def _of_checkpoint(path: Path) -> Policy:
    stored = read_checkpoint(path)
    config = stored["config"]
    if not config or not config.get("policy"):
        raise UserError(f"{path} holds no policy of a run: its config names none")
    policy = instantiate(OmegaConf.create(config["policy"]), "policy")
    load_weights(policy, path, stored)
    return policy


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
