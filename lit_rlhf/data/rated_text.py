"""Single texts from the human ratings: for SFT, as prompts for the online algorithms, as rated completions."""

from lit_rlhf.data.base import RatingsData, Row, require_positive
from lit_rlhf.data.human_ratings import SPLITS
from lit_rlhf.errors import UserError


class HumanRatingsText(RatingsData):
    """Rated texts, for example for SFT. Batches: `text`, a list of str, and `mean`, a tensor (B,).

    Args:
        domain: movies, tweets, amazon or nyt.
        batch_size: texts in a batch.
        min_mean: keep only texts whose mean rating (-4 to 4) is at least this.
        limit: keep at most so many texts of each split.

    Raises:
        UserError: a bad argument; at `setup`, a split is empty after filtering.
    """

    def __init__(
        self,
        *,
        domain: str = "movies",
        batch_size: int = 32,
        min_mean: float | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(domain, batch_size)
        if limit is not None:
            require_positive(limit=limit)
        self.min_mean = min_mean
        self.limit = limit

    def make_rows(self) -> dict[str, list[Row]]:
        return {split: self._rows_of(split) for split in SPLITS}

    def _rows_of(self, split: str) -> list[Row]:
        snippets = self.ratings.load(split)
        kept = [snippet for snippet in snippets if self.min_mean is None or snippet.mean >= self.min_mean]
        if not kept:
            raise UserError(
                f"min_mean={self.min_mean} leaves none of the {len(snippets)} {split} snippets of {self.ratings.domain}"
            )
        return [{"text": snippet.text, "mean": snippet.mean} for snippet in kept[: self.limit]]


class HumanRatingsPrompts(RatingsData):
    """Openings of snippets that neither SFT nor the reward model trained on, for the policy to complete.

    A prompt is the first words of a snippet. Batches: `prompt` and `snippet` (the whole text), lists of str, and
    `mean`, the tensor (B,) of the snippets' mean ratings. Every prompt occurs once, and no evaluation prompt is a
    training prompt.

    Args:
        domain: movies, tweets, amazon or nyt.
        batch_size: prompts in a batch.
        prompt_words: words, separated by blanks, in a prompt.
        min_words: a shorter snippet gives no prompt; by default twice `prompt_words`.
        split: the split of the training prompts.
        eval_split: the split of the prompts for validation and test.
        eval_prompts: at most so many of those; the same ones every time.

    Raises:
        UserError: a bad argument; at `setup`, no snippet is long enough.
    """

    def __init__(
        self,
        *,
        domain: str = "movies",
        batch_size: int = 32,
        prompt_words: int = 4,
        min_words: int | None = None,
        split: str = "validation",
        eval_split: str = "test",
        eval_prompts: int = 200,
    ) -> None:
        super().__init__(domain, batch_size)
        require_positive(prompt_words=prompt_words, eval_prompts=eval_prompts)
        min_words = 2 * prompt_words if min_words is None else min_words
        if min_words <= prompt_words:
            raise UserError(
                f"min_words={min_words} must exceed prompt_words={prompt_words}: nothing is left to complete"
            )
        for name in (split, eval_split):
            if name not in SPLITS:
                raise UserError(f"there is no split {name!r}; choose from {', '.join(SPLITS)}")
        if split == eval_split:
            raise UserError(f"split and eval_split are both {split!r}: evaluation needs prompts of its own")
        self.prompt_words = prompt_words
        self.min_words = min_words
        self.split = split
        self.eval_split = eval_split
        self.eval_prompts = eval_prompts

    def make_rows(self) -> dict[str, list[Row]]:
        held_out = self._prompts(self.eval_split)[: self.eval_prompts]
        taken = {row["prompt"] for row in held_out}
        train = [row for row in self._prompts(self.split) if row["prompt"] not in taken]
        if not train:
            raise UserError(
                f"every {self.split} prompt of {self.ratings.domain} is one of the {len(held_out)} evaluation "
                f"prompts too; raise prompt_words={self.prompt_words}"
            )
        return {"train": train, "validation": held_out, "test": held_out}

    def _prompts(self, split: str) -> list[Row]:
        """For each prompt its first snippet, in the fixed order of the snippets."""
        snippets = self.ratings.load(split)
        rows: dict[str, Row] = {}
        for snippet in snippets:
            words = snippet.text.split()
            if len(words) >= self.min_words:
                prompt = " ".join(words[: self.prompt_words])
                rows.setdefault(prompt, {"prompt": prompt, "snippet": snippet.text, "mean": snippet.mean})
        if not rows:
            raise UserError(
                f"min_words={self.min_words} leaves none of the {len(snippets)} {split} snippets of "
                f"{self.ratings.domain}"
            )
        return list(rows.values())


class HumanRatingsCompletions(RatingsData):
    """Snippets cut in two, opening and rest, with what their raters thought: for KTO, ILQL and deep Q-learning.

    Batches: `prompt`, the first words, and `completion`, the rest with the blank before it, lists of str; `reward`, the
    tensor (B,) of the mean ratings (-4 to 4); `label`, a list of bool, whether that is above 0.

    Args:
        domain: movies, tweets, amazon or nyt.
        batch_size: rows in a batch.
        prompt_words: words, separated by blanks, in a prompt; a snippet without any more is left out.

    Raises:
        UserError: a bad argument; at `setup`, no snippet is long enough.
    """

    def __init__(self, *, domain: str = "movies", batch_size: int = 32, prompt_words: int = 4) -> None:
        super().__init__(domain, batch_size)
        require_positive(prompt_words=prompt_words)
        self.prompt_words = prompt_words

    def make_rows(self) -> dict[str, list[Row]]:
        return {split: self._rows_of(split) for split in SPLITS}

    def _rows_of(self, split: str) -> list[Row]:
        rows = []
        for snippet in self.ratings.load(split):
            words = snippet.text.split()
            if len(words) > self.prompt_words:
                opening, rest = words[: self.prompt_words], words[self.prompt_words :]
                text = {"prompt": " ".join(opening), "completion": " " + " ".join(rest)}
                rows.append({**text, "reward": snippet.mean, "label": snippet.mean > 0})
        if not rows:
            raise UserError(
                f"data.prompt_words={self.prompt_words} leaves no completion in the {split} snippets of "
                f"{self.ratings.domain}"
            )
        return rows
