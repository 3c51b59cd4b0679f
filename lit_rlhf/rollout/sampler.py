"""Stage 1: a KV-cached decode loop that samples completions and keeps their log-probabilities."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lit_rlhf.batch import PromptBatch, Rollout
from lit_rlhf.checks import check_int
from lit_rlhf.errors import UserError
from lit_rlhf.rollout.philox import uniform


class Sampler:
    """Samples completions from the full softmax at a temperature, one uniform number per token.

    Token t of episode e is the inverse of the cumulative distribution at u(seed, e, t), so the same episodes come out
    for any chunk size and any set of other rows (up to floating-point order). Finished rows leave the batch.

    Args:
        max_new_tokens: tokens of the longest completion, the stop token included.
        temperature: divides the logits; 0 takes the most likely token (for evaluation only).
        stop_tokens: token ids that end a completion, besides the model's end-of-sequence token.
        chunk_size: prompts decoded together; None takes all at once. Bounds the memory of the KV cache.
        top_k, top_p: cut the distribution, for evaluation only. Training refuses them: the log-probabilities of the
            loss are those of the full softmax, and a ratio between two different distributions is no ratio.

    Raises:
        UserError: an argument outside its range.
    """

    def __init__(
        self,
        *,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        stop_tokens: Sequence[int] = (),
        chunk_size: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> None:
        check_int("sampler.max_new_tokens", max_new_tokens, at_least=1)
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise UserError(f"sampler.temperature must be finite and not negative, got {temperature}")
        for name, value in {"chunk_size": chunk_size, "top_k": top_k}.items():
            if value is not None:
                check_int(f"sampler.{name}", value, at_least=1)
        for token in stop_tokens:
            check_int("sampler.stop_tokens", token, at_least=0)
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"sampler.top_p must be in (0, 1] or null, got {top_p}")
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.stop_tokens = tuple(stop_tokens)
        self.chunk_size = chunk_size
        self.top_k = top_k
        self.top_p = top_p

    def require_training(self) -> None:
        """Raises UserError if this sampler's distribution is not the softmax that the loss differentiates."""
        if self.top_k is not None or self.top_p is not None:
            raise UserError(
                f"sampler.top_k={self.top_k}, sampler.top_p={self.top_p}: training rollouts come from the full "
                "softmax, because the policy ratio and the KL compare log-probabilities of the full softmax. "
                "Set both to null; use them in evaluation only."
            )
        if self.temperature == 0:
            raise UserError("sampler.temperature=0 is greedy: every rollout of a prompt is the same; only evaluate so")

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # layers are compiled for training: each token would compile them anew
    def generate(
        self,
        model: PreTrainedModel,
        prompts: PromptBatch,
        *,
        seed: int,
        stop_ids: Sequence[int],
        pad_id: int,
        progress: Callable[[int, int], None] | None = None,
        chunk_size: int | None = None,
    ) -> Rollout:
        """Completes ``prompts`` (B, P) to a Rollout (B, T), T at most ``max_new_tokens``.

        Args:
            model: any causal LM of transformers that takes ``past_key_values`` and ``position_ids``.
            prompts: padded on the left; ``prompts.episodes`` selects the random numbers.
            seed: the run's seed.
            stop_ids: ids that end a completion (``stop_tokens`` are added).
            pad_id: fills the columns after the end.
            progress: called with (tokens done, tokens in all) while decoding.
            chunk_size: in place of the sampler's own.
        """
        stop = torch.tensor(sorted({*stop_ids, *self.stop_tokens}), device=prompts.prompt_ids.device)
        size = chunk_size or self.chunk_size or len(prompts)
        starts = range(0, len(prompts), size)
        total = len(starts) * self.max_new_tokens
        chunks = []
        for number, start in enumerate(starts):
            done = number * self.max_new_tokens

            def report(step: int, done: int = done) -> None:
                if progress is not None:
                    progress(done + step, total)

            chunks.append(self._decode(model, prompts[start : start + size], seed, stop, pad_id, report))
        return Rollout.cat(chunks)

    def _decode(
        self,
        model: PreTrainedModel,
        prompts: PromptBatch,
        seed: int,
        stop: Tensor,
        pad_id: int,
        report: Callable[[int], None],
    ) -> Rollout:
        ids, mask = prompts.prompt_ids, prompts.prompt_mask
        device, (batch, steps) = ids.device, (len(prompts), self.max_new_tokens)
        tokens = torch.full((batch, steps), pad_id, device=device)
        counts = torch.zeros(batch, steps, dtype=torch.bool, device=device)
        logprobs = torch.zeros(batch, steps, device=device)
        finished = torch.zeros(batch, dtype=torch.bool, device=device)
        uniforms = uniform(seed, prompts.episodes, steps, device)

        rows = torch.arange(batch, device=device)  # which completion each row of the shrinking batch writes to
        cache = DynamicCache(config=model.config)
        positions = position_ids(mask)
        first, prompt_of = _runs(ids, mask)  # a prompt that follows itself, as in a group, is computed once
        with torch.inference_mode():  # the model alone: what is written to below is made outside, for training uses it
            logits = next_logits(model, ids[first], mask[first], positions[first], cache)
        if len(first) < batch:
            logits = logits[prompt_of]
            cache.reorder_cache(prompt_of)
        for step in range(steps):
            token, logprob = self._pick(logits, uniforms[rows, step])
            going = ~finished[rows]
            tokens[rows, step] = torch.where(going, token, pad_id)
            logprobs[rows, step] = torch.where(going, logprob, 0.0)
            counts[rows, step] = going
            finished[rows] |= torch.isin(token, stop)
            report(step + 1)
            going = ~finished[rows]
            alive = int(going.sum())
            if alive == 0 or step + 1 == steps:
                break
            if alive <= 0.75 * len(rows):  # copying the cache costs about as much as a step for the rows it drops
                keep = going.nonzero().squeeze(-1)
                cache.reorder_cache(keep)
                rows, mask, positions, token = rows[keep], mask[keep], positions[keep], token[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1
            with torch.inference_mode():
                logits = next_logits(model, token.unsqueeze(-1), mask, positions, cache)
        width = max(1, int(counts.any(0).sum()))
        return Rollout(
            prompt_ids=ids,
            prompt_mask=prompts.prompt_mask,
            response_ids=tokens[:, :width],
            response_mask=counts[:, :width],
            logprobs=logprobs[:, :width],
            finished=finished,
            episodes=prompts.episodes,
        )

    def _pick(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B,) and their log-probabilities (B,) from logits (B, V) and numbers in [0, 1) (B,)."""
        logits = logits.float()
        if self.temperature == 0:
            token = logits.argmax(-1)
            return token, torch.log_softmax(logits, -1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
        logits = self._cut(logits / self.temperature)
        probabilities = torch.softmax(logits, -1)
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        # Scaled by the last entry, because rounding leaves the sum a little off 1; right=True passes over the flat
        # stretches, so that a token of probability 0 is never picked.
        threshold = (uniforms * cumulative[:, -1]).unsqueeze(-1)
        token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
        return token, probabilities.gather(-1, token.unsqueeze(-1)).squeeze(-1).log()

    def _cut(self, logits: Tensor) -> Tensor:
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            probabilities = ordered.softmax(-1)
            beyond = probabilities.cumsum(-1) - probabilities >= self.top_p  # the first token always stays
            logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
        return logits


def next_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    """Logits (B, V) of the token after ``ids`` (B, T), whose keys and values go to the cache of those before them.

    ``mask`` is that of all tokens so far, ``positions`` (B, T) are those of ``ids``.
    """
    # As a tensor: a number makes transformers take a slice, and a product of a strided slice with the head copies the
    # head for every row (1.8 GB at 32 rows of SmolLM2).
    last = torch.tensor([ids.shape[1] - 1], device=ids.device)
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=last,
    ).logits[:, -1]  # fmt: skip


def _runs(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first of each run of equal prompts (R,), and for every prompt the number of its run (B,)."""
    starts = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    starts[1:] = ((ids[1:] != ids[:-1]) | (mask[1:] != mask[:-1])).any(-1)
    return starts.nonzero().squeeze(-1), starts.long().cumsum(0) - 1


def position_ids(mask: Tensor) -> Tensor:
    """Positions (B, S) counted over real tokens only: the padding on the left does not shift them."""
    return (mask.long().cumsum(-1) - 1).clamp_(min=0)
