"""Signs of reward hacking: what each measures of an iteration's completions, and when that is more than chance."""

from lit_rlhf.hacking.detectors import (
    Collapse,
    Disagreement,
    EntropyFalls,
    GoldFalls,
    KLSpeed,
    LengthGain,
    Novelty,
    Phrase,
    Repetition,
    default_detectors,
)
from lit_rlhf.hacking.statistics import Baseline, Cusum, Detector, Iteration, Reading, Rise

__all__ = [
    "Baseline",
    "Collapse",
    "Cusum",
    "Detector",
    "Disagreement",
    "EntropyFalls",
    "GoldFalls",
    "Iteration",
    "KLSpeed",
    "LengthGain",
    "Novelty",
    "Phrase",
    "Reading",
    "Repetition",
    "Rise",
    "default_detectors",
]
