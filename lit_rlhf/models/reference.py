"""The reference: the model that the run starts from, to which the KL is measured. It never changes."""

import copy
import hashlib
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lit_rlhf.distributed import shard
from lit_rlhf.errors import UserError
from lit_rlhf.models.cast import cast_layers
from lit_rlhf.models.guided import GuidedModel
from lit_rlhf.models.policy import Policy, PolicyOutput


class AdapterOff:
    """Under LoRA the reference is the policy with its adapter switched off: no second copy of the weights."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __call__(self, *tokens: Tensor, **settings: Any) -> PolicyOutput:
        """What the reference says; arguments as in ``Policy.forward``."""
        with self._policy.model.disable_adapter():
            return self._policy(*tokens, **settings)

    def fingerprint(self) -> str:
        """A hash of the reference's weights: the same at the start, at the end and after a resume."""
        return _hash({k: v for k, v in self._policy.model.state_dict().items() if "lora_" not in k})

    def place(self, _device: torch.device, _cast: torch.dtype | None, **_settings: Any) -> None:
        """Nothing to do: the weights are the policy's."""

    def shard(self, _mesh: Any) -> None:
        """Nothing to do: the weights are the policy's."""


class FrozenCopy:
    """In full fine-tuning the reference is a copy made before the first update."""

    def __init__(self, policy: Policy) -> None:
        self._policy = copy.deepcopy(policy).eval()
        for parameter in self._policy.parameters():
            parameter.requires_grad_(False)
        self._dtype = next(self._policy.parameters()).dtype

    def __call__(self, *tokens: Tensor, **settings: Any) -> PolicyOutput:
        return self._policy(*tokens, **settings)

    def fingerprint(self) -> str:
        return _hash(self._policy.model.state_dict())

    def place(self, device: torch.device, cast: torch.dtype | None, *, all_weights: bool = False) -> None:
        """Moves the weights to ``device`` and keeps linear layers in ``cast``, see ``cast_layers``.

        ``all_weights``: those of the policy are in half precision, too. Without ``cast`` all have the type that they
        came in; once cast, they stay rounded.
        """
        self._policy.to(device)
        if not isinstance(self._policy.model, GuidedModel):
            cast_layers(self._policy.base, cast or self._dtype, all_weights=all_weights)

    def shard(self, mesh: Any) -> None:
        shard(self._policy.base, mesh)


Reference = AdapterOff | FrozenCopy


def make_reference(policy: Policy) -> Reference:
    """The reference that fits ``policy``. Make it before training, from the weights that the run starts from."""
    return AdapterOff(policy) if isinstance(policy.model, PeftModel) else FrozenCopy(policy)


def require_same_reference(stored: str | None, now: str | None) -> None:
    """Raises UserError if the fingerprint that a checkpoint holds is not that of the reference of now."""
    if stored != now:
        raise UserError(
            "the checkpoint was trained against another reference: the weights of the policy that this run starts from "
            f"have the hash {str(now)[:12]}, those of the checkpoint's run {str(stored)[:12]}"
        )


def _hash(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
