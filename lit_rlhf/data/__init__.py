"""Data: human ratings, the LightningDataModules on them, and prompts written into a config."""

from lit_rlhf.data.human_ratings import HumanRatings, RatedSnippet
from lit_rlhf.data.prompts import ListPrompts
from lit_rlhf.data.rated_pairs import HumanRatingsPairs, HumanRatingsScores
from lit_rlhf.data.rated_text import HumanRatingsPrompts, HumanRatingsText

__all__ = [
    "HumanRatings",
    "HumanRatingsPairs",
    "HumanRatingsPrompts",
    "HumanRatingsScores",
    "HumanRatingsText",
    "ListPrompts",
    "RatedSnippet",
]
