"""What `lit-rlhf estimate` works with: traced operations, what they take on a machine, the stages that they make up."""

from lit_rlhf.estimation.roofline import Machine, ThisMachine

__all__ = ["Machine", "ThisMachine"]
