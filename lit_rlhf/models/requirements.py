"""What a model must do to be a policy, found out by trying: a signature does not say it."""

import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lit_rlhf.batch import PromptBatch
from lit_rlhf.errors import UserError
from lit_rlhf.rollout.sampler import Sampler

if TYPE_CHECKING:
    from lit_rlhf.models.policy import Policy

#: Nats by which a token's log-probability may depend on how it is computed: the first ratio would be off by as much.
TOLERANCE, TOLERANCE_HALF = 0.01, 0.3


@torch.no_grad()
def require_decoder(policy: "Policy") -> None:
    """Completes three tiny prompts and refuses a model for which stages 1 and 3 would not agree.

    Three log-probabilities of every token must be the same: that of decoding with a cache, beside rows of other
    lengths; that of one pass over the same rows; and that of one pass over the row alone, without padding. Encoders
    such as BERT see what comes later, decoders such as BART's count padding as positions.

    Raises:
        UserError: they are not, or the model cannot be called so.
    """
    model, name = policy.model, type(policy.base).__name__
    if "past_key_values" not in inspect.signature(policy.base.forward).parameters:
        raise UserError(f"{name} has no key-value cache (past_key_values), which completions are decoded with")
    weight = next(model.parameters())
    if isinstance(weight, FakeTensor):  # of an estimate, which has no weights to try
        return
    device, modes = weight.device, [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        decoded, together, alone = _logprobs(policy, device)
    except Exception as error:  # of any model's code
        raise UserError(
            f"{name} cannot be called as a policy is: with input_ids, attention_mask, position_ids, past_key_values "
            f"and logits_to_keep. {type(error).__name__}: {error}"
        ) from error
    finally:
        for part, training in modes:
            part.training = training
    tolerance = TOLERANCE_HALF if weight.dtype.itemsize < 4 else TOLERANCE
    if not torch.allclose(decoded, together, rtol=0, atol=tolerance, equal_nan=True):
        reason = (
            "decoding token by token and one pass over the whole text give a token different probabilities; a policy "
            "reads from left to right, and keeps what it has read"
        )
    elif not torch.allclose(together, alone, rtol=0, atol=tolerance, equal_nan=True):
        reason = "padding before a prompt changes the probabilities of what follows; a policy reads position_ids"
    else:
        return
    raise UserError(f"{name} is no causal language model that can be trained here: {reason}")


def _logprobs(policy: "Policy", device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probabilities of the tokens after the shortest prompt, in the three ways."""
    a, b, pad = (i % policy.vocabulary for i in (policy.tokenizer.pad_token_id + n for n in (1, 2, 0)))
    # Two prompts that are the same share a row of the cache until the first token.
    ids = torch.tensor([[a, b, a], [a, b, a], [pad, pad, b]], device=device)
    prompts = PromptBatch(
        prompt_ids=ids, prompt_mask=ids != pad, episodes=torch.arange(3, device=device), prompts=["", "", ""]
    )
    rollout = Sampler(max_new_tokens=3).generate(policy.model, prompts, seed=0, stop_ids=[], pad_id=pad)
    together = policy(rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask)
    last = rollout[2:]
    alone = policy(last.prompt_ids[:, 2:], last.prompt_mask[:, 2:], last.response_ids, last.response_mask)
    return last.logprobs[0], together.logprobs[2].float(), alone.logprobs[0].float()
