"""Q and V heads on a policy's hidden states, and decoding that they guide."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lit_rlhf.distributed import rank
from lit_rlhf.errors import UserError
from lit_rlhf.layers import state_size

HEADS_FILE, GUIDANCE_FILE = "q_heads.safetensors", "guidance.json"


class Head(nn.Module):
    """Hidden states (..., d) to ``outputs`` numbers (..., outputs), by one hidden layer of 2 d; starts at 0.

    Works in the precision of its own weights, whatever the surroundings are.
    """

    def __init__(self, hidden_size: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, 2 * hidden_size)
        self.outer = nn.Linear(2 * hidden_size, outputs)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.outer(torch.relu(self.inner(hidden.to(self.inner.weight.dtype))))


class QHeads(nn.Module):
    """``count`` estimates of Q(s, .) over the vocabulary, each with a slowly moving copy, the target network.

    Args:
        hidden_size: of the policy.
        vocabulary: number of actions.
        count: estimates; the smallest of the targets counts, against overestimation (Fujimoto et al. 2018,
            arXiv:1802.09477).
    """

    def __init__(self, hidden_size: int, vocabulary: int, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(hidden_size, vocabulary) for _ in range(count))
        self.targets = copy.deepcopy(self.heads).requires_grad_(False)

    def forward(self, hidden: Tensor) -> list[Tensor]:
        """(..., d) -> Q of every head, each (..., vocabulary)."""
        return [head(hidden) for head in self.heads]

    @torch.no_grad()
    def target(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., vocabulary), the smallest of the target networks' values."""
        return smallest(self.targets, hidden)

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Polyak averaging: target <- rate * online + (1 - rate) * target."""
        for target, online in zip(self.targets.parameters(), self.heads.parameters(), strict=True):
            target.lerp_(online, rate)


def smallest(heads: nn.ModuleList, hidden: Tensor) -> Tensor:
    """(..., d) -> (..., vocabulary), the smallest of the heads' values."""
    values = [head(hidden) for head in heads]
    return torch.stack(values).amin(0) if len(values) > 1 else values[0]


class GuidedModel(nn.Module):
    """A causal language model whose logits are moved by Q: softmax over a of ``prior * log p(a|s) + beta * Q(s, a)``.

    That is advantage-weighted decoding, p(a|s) exp(beta (Q(s, a) - V(s))): V is the same for all tokens, so it cancels
    in the softmax. It takes the place of a transformers model in ``Policy`` and in the sampler.

    Args:
        model: the language model p, whose hidden states the heads read.
        heads: Q heads; the smallest value counts.
        beta: how strongly Q guides; 0 leaves the language model as it is (with a prior of 1).
        prior: how much the language model has to say; 0 decodes by Q alone.
    """

    def __init__(self, model: PreTrainedModel, heads: nn.ModuleList, *, beta: float, prior: float) -> None:
        super().__init__()
        self.model = model
        self.heads = heads
        self.beta = beta
        self.prior = prior

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def generation_config(self) -> Any:
        return self.model.generation_config

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def forward(
        self, *, past_key_values: Any = None, logits_to_keep: Tensor | None = None, **inputs: Any
    ) -> CausalLMOutputWithPast:
        inputs |= {"past_key_values": past_key_values, "output_hidden_states": True}
        if logits_to_keep is not None:
            inputs["logits_to_keep"] = logits_to_keep
        output = self.model(**inputs)
        hidden = output.hidden_states[-1]
        q_values = smallest(self.heads, hidden if logits_to_keep is None else hidden[:, logits_to_keep])
        output.logits = self.prior * output.logits.float() + self.beta * q_values.float()
        return output

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the language model in Hugging Face's format, and beside it the heads and how they guide."""
        self.model.save_pretrained(folder)
        save_guidance(Path(folder), self.heads, beta=self.beta, prior=self.prior)


def save_guidance(folder: Path, heads: nn.ModuleList, *, beta: float, prior: float) -> None:
    """Writes Q heads and how they guide into the folder of a language model, in the first process.

    ``Policy.from_pretrained`` reads them.
    """
    if rank() != 0:
        return
    save_file(heads.state_dict(), folder / HEADS_FILE)
    guidance = {"beta": beta, "prior": prior, "heads": len(heads)}
    (folder / GUIDANCE_FILE).write_text(json.dumps(guidance, indent=2) + "\n")


def load_guidance(folder: str | Path, model: PreTrainedModel) -> GuidedModel | PreTrainedModel:
    """The model with the guidance that lies in its folder; the model itself where there is none.

    Raises:
        UserError: the guidance cannot be read, or does not fit the model.
    """
    folder = Path(folder)
    if not (folder / GUIDANCE_FILE).is_file():
        return model
    config = model.config.get_text_config()
    try:
        guidance = json.loads((folder / GUIDANCE_FILE).read_text())
        with torch.device("meta"):  # else each would first draw its weights: seconds with a large vocabulary
            heads = nn.ModuleList(Head(state_size(config), config.vocab_size) for _ in range(guidance["heads"]))
        heads.load_state_dict(load_file(folder / HEADS_FILE), assign=True)
        return GuidedModel(model, heads.eval(), beta=guidance["beta"], prior=guidance["prior"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"policy.path={folder}: its Q heads cannot be loaded: {error}") from error
