"""Reading the rated snippets: the join, the cleaning, the splits, and broken files."""

import random

import pytest

from lit_rlhf.data import HumanRatings
from lit_rlhf.data.human_ratings import SPLITS, RatedSnippet, clean, split_of
from lit_rlhf.errors import UserError


def everything(domain: str = "movies") -> dict[str, RatedSnippet]:
    ratings = HumanRatings(domain)
    return {snippet.id: snippet for split in SPLITS for snippet in ratings.load(split)}


def test_a_snippet_has_its_text_and_every_score(write_ratings):
    write_ratings([("7", "Fine film.", [1, 2, 3, 3]), ("8", "Dull.", [-4, 0])])
    assert everything() == {
        "7": RatedSnippet("7", "Fine film.", 2.25, (1, 2, 3, 3)),
        "8": RatedSnippet("8", "Dull.", -2.0, (-4, 0)),
    }


def test_rows_are_joined_by_id_not_by_place_and_a_byte_order_mark_is_no_part_of_an_id(write_ratings):
    folder = write_ratings([])
    truth = "1_1\t1.5\tfirst\r\n1_2\t-2\tsecond\r\n1_3\t0\tthird"
    ratings = "\ufeff1_3\t0\t1\t[1, -1]\r\n1_1\t1.5\t.5\t[1, 2]\r\n1_2\t-2\t0\t[-2, -2]"
    (folder / "amazonReviewSnippets_GroundTruth.txt").write_bytes(truth.encode())
    (folder / "amazonReviewSnippets_anonDataRatings.txt").write_bytes(ratings.encode())
    found = {key: (snippet.text, snippet.ratings) for key, snippet in everything("amazon").items()}
    assert found == {"1_1": ("first", (1, 2)), "1_2": ("second", (-2, -2)), "1_3": ("third", (1, -1))}


def test_a_row_whose_scores_are_not_those_of_the_published_mean_is_left_out(write_ratings):
    folder = write_ratings([("1", "Yay.", [3, 2]), ("2", "Oh.", [0, 1]), ("3", "Third.", [1, 1, 2])], "tweets")
    truth = folder / "tweets_GroundTruth.txt"
    truth.write_text("1\t1.443298969\tYay.\n2\t0.5\tOh.\n3\t1.333333333\tThird.")  # 1.333333333 is only rounded
    assert sorted(everything("tweets")) == ["2", "3"]


def test_entities_are_unescaped_even_twice_and_blanks_collapsed():
    assert clean("  deep &amp; the  love &lt;3\u00a0") == "deep & the love <3"
    assert clean("thought you&amp;#39;d") == "thought you'd"


def test_a_text_that_occurs_twice_is_one_snippet_with_both_groups_of_raters(write_ratings):
    write_ratings([("1", "So &amp; so", [1, 2]), ("2", "Other", [0]), ("3", "So  &  so", [3])])
    assert everything()["1"] == RatedSnippet("1", "So & so", 2.0, (1, 2, 3))
    assert sorted(everything()) == ["1", "2"]


def test_the_splits_are_disjoint_complete_and_about_80_10_10(write_ratings):
    rows = [(str(number), f"text number {number}", [number % 5]) for number in range(3000)]
    write_ratings(rows)
    ratings = HumanRatings()
    ids = {split: {snippet.id for snippet in ratings.load(split)} for split in SPLITS}
    assert set.union(*ids.values()) == {str(number) for number in range(3000)}
    assert sum(map(len, ids.values())) == 3000
    # Five standard deviations of a binomial share are 0.037 and 0.027.
    assert len(ids["train"]) / 3000 == pytest.approx(0.8, abs=0.037)
    assert len(ids["validation"]) / 3000 == pytest.approx(0.1, abs=0.027)
    assert len(ids["test"]) / 3000 == pytest.approx(0.1, abs=0.027)


def test_the_splits_and_their_order_do_not_depend_on_the_order_of_the_files(write_ratings):
    rows = [(str(number), f"text number {number}", [number % 5]) for number in range(200)]
    write_ratings(rows)
    before = [HumanRatings().load(split) for split in SPLITS]
    random.Random(0).shuffle(rows)
    write_ratings(rows)
    assert [HumanRatings().load(split) for split in SPLITS] == before


