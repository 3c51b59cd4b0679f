"""What watches a run: checkpoints, samples, distributions, progress bars."""

from lit_rlhf.callbacks.checkpoints import Checkpoints
from lit_rlhf.callbacks.distributions import Distributions
from lit_rlhf.callbacks.progress import Progress
from lit_rlhf.callbacks.samples import Samples

__all__ = ["Checkpoints", "Distributions", "Progress", "Samples"]
