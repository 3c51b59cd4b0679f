"""Human judgements of sentiment: 23,419 short texts, each scored by 15 to 99 people.

Source: C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text", ICWSM 2014. A rater scores a text by a whole number from -4 (extremely negative) to 4 (extremely positive).

What the files hold (checked by `pytest -m real`):

| domain | file stem            | rows   | kept   | texts  | raters a text | scores  |
|--------|----------------------|--------|--------|--------|---------------|---------|
| movies | movieReviewSnippets  | 10,605 | 10,605 | 10,603 | 15 to 29      | 198,810 |
| tweets | tweets               |  4,200 |  4,001 |  4,001 | 20 to 99      | 140,663 |
| amazon | amazonReviewSnippets |  3,708 |  3,708 |  3,697 | 20            |  74,160 |
| nyt    | nytEditorialSnippets |  5,190 |  5,190 |  5,118 | 20            | 103,800 |

`<stem>_GroundTruth.txt` has id, mean, text; `<stem>_anonDataRatings.txt` has id, mean, deviation, list of scores.
Both are UTF-8 with CRLF, tab-separated, without a header or a final newline.

- Rows are joined by id, never by place: in amazon, 21 rows stand in another order, and the ratings file opens with a
  byte-order mark that would otherwise become a part of the first id.
- In tweets, 199 ids have scores whose mean is not the published one (by up to 1.13). They are the contrived variants
  of a few sentences ("Yay." "YAY!" "YAY!!!"), whose published means seem to come from another round of rating. They
  are left out: nobody can say which raters judged which text. In every other row the two agree to 1e-6.
- HTML entities are unescaped, some of them twice (`&amp;#39;`); runs of blanks become one.
- A text that occurs twice (2 in movies, 11 in amazon, 72 in nyt) becomes one snippet with the raters of both.
"""

import hashlib
import html
import json
import math
import re
import statistics
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lit_rlhf.errors import UserError
from lit_rlhf.models.download import cache_dir
from lit_rlhf.models.sources import RATING_KINDS, RATING_STEMS, fetch

SPLITS = ("train", "validation", "test")
SCALE = range(-4, 5)
MEAN_TOLERANCE = 1e-6  # the files round means to nine digits or more


@dataclass(frozen=True)
class RatedSnippet:
    """A text and what its raters thought of it.

    Attributes:
        id: the source's id; of a text that occurs twice, the first one.
        text: entities unescaped, blanks collapsed.
        mean: the mean of `ratings`, in [-4, 4].
        ratings: every rater's own score, whole numbers from -4 to 4.
    """

    id: str
    text: str
    mean: float
    ratings: tuple[int, ...]


class HumanRatings:
    """The rated snippets of one domain, in three fixed splits of about 80, 10 and 10 %.

    A snippet's split is a hash of its normalised text: letters and digits alone, lower case. So it depends on neither
    order nor seed, and variants of one text ("Wow." "WOW!!!") are never on both sides.

    Args:
        domain: movies, tweets, amazon or nyt.

    Raises:
        UserError: there is no such domain.
    """

    def __init__(self, domain: str = "movies") -> None:
        if domain not in RATING_STEMS:
            raise UserError(f"domain={domain!r}: there is no such domain; choose from {', '.join(RATING_STEMS)}")
        self.domain = domain

    def prepare(self) -> None:
        """Fetches the data unless the domain's two files are already in the cache."""
        if not self._present():
            fetch("human_ratings")
        if not self._present():  # somebody deleted a file of a cache that was complete
            fetch("human_ratings", force=True)

    def load(self, split: str) -> list[RatedSnippet]:
        """The snippets of `train`, `validation` or `test`, in the fixed order of their hashes.

        Raises:
            UserError: no such split; a file is missing, cut short or garbled (names the file and the line).
        """
        if split not in SPLITS:
            raise UserError(f"split={split!r}: there is no such split; choose from {', '.join(SPLITS)}")
        return [snippet for snippet in self._snippets if split_of(snippet.text) == split]

    def _present(self) -> bool:
        return all(path.is_file() for path in self._paths)

    @property
    def _paths(self) -> list[Path]:
        stem = RATING_STEMS[self.domain]
        return [cache_dir() / "human_ratings" / f"{stem}_{kind}.txt" for kind in RATING_KINDS]

    @cached_property
    def _snippets(self) -> list[RatedSnippet]:
        snippets = join_ratings(*self._paths)
        return sorted(snippets, key=lambda snippet: (_hash(normalise(snippet.text)), snippet.id))


