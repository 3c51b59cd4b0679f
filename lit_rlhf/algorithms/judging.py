"""Stages 1 to 3: prompts are completed, the completions scored, and what policy and reference say of them noted."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rlhf.algorithms.attempts import raise_together
from lit_rlhf.algorithms.judged import Anchors, Judged, cat_judged, decode_completions, mask_dense
from lit_rlhf.batch import PromptBatch, Rollout
from lit_rlhf.data.tokenize import Row, tokenize_prompts
from lit_rlhf.distributed import gather, rank, share, world_size
from lit_rlhf.generators import seeded
from lit_rlhf.rewards.scoring import Scores, require_columns, score
from lit_rlhf.rollout.philox import derive_seed

if TYPE_CHECKING:
    from lit_rlhf.algorithms.online import OnlineAlgorithm

_SCORE_STREAM = 2  # keeps the random numbers of rewards apart from others


def judge(algorithm: "OnlineAlgorithm", rows: list[Row], episodes: Tensor, seed: int) -> Judged:
    """Stages 1 to 3 for all rows; every process takes its share, and holds the whole at the end."""
    prompts = tokenize_prompts(
        rows,
        algorithm.policy.tokenizer,
        episodes=episodes,
        max_new_tokens=algorithm.sampler.max_new_tokens,
        context_length=algorithm.policy.context_length,
    )
    part = _judge_share(algorithm, prompts[share(len(rows), rank(), world_size())], seed)
    if world_size() == 1:
        return part
    with algorithm.phase("gather"):
        return cat_judged(gather(part), len(rows))


def _judge_share(algorithm: "OnlineAlgorithm", prompts: PromptBatch, seed: int) -> Judged:
    """Stages 1 to 3 for the prompts of this process."""
    judges = {"reward": algorithm.reward, "gold": algorithm.gold}
    judges = {key: judge for key, judge in judges.items() if judge is not None}
    for key, judge in judges.items():
        require_columns(key, judge, prompts.columns)
    tokenizer = algorithm.policy.tokenizer
    with algorithm.phase("rollout"):
        rollout = algorithm.rollout(prompts, seed)
    completions = decode_completions(rollout, tokenizer)
    ids = [row[mask].tolist() for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    # A reward that draws random numbers draws the same ones in a resumed run.
    judged, failure = {}, None
    with algorithm.phase("score"), seeded(derive_seed(seed, _SCORE_STREAM, int(prompts.episodes[0]))):
        try:
            judged = {
                key: score(judge, prompts.prompts, completions, prompts.columns, ids, tokenizer)
                for key, judge in judges.items()
            }
            judged = {key: mask_dense(scores, rollout.response_mask) for key, scores in judged.items()}
        except Exception as error:
            failure = error
    raise_together(failure)
    with algorithm.phase("anchor"):
        anchors = algorithm.anchor(rollout)
    return Judged(prompts, rollout, completions, judged["reward"], judged.get("gold", Scores({}, {})), anchors)


def complete(algorithm: "OnlineAlgorithm", prompts: PromptBatch, seed: int) -> Rollout:
    """Stage 1, on the policy's device; the result is on the CPU."""
    policy, sampler, device = algorithm.policy, algorithm.sampler, algorithm.device
    model = policy.decoder(algorithm.decode_dtype)
    training = model.training
    model.eval()  # in train mode gradient checkpointing would switch the KV cache off
    with torch.autocast(device.type, enabled=False):
        rollout = algorithm.halving.run(
            "rollout",
            sampler.chunk_size or len(prompts),
            lambda size: sampler.generate(
                model,
                prompts.to(device),
                seed=seed,
                stop_ids=policy.stop_ids,
                pad_id=policy.tokenizer.pad_token_id,
                progress=lambda done, whole: algorithm.call_hook("on_phase", "rollout", done, whole),
                chunk_size=size,
            ),
            allowed=algorithm.forwards_alone,
        )
    model.train(training)
    policy.free_decoder()
    return rollout.to("cpu")


def anchor(algorithm: "OnlineAlgorithm", rollout: Rollout) -> Anchors:
    """Stage 3: log-probabilities by the training forward pass, in its precision, so that the first ratio is 1."""
    rows = min(algorithm.minibatch_size, len(rollout))
    return algorithm.halving.run("anchor", rows, partial(_anchor, algorithm, rollout), allowed=algorithm.forwards_alone)


def _anchor(algorithm: "OnlineAlgorithm", rollout: Rollout, size: int) -> Anchors:
    parts: list[tuple[Tensor, ...]] = []
    starts = range(0, len(rollout), size)
    with algorithm.autocast_for_many():
        for number, start in enumerate(starts):
            algorithm.call_hook("on_phase", "anchor", number, len(starts))
            part = rollout[start : start + size].to(algorithm.device)
            tokens = (part.prompt_ids, part.prompt_mask, part.response_ids, part.response_mask)
            output, reference = algorithm.both(*tokens)
            values = [algorithm.critic(output, *tokens)] if algorithm.critic is not None else []
            kl = algorithm.kl_of(output, reference.logprobs, reference.logits, part.response_mask)
            parts.append((output.logprobs, reference.logprobs, kl, *values))
    logprobs, ref_logprobs, kl, *values = (torch.cat(column).float().cpu() for column in zip(*parts, strict=True))
    return Anchors(logprobs, ref_logprobs, kl, values[0] if values else None)
