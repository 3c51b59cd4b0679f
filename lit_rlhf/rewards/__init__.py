"""Rewards, one file per kind, and what their scores go through."""

from lit_rlhf.rewards.composite import CompositeReward
from lit_rlhf.rewards.constraint import ConstrainedReward
from lit_rlhf.rewards.ensemble import EnsembleReward
from lit_rlhf.rewards.function import FunctionReward
from lit_rlhf.rewards.json_valid import JsonReward
from lit_rlhf.rewards.judge import JudgeComparison, JudgeReward
from lit_rlhf.rewards.keyword import KeywordReward
from lit_rlhf.rewards.length import LengthReward
from lit_rlhf.rewards.model import ModelReward
from lit_rlhf.rewards.prefix import PrefixReward
from lit_rlhf.rewards.regex import RegexReward
from lit_rlhf.rewards.remote import RemoteReward
from lit_rlhf.rewards.repetition import DistinctReward, RepetitionPenalty
from lit_rlhf.rewards.shaping import ScoreShaper
from lit_rlhf.rewards.vader import VaderReward
from lit_rlhf.rewards.verifier import VerifierReward

__all__ = [
    "CompositeReward",
    "ConstrainedReward",
    "DistinctReward",
    "EnsembleReward",
    "FunctionReward",
    "JsonReward",
    "JudgeComparison",
    "JudgeReward",
    "KeywordReward",
    "LengthReward",
    "ModelReward",
    "PrefixReward",
    "RegexReward",
    "RemoteReward",
    "RepetitionPenalty",
    "ScoreShaper",
    "VaderReward",
    "VerifierReward",
]
