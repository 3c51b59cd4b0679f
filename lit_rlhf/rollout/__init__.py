"""Rollouts: the sampler, its counter-based randomness, and the buffer that the fit loop iterates."""

from lit_rlhf.rollout.loader import RolloutLoader
from lit_rlhf.rollout.sampler import Sampler

__all__ = ["RolloutLoader", "Sampler"]
