"""What watches a run: samples, distributions, progress bars."""

from lit_rlhf.callbacks.distributions import Distributions
from lit_rlhf.callbacks.progress import Progress
from lit_rlhf.callbacks.samples import Samples

__all__ = ["Distributions", "Progress", "Samples"]
