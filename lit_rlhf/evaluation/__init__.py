"""What says whether a policy became better: torchmetrics classes, usable alone, put together over processes."""

from lit_rlhf.evaluation.completions import EmptyRate, RefusalRate
from lit_rlhf.evaluation.diversity import DistinctN, SelfBLEU
from lit_rlhf.evaluation.perplexity import Perplexity
from lit_rlhf.evaluation.preference import PairAccuracy, WinRate
from lit_rlhf.evaluation.statistics import Interval, bootstrap
from lit_rlhf.evaluation.verifier import PassAtK
from lit_rlhf.student import half_width

__all__ = [
    "DistinctN", "EmptyRate", "Interval", "PairAccuracy", "PassAtK", "Perplexity", "RefusalRate", "SelfBLEU", "WinRate",
    "bootstrap", "half_width",
]  # fmt: skip