# The sha256 of "great fun", "green" and "bad" modulo 10 is 1, 8 and 9 (sha256sum, bc). Whoever changes the split of a
# text makes every number measured so far incomparable.
@pytest.mark.parametrize(("text", "split"), [("Great fun!", "train"), ("green", "validation"), ("BAD", "test")])
def test_the_split_of_a_text_is_fixed(text, split):
    assert split_of(text) == split


def test_variants_of_a_text_are_in_the_same_split():
    for number in range(50):
        splits = {
            split_of(text) for text in (f"Great fun {number}", f"GREAT fun, {number}!!!", f" great\tfun ({number})")
        }
        assert len(splits) == 1
    assert {split_of(":)" + "!" * number) for number in range(50)} == set(SPLITS)  # no letters: the text itself counts


def test_unknown_domains_and_splits_are_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"'books'.*movies, tweets, amazon, nyt"):
        HumanRatings("books")
    with pytest.raises(UserError, match=r"'valid'.*train, validation, test"):
        HumanRatings().load("valid")


def test_a_missing_file_is_named_with_the_remedy(cache):
    with pytest.raises(UserError, match="lit-rlhf fetch human_ratings --force") as error:
        HumanRatings().load("train")
    assert str(cache / "human_ratings" / "movieReviewSnippets_") in str(error.value)


GOOD_TRUTH = ["1\t1.5\tfirst", "2\t-2\tsecond", "3\t0\tthird"]
GOOD_RATINGS = ["1\t1.5\t.5\t[1, 2]", "2\t-2\t0\t[-2, -2]", "3\t0\t1\t[1, -1]"]


@pytest.mark.parametrize(
    ("kind", "line", "content", "problem"),
    [
        ("GroundTruth", 2, b"2\t-2", "2 tab-separated columns instead of 3"),
        ("GroundTruth", 2, b"2\tx\tsecond", "the mean 'x'"),
        ("GroundTruth", 2, b"2\tnan\tsecond", "the mean 'nan'"),
        ("GroundTruth", 2, b"2\t-5\tsecond", "the mean '-5'"),
        ("GroundTruth", 3, b"3\t0\tcaf\xe9", "not UTF-8"),
        ("GroundTruth", 3, b"3\t0\t ", "the text is empty"),
        ("GroundTruth", 3, b"1\t1.5\tfirst", "the id '1' occurs twice"),
        ("GroundTruth", 3, b"4\t0\tthird", "the id '4' has no row in movieReviewSnippets_anonDataRatings.txt"),
        ("GroundTruth", 2, None, "the file ends here, but movieReviewSnippets_anonDataRatings.txt has '3' too"),
        ("anonDataRatings", 1, b"1\t1.5\t.5", "3 tab-separated columns instead of 4"),
        ("anonDataRatings", 3, b"3\t0\t1\t[1, -1", "does not end a list"),
        ("anonDataRatings", 3, b"3\t0\t1\t[]", "does not end a list"),
        ("anonDataRatings", 3, b"3\t0\t1\t[5, -5]", "does not end a list"),
        ("anonDataRatings", 3, b"3\t0\t1\t[0.5, -0.5]", "does not end a list"),
        ("anonDataRatings", 3, b"3\t0\t1\t[1, 1]", "the scores' mean is not 0"),
        ("anonDataRatings", 3, b"2\t0\t1\t[1, -1]", "the id '2' occurs twice"),
    ],
)
def test_a_broken_line_is_named(write_ratings, kind, line, content, problem):
    folder = write_ratings([])
    for name, rows in (("GroundTruth", GOOD_TRUTH), ("anonDataRatings", GOOD_RATINGS)):
        lines = [row.encode() for row in rows]
        if name == kind:
            lines[line if content is None else line - 1 :] = [] if content is None else [content, *lines[line:]]
        (folder / f"movieReviewSnippets_{name}.txt").write_bytes(b"\r\n".join(lines))
    with pytest.raises(UserError) as error:
        HumanRatings().load("train")
    message = str(error.value)
    assert f"movieReviewSnippets_{kind}.txt, line {line}: " in message
    assert problem in message
    assert "lit-rlhf fetch human_ratings --force" in message


def test_a_truncated_ratings_file_is_noticed(write_ratings):
    folder = write_ratings([("1", "first", [1]), ("2", "second", [2])])
    (folder / "movieReviewSnippets_anonDataRatings.txt").write_text("1\t1\t0\t[1]")
    with pytest.raises(UserError, match=r"GroundTruth\.txt, line 2: the id '2' has no row in"):
        HumanRatings().load("train")
