"""Policies, critics, references, and where their weights come from."""

from lit_rlhf.models.critic import SeparateCritic, ValueHead
from lit_rlhf.models.policy import Policy, PolicyOutput
from lit_rlhf.models.reference import make_reference

__all__ = ["Policy", "PolicyOutput", "SeparateCritic", "ValueHead", "make_reference"]
