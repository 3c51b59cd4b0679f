"""Data: human ratings, the LightningDataModules on them, and prompts from configs, files, datasets and arithmetic."""

from lit_rlhf.data.arithmetic import ArithmeticPrompts
from lit_rlhf.data.dataset import DatasetPrompts
from lit_rlhf.data.human_ratings import HumanRatings, RatedSnippet
from lit_rlhf.data.prompts import ListPrompts
from lit_rlhf.data.rated_pairs import HumanRatingsPairs, HumanRatingsScores
from lit_rlhf.data.rated_text import HumanRatingsCompletions, HumanRatingsPrompts, HumanRatingsText

__all__ = [
    "ArithmeticPrompts",
    "DatasetPrompts",
    "HumanRatings",
    "HumanRatingsCompletions",
    "HumanRatingsPairs",
    "HumanRatingsPrompts",
    "HumanRatingsScores",
    "HumanRatingsText",
    "ListPrompts",
    "RatedSnippet",
]
