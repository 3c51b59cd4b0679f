"""Critics: a value head on the policy's backbone, or a model of its own."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from lit_rlhf.distributed import rank, whole
from lit_rlhf.errors import UserError
from lit_rlhf.layers import compile_layers, state_size
from lit_rlhf.models.attention import use_fitting_attention
from lit_rlhf.models.policy import Policy, PolicyOutput
from lit_rlhf.models.sources import NO_CODE, not_loaded, resolve_model
from lit_rlhf.rollout.sampler import position_ids

HEAD_FILE = "value_head.safetensors"


class _Head(nn.Linear):
    """Hidden states (..., d) to values (...) in fp32; with a gain of 0 the first values are 0."""

    def __init__(self, hidden_size: int, gain: float = 0.0) -> None:
        super().__init__(hidden_size, 1)
        nn.init.orthogonal_(self.weight, gain)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float()).squeeze(-1)


class ValueHead(nn.Module):
    """V(s) as a linear function of the policy's last hidden state: one forward pass gives policy and value.

    Args:
        policy: the policy whose backbone is shared.
        path: a folder that an earlier run saved the head to, to start from; None starts at zero.
        detach: keep the value loss out of the backbone.
        gain: of the head's orthogonal initialisation, as in PPO2; 0 starts at values of 0.
    """

    def __init__(self, policy: Policy, *, path: str | None = None, detach: bool = False, gain: float = 0.0) -> None:
        super().__init__()
        self.head = _Head(policy.hidden_size, gain)
        self.detach = detach
        if path is not None:
            load_head(self.head, path)

    def forward(self, output: PolicyOutput, *_tokens: Tensor) -> Tensor:
        """Values (B, T + 1) of the states of ``output``; the last one is the state after the last token."""
        return self.head(output.hidden.detach() if self.detach else output.hidden)

    def save(self, folder: Path) -> None:
        """Writes the head, in the first process; every process must call it."""
        _save_head(self.head, Path(folder))


class SeparateCritic(nn.Module):
    """V(s) from a backbone of its own.

    Args:
        policy: gives the backbone (a copy, before training) when ``init`` is ``policy``, and the vocabulary.
        init: ``policy``; the ``critic`` folder that an earlier run saved; or the name or folder of a causal sequence
            classifier (a reward model), whose score head is the first value head. It must share the policy's
            vocabulary, because the critic reads the policy's tokens.

    Raises:
        UserError: nothing can be loaded from ``init``, or it is a model that cannot be this policy's critic.
    """

    #: It shares nothing with the policy, so that neither's activations are needed for the other's backward pass.
    apart = True

    def __init__(self, policy: Policy, *, init: str = "policy") -> None:
        super().__init__()
        if init == "policy":
            self.backbone: PreTrainedModel = policy.merged().base_model
            self.head = _Head(policy.hidden_size)
        elif (Path(init) / HEAD_FILE).exists():
            try:
                self.backbone = AutoModel.from_pretrained(init, dtype=torch.float32, **NO_CODE)
            except Exception as error:  # of whatever is in the folder
                raise not_loaded("critic.init", init, "critic", error) from error
            _require_same_vocabulary(init, self.backbone, policy)
            self.head = _Head(state_size(self.backbone.config))
            load_head(self.head, init)
        else:
            model = _load_reward_model(init, policy)
            self.backbone = model.base_model
            self.head = _Head(state_size(model.config))
            with torch.no_grad():
                self.head.weight.copy_(model.score.weight)
        if init != "policy":  # whose attention somebody may have named
            use_fitting_attention(self.backbone)
            if policy.checkpointing:
                self.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        if policy.compiled:
            compile_layers(self.backbone)
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def forward(
        self,
        _output: PolicyOutput,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
    ) -> Tensor:
        """Values (B, T + 1) as for :class:`ValueHead`."""
        mask = torch.cat([prompt_mask, response_mask], dim=1)
        hidden = self.backbone(
            input_ids=torch.cat([prompt_ids, response_ids], dim=1),
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=False,
        ).last_hidden_state
        return self.head(hidden[:, prompt_ids.shape[1] - 1 :])

    def save(self, folder: Path) -> None:
        """Writes backbone and head to the subfolder ``critic``, in the first process; every process must call it."""
        folder = Path(folder) / "critic"
        weights = {name: whole(x) for name, x in self.backbone.state_dict().items()}
        if rank() == 0:
            self.backbone.save_pretrained(folder, state_dict=weights)
        _save_head(self.head, folder)


def _save_head(head: nn.Module, folder: Path) -> None:
    weights = {name: whole(x).cpu() for name, x in head.state_dict().items()}
    if rank() == 0:
        save_file(weights, folder / HEAD_FILE)


def load_head(head: nn.Module, path: str) -> None:
    file = Path(path) / HEAD_FILE
    if not file.exists():
        raise UserError(f"critic.path={path}: there is no {HEAD_FILE} in this folder")
    try:
        head.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"critic: {file} cannot be loaded: {error}") from error


def _load_reward_model(path: str, policy: Policy) -> PreTrainedModel:
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            resolve_model(path), dtype=torch.float32, output_loading_info=True, **NO_CODE
        )
    except Exception as error:  # of whatever is in the folder
        raise not_loaded("critic.init", path, "sequence classifier", error) from error
    if model.config.num_labels != 1:
        raise UserError(f"critic.init={path} has {model.config.num_labels} labels; a critic starts from a model with 1")
    if getattr(model, "score", None) is None:
        raise UserError(f"critic.init={path} is an encoder; a critic reads from left to right, like the policy")
    if found["missing_keys"]:
        raise UserError(f"critic.init={path} has no trained score head: {min(found['missing_keys'])} is missing")
    _require_same_vocabulary(path, model, policy)
    return model


def _require_same_vocabulary(path: str, model: PreTrainedModel, policy: Policy) -> None:
    size, expected = model.config.get_text_config().vocab_size, policy.vocabulary
    if size != expected:
        raise UserError(
            f"critic.init={path} cannot be the critic: it reads {size} token ids and the policy writes {expected}. A "
            "critic from a reward model needs one with the policy's tokenizer; use critic.init=policy otherwise."
        )
