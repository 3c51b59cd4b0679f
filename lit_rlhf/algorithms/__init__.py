"""Algorithms: one file each, on the online or the offline base."""

from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reward_model import RewardModel
from lit_rlhf.algorithms.sft import SFT

__all__ = ["PPO", "SFT", "RewardModel"]
