"""Rewards, one file per kind, and what their scores go through."""

from lit_rlhf.rewards.composite import CompositeReward
from lit_rlhf.rewards.function import FunctionReward
from lit_rlhf.rewards.keyword import KeywordReward
from lit_rlhf.rewards.length import LengthReward
from lit_rlhf.rewards.model import ModelReward
from lit_rlhf.rewards.shaping import ScoreShaper
from lit_rlhf.rewards.vader import VaderReward

__all__ = [
    "CompositeReward",
    "FunctionReward",
    "KeywordReward",
    "LengthReward",
    "ModelReward",
    "ScoreShaper",
    "VaderReward",
]
