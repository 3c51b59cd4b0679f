"""Algorithms: one file each, on the online or the offline base."""

from lit_rlhf.algorithms.a2c import A2C
from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.algorithms.dqn import DQN
from lit_rlhf.algorithms.dr_grpo import DrGRPO
from lit_rlhf.algorithms.expert_iteration import ExpertIteration
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.gspo import GSPO
from lit_rlhf.algorithms.ilql import ILQL
from lit_rlhf.algorithms.ipo import IPO
from lit_rlhf.algorithms.kto import KTO
from lit_rlhf.algorithms.online_dpo import OnlineDPO
from lit_rlhf.algorithms.orpo import ORPO
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.raft import RAFT
from lit_rlhf.algorithms.reinforce import Reinforce
from lit_rlhf.algorithms.reinforce_pp import ReinforcePP
from lit_rlhf.algorithms.reward_model import RewardModel
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.algorithms.robust_dpo import RobustDPO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.algorithms.trpo import TRPO

__all__ = [
    "A2C",
    "DAPO",
    "DPO",
    "DQN",
    "GRPO",
    "GSPO",
    "ILQL",
    "IPO",
    "KTO",
    "ORPO",
    "PPO",
    "RAFT",
    "RLOO",
    "SFT",
    "TRPO",
    "DrGRPO",
    "ExpertIteration",
    "OnlineDPO",
    "Reinforce",
    "ReinforcePP",
    "RewardModel",
    "RobustDPO",
]