def join_ratings(truth_path: Path, ratings_path: Path) -> list[RatedSnippet]:
    """Joins the two files of a domain by id, as the module's docstring says.

    Raises:
        UserError: a file is missing, cut short or garbled; names the file and the line.
    """
    scores = _read_ratings(ratings_path)
    raters: dict[str, list[int]] = {}
    first_id: dict[str, str] = {}
    seen = set()
    for number, (key, mean, text) in _rows(truth_path, columns=3):
        if key in seen:
            raise _garbled(truth_path, number, f"the id {key!r} occurs twice")
        if key not in scores:
            raise _garbled(truth_path, number, f"the id {key!r} has no row in {ratings_path.name}")
        seen.add(key)
        published = _number(mean, truth_path, number)
        if abs(statistics.fmean(scores[key]) - published) > MEAN_TOLERANCE:
            continue
        if not (text := clean(text)):
            raise _garbled(truth_path, number, "the text is empty")
        first_id.setdefault(text, key)
        raters.setdefault(text, []).extend(scores[key])
    if missing := [key for key in scores if key not in seen]:
        raise _garbled(truth_path, len(seen), f"the file ends here, but {ratings_path.name} has {missing[0]!r} too")
    return [
        RatedSnippet(first_id[text], text, statistics.fmean(ratings), tuple(ratings))
        for text, ratings in raters.items()
    ]


def clean(text: str) -> str:
    """Entities unescaped (twice, for some were escaped twice), runs of blanks made one."""
    return " ".join(html.unescape(html.unescape(text)).split())


def normalise(text: str) -> str:
    """What counts as the same text when splitting: letters and digits alone, lower case; or else the text."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(words) or text


def split_of(text: str) -> str:
    """train, validation or test, by the hash of the normalised text: 8, 1 and 1 of ten."""
    tenth = _hash(normalise(text)) % 10
    return SPLITS[max(0, tenth - 7)]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest())


def _read_ratings(path: Path) -> dict[str, tuple[int, ...]]:
    ratings = {}
    for number, (key, mean, _deviation, listed) in _rows(path, columns=4):
        if key in ratings:
            raise _garbled(path, number, f"the id {key!r} occurs twice")
        try:
            scores = json.loads(listed)
        except ValueError:
            scores = None
        if not (isinstance(scores, list) and scores and all(score in SCALE for score in scores)):
            raise _garbled(path, number, f"{listed[-40:]!r} does not end a list of whole numbers from -4 to 4")
        if abs(statistics.fmean(scores) - _number(mean, path, number)) > MEAN_TOLERANCE:
            raise _garbled(path, number, f"the scores' mean is not {mean}")
        ratings[key] = tuple(scores)
    return ratings


def _rows(path: Path, columns: int) -> Iterator[tuple[int, list[str]]]:
    """Line numbers from 1, and the line's columns."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. {_REMEDY}") from error
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").split(b"\n"), start=1):
        try:
            row = line.decode().rstrip("\r").split("\t")
        except UnicodeDecodeError as error:
            raise _garbled(path, number, "it is not UTF-8") from error
        if len(row) != columns:
            raise _garbled(path, number, f"it has {len(row)} tab-separated columns instead of {columns}")
        yield number, row


def _number(text: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not SCALE[0] <= value <= SCALE[-1]:
        raise _garbled(path, line, f"the mean {text!r} is not a number from -4 to 4")
    return value


_REMEDY = "Run `lit-rlhf fetch human_ratings --force`."


def _garbled(path: Path, line: int, problem: str) -> UserError:
    return UserError(f"{path}, line {line}: {problem}. {_REMEDY}")
