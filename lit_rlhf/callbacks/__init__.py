"""What watches a run: samples, progress bars."""

from lit_rlhf.callbacks.progress import Progress
from lit_rlhf.callbacks.samples import Samples

__all__ = ["Progress", "Samples"]
