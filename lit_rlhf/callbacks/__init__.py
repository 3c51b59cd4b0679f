"""What watches a run: checkpoints, samples, distributions, progress, evaluation, guards of the KL and of the reward."""

from lit_rlhf.callbacks.checkpoints import Checkpoints
from lit_rlhf.callbacks.distributions import Distributions
from lit_rlhf.callbacks.evaluation import Evaluation
from lit_rlhf.callbacks.hacking import HackingMonitor
from lit_rlhf.callbacks.kl_guard import KLGuard
from lit_rlhf.callbacks.progress import Progress
from lit_rlhf.callbacks.samples import Samples

__all__ = ["Checkpoints", "Distributions", "Evaluation", "HackingMonitor", "KLGuard", "Progress", "Samples"]
