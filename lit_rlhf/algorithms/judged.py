"""What is measured about completions: a rollout with its scores and anchors, its metrics and its rows of samples."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_rlhf.batch import PromptBatch, Rollout
from lit_rlhf.data.prompts import as_lines
from lit_rlhf.errors import UserError
from lit_rlhf.functional import masked_mean
from lit_rlhf.rewards.scoring import Scores


class Anchors(NamedTuple):
    """Stage 3: what the frozen models say about a rollout, on the CPU: (B, T), but values (B, T + 1) or None."""

    logprobs: Tensor
    ref_logprobs: Tensor
    kl: Tensor  # to the reference, 0 where the mask is False
    values: Tensor | None


class Judged(NamedTuple):
    """A rollout with its texts and stages 2 and 3: everything that is measured about completions."""

    prompts: PromptBatch
    rollout: Rollout
    completions: list[str]
    scores: Scores
    gold: Scores
    anchors: Anchors


def decode_completions(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of the responses, decoded behind their prompts: some tokenizers drop a blank that begins a text."""
    texts = []
    for prompt, prompt_mask, ids, mask in zip(
        rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.response_mask, strict=True
    ):
        before = tokenizer.decode(prompt[prompt_mask], skip_special_tokens=True)
        both = tokenizer.decode(torch.cat([prompt[prompt_mask], ids[mask]]), skip_special_tokens=True)
        alone = tokenizer.decode(ids[mask], skip_special_tokens=True)
        texts.append(both[len(before) :] if both.startswith(before) else alone)
    return texts


def cat_judged(parts: list[Judged], count: int | None = None) -> Judged:
    """The first ``count`` completions, by default all, of several batches as one, padded to the widest."""
    if len(parts) == 1 and count is None:
        return parts[0]
    widest = max(part.rollout.response_ids.shape[1] for part in parts)

    def cat(tensors: list[Tensor], extra: int = 0) -> Tensor:
        wide = widest + extra
        padded = [x if x.ndim == 1 else nn.functional.pad(x, (0, wide - x.shape[1])) for x in tensors]
        return torch.cat(padded)[:count]

    def cat_scores(scores: list[Scores]) -> Scores:
        components = {name: cat([x.components[name] for x in scores]) for name in scores[0].components}
        return Scores(components, scores[0].weights)

    return Judged(
        PromptBatch.cat([part.prompts for part in parts])[:count],
        Rollout.cat([part.rollout for part in parts])[:count],
        [text for part in parts for text in part.completions][:count],
        cat_scores([part.scores for part in parts]),
        cat_scores([part.gold for part in parts]),
        Anchors(
            cat([part.anchors.logprobs for part in parts]),
            cat([part.anchors.ref_logprobs for part in parts]),
            cat([part.anchors.kl for part in parts]),
            None if parts[0].anchors.values is None else cat([part.anchors.values for part in parts], extra=1),
        ),
    )


def describe(judged: Judged, coef: float, *, charged: bool = True) -> dict[str, float]:
    """The metrics of a rollout; every mean over tokens is taken with the response mask.

    ``charged`` says whether the rewards pay for the KL, ``coef`` a nat; in the loss it is no part of them.
    """
    rollout, anchors, mask = judged.rollout, judged.anchors, judged.rollout.response_mask
    scores = judged.scores.total
    kl = anchors.kl.sum(-1)
    penalty = coef * kl.mean() if charged else torch.zeros(())
    lengths = rollout.lengths.float()
    metrics = {
        "objective/kl": kl.mean(),
        "objective/kl_per_token": masked_mean(anchors.kl, mask),
        "objective/kl_coef": coef,
        "objective/entropy": torch.where(mask, -anchors.logprobs, 0.0).sum(-1).mean(),
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(correction=0),
        "objective/non_score_reward": -penalty,
        "objective/rlhf_reward": scores.mean() - penalty,
        "rollout/response_length": lengths.mean(),
        "rollout/prompt_length": rollout.prompt_mask.sum(-1).float().mean(),
        "rollout/eos_rate": rollout.finished.float().mean(),
        "rollout/truncated_rate": (~rollout.finished).float().mean(),
        "rollout/logprob_gap": masked_mean((rollout.logprobs - anchors.logprobs).abs(), mask),
    }
    for prefix, judge in (("reward", judged.scores), ("gold", judged.gold)):
        for name, values in judge.components.items():
            metrics[f"{prefix}/{name}"] = per_completion(values).mean()
            if name in judge.weights:
                metrics[f"{prefix}/{name}/weighted"] = judge.weight(name) * metrics[f"{prefix}/{name}"]
    return {name: float(value) for name, value in metrics.items()}


def sample_rows(judged: Judged, iteration: int, split: str) -> list[dict[str, Any]]:
    """One JSON-ready dict per completion, as in ``samples.jsonl``."""
    scores, kl, lengths = judged.scores.total, judged.anchors.kl.sum(-1), judged.rollout.lengths
    parts = {
        key: {name: per_completion(values) for name, values in judge.components.items()}
        for key, judge in (("components", judged.scores), ("gold", judged.gold))
    }
    return [
        {
            "iteration": iteration,
            "split": split,
            "prompt": as_lines(prompt),
            "completion": completion,
            "score": float(scores[i]),
            **{key: {name: float(values[i]) for name, values in named.items()} for key, named in parts.items()},
            "kl": float(kl[i]),
            "length": int(lengths[i]),
        }
        for i, (prompt, completion) in enumerate(zip(judged.prompts.prompts, judged.completions, strict=True))
    ]


def per_completion(values: Tensor) -> Tensor:
    """(B,): the scores of completions; those of tokens, (B, T), summed."""
    return values.sum(-1) if values.ndim == 2 else values


def mask_dense(scores: Scores, mask: Tensor) -> Scores:
    """The same scores, with those of tokens (B, T) 0 where the mask is False.

    Raises:
        UserError: token rewards of another shape than the responses.
    """
    masked = {}
    for name, values in scores.components.items():
        if values.ndim == 2 and values.shape != mask.shape:
            raise UserError(
                f"reward '{name}' returned token rewards of shape {tuple(values.shape)}; the responses have "
                f"{tuple(mask.shape)}"
            )
        masked[name] = torch.where(mask, values, 0.0) if values.ndim == 2 else values
    return scores._replace(components=masked)
