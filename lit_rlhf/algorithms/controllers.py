"""Stage 8: what an online algorithm adapts from one iteration to the next, and logs of it."""

import math
from typing import TYPE_CHECKING

import torch

from lit_rlhf.distributed import gather, rank, world_size
from lit_rlhf.functional import kl_estimate
from lit_rlhf.functional.masked import zero_masked

if TYPE_CHECKING:
    from lit_rlhf.algorithms.online import OnlineAlgorithm


def update_controllers(algorithm: "OnlineAlgorithm", row: dict[str, float]) -> None:
    """Lets whatever follows a measurement follow those of this iteration, in ``row``."""
    clip = algorithm.clip
    if math.isfinite(row["objective/kl"]):  # else no step was taken, and the controllers stay as they are
        algorithm.kl.update(row["objective/kl"], algorithm.rollout_batch_size)
    if clip is not None and clip.follows_kl:
        row["policy/update_kl"] = update_kl(algorithm)
        if math.isfinite(row["policy/update_kl"]):
            clip.update(row["policy/update_kl"])
    if algorithm.entropy is not None and "policy/entropy" in row:  # not if every step was skipped
        algorithm.entropy.update(row["policy/entropy"])


@torch.no_grad()
def update_kl(algorithm: "OnlineAlgorithm") -> float:
    """KL(rollout policy || policy) over the iteration's tokens, in nats per token: how far the updates went."""
    experience, size, total, count = algorithm.loader.experience, algorithm.minibatch_size, 0.0, 0.0
    with algorithm.autocast_for_many():
        for start in range(0, len(experience), size):
            batch = experience[start : start + size][rank() :: world_size()].to(algorithm.device)
            mask = batch.response_mask
            tokens = (batch.prompt_ids, batch.prompt_mask, batch.response_ids, mask)
            output = algorithm.policy(*tokens, temperature=algorithm.temperature)
            # The tokens are the old policy's: k3 estimates its KL to the new one.
            kl = kl_estimate(zero_masked(batch.logprobs, mask), zero_masked(output.logprobs, mask), "k3")
            total, count = total + float(kl.sum()), count + float(mask.sum())
    totals, counts = zip(*gather((total, count)), strict=True)
    return sum(totals) / sum(counts)


def schedule_metrics(algorithm: "OnlineAlgorithm") -> dict[str, float]:
    """Coefficients of this iteration that follow a schedule."""
    metrics: dict[str, float | None] = {}
    if algorithm.clip is not None:
        bounds = algorithm.clip.at(algorithm.progress)
        metrics |= {"clip/low": bounds.low, "clip/high": bounds.high, "clip/penalty": bounds.penalty}
    if algorithm.entropy is not None:
        metrics["entropy/coef"] = algorithm.entropy.at(algorithm.progress)
    return {name: value for name, value in metrics.items() if value is not None}
