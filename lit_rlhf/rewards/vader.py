"""The VADER lexicon as a reward or a gold judge."""

from collections.abc import Sequence
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from lit_rlhf.rewards.text import Scope, check_scope, texts_to_score


class VaderReward:
    """Compound sentiment of the VADER lexicon, in [-1, 1] (Hutto & Gilbert, ICWSM 2014).

    Args:
        on: ``text`` scores the prompt with its completion, ``completion`` the completion alone.

    Raises:
        UserError: another value of ``on``.
    """

    name = "vader"

    def __init__(self, *, on: Scope = "text") -> None:
        self.on = check_scope(on)
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **_columns: Any) -> list[float]:
        texts = texts_to_score(prompts, completions, self.on)
        return [self._analyzer.polarity_scores(text)["compound"] for text in texts]
