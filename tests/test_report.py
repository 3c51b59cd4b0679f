"""The report: numbers recomputed by hand, a page that hostile text cannot break, runs that lack something."""

import io
import itertools
import json
import math
from html.parser import HTMLParser

import pytest
from PIL import Image

from lit_rlhf.errors import UserError
from lit_rlhf.report import build_report, picture
from lit_rlhf.report_charts import Series, _empty_panel, curves, histogram
from lit_rlhf.report_effect import effect, pair_up, quantities
from lit_rlhf.report_section import load_runs
from lit_rlhf.report_text import settings_line
from tests.run_folders import HOSTILE, write_offline, write_pipeline, write_ppo, write_samples

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """A page as a parser sees it: its elements, whether they nest, the text of each kind of element."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.texts = []  # of every element: its kind, its direct text
        self.everything = []
        self.feed(html)
        self.close()
        assert self.open == [], "elements left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.texts.append((f"{tag}.{dict(attrs).get('class') or ''}", []))
            self.open.append((tag, self.texts[-1][1]))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.everything.append(data)
        if self.open:
            self.open[-1][1].append(data)

    def text_of(self, kind):
        return ["".join(parts) for name, parts in self.texts if name == kind]

    @property
    def text(self):
        return " ".join("".join(self.everything).split())


def page(folder):
    return Page(build_report(folder).read_text(encoding="utf-8"))


# --- before and after ---


def row(iteration, prompt, score, split="validation", **more):
    return {"iteration": iteration, "split": split, "prompt": prompt, "completion": "c", "score": score, **more}


def test_the_same_prompts_are_matched_across_iterations():
    rows = [row(0, "a", 1), row(0, "b", 2), row(0, "a", 3), row(0, "gone", 4)]
    rows += [row(5, "b", 20), row(5, "a", 10), row(5, "a", 30), row(5, "new", 40), row(3, "a", 99)]
    pairs = [(before["score"], after["score"]) for before, after in pair_up(rows, 0, 5)]
    assert pairs == [(1, 10), (2, 20), (3, 30)]


def test_the_effect_is_the_mean_paired_difference_with_its_interval():
    pairs = [(row(0, i, 10.0 * i), row(1, i, 10.0 * i + change)) for i, change in enumerate([1, 2, 3, 4, 5])]
    found = effect(quantities(pairs)[0], pairs)
    # differences 1..5: mean 3, standard deviation sqrt(2.5), standard error sqrt(0.5); t(4) = 2.776
    assert (found.n, found.before, found.after, found.change) == (5, 20.0, 23.0, 3.0)
    assert found.half == pytest.approx(2.776 * math.sqrt(0.5), abs=2e-3)
    assert found.before_se == pytest.approx(math.sqrt(250 / 5))  # 0, 10 ... 40: variance 250
    assert effect(quantities(pairs)[0], pairs[:4]).half is None


def test_a_score_that_was_not_finite_leaves_its_pair_out():
    pairs = [(row(0, i, None if i == 0 else 1.0), row(1, i, 2.0, gold={})) for i in range(6)]
    assert effect(quantities(pairs)[0], pairs).n == 5
    assert effect(quantities(pairs)[1], pairs) is None  # no KL in these rows


def test_single_components_are_compared_only_where_there_are_several():
    def labels(components):
        pairs = [(row(0, "a", 1, components=components, gold={"g": 1}), row(1, "a", 1, components=components))]
        return [quantity.label for quantity in quantities(pairs)]

    assert labels({"x": 1})[:2] == ["Reward", "Gold: g"]
    assert labels({"x": 1, "y": 2})[:4] == ["Reward", "Reward: x", "Reward: y", "Gold: g"]


def test_the_page_shows_the_effects_of_the_first_and_last_validation(tmp_path):
    folder = write_ppo(tmp_path / "ppo", prompts=40)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().split("\n")[:-1]]
    before = [r["gold"]["vader"] for r in rows if r["iteration"] == 0]
    after = [r["gold"]["vader"] for r in rows if r["iteration"] == 20]
    changes = [b - a for a, b in zip(before, after, strict=True)]
    mean = sum(changes) / 40
    half = 2.0227 * math.sqrt(sum((c - mean) ** 2 for c in changes) / 39 / 40)  # t(39)
    text = page(folder).text
    assert f"Gold: vader {sum(before) / 40:.3f}".replace("-", "\N{MINUS SIGN}") in text
    assert f"+{mean:.3f} +{mean - half:.3f} to +{mean + half:.3f} 40" in text
    assert "Before is iteration 0, after is iteration 20" in text
    assert "one sampled completion of each of 40 held-out prompts" in text


# --- the page ---


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("runs") / "human_ratings")


def test_hostile_completions_are_shown_as_text(pipeline):
    parsed = page(pipeline / "ppo")
    assert not {"script", "img", "iframe", "object", "link"} & set(parsed.tags)
    assert parsed.tags.count("h1") == parsed.tags.count("main") == 1
    shown = parsed.text_of("div.text") + parsed.text_of("div.text soft")
    for text in HOSTILE:
        assert (text or "(empty)").encode("utf-8", "replace").decode().replace("\x00", "\ufffd") in [
            s.replace("\x00", "\ufffd") for s in shown
        ]


def test_hostile_config_and_names_are_shown_as_text(tmp_path):
    folder = tmp_path / "<b>run"
    write_ppo(folder, prompts=6)
    evil = "</pre></details><script>alert(2)</script>"
    (folder / "config.yaml").write_text(f"seed: 0\nreward: {{_target_: '{evil}', '{evil}': '{evil}'}}\n")
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().split("\n")[:-1]]
    for r in rows:
        r["gold"] = {"<i>$judge$</i>": 0.5}
    write_samples(folder, rows)
    metrics = folder / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("gold/vader", "gold/<i>$x_{$</i>").replace("loss/value", "loss/<u>"))
    summary = json.loads((folder / "summary.json").read_text()) | {"status": "<em>odd</em>", "wall_seconds": "<s>"}
    (folder / "summary.json").write_text(json.dumps(summary))
    parsed = page(folder)
    assert not {"script", "u", "em", "s", "img"} & set(parsed.tags)
    assert parsed.text_of("pre.")[0].count(evil) == 3
    assert parsed.text_of("h1.") == ["<b>run"]
    assert "Gold: <i>$judge$</i>" in parsed.text
    picture(folder)


def test_the_page_needs_nothing_from_elsewhere(pipeline):
    parsed = page(pipeline)
    links = [(name, value) for name, value in parsed.attributes if name in {"src", "href", "xlink:href", "action"}]
    assert {name for name, _ in links} <= {"xlink:href"}
    assert all(value.startswith("#") for _, value in links)  # within the chart
    addresses = {value for _, value in parsed.attributes if value and "//" in value}
    assert addresses <= {"http://www.w3.org/1999/xlink"}  # the name of a format, which nobody fetches
    assert "@import" not in (pipeline / "report.html").read_text()
    assert "url(#" in (pipeline / "report.html").read_text().replace("url(http", "")  # clip paths only


def test_the_same_run_gives_the_same_bytes(pipeline):
    first = build_report(pipeline).read_bytes()
    assert build_report(pipeline).read_bytes() == first


def test_a_ppo_run_has_its_curves_settings_and_definitions(pipeline):
    parsed = page(pipeline / "ppo")
    titles = {"Reward", "Gold: vader", "KL to the reference", "Entropy", "Response length", "Gold: vader against KL"}
    assert titles <= set(parsed.text_of("b."))
    for name in ("objective/kl", "policy/entropy", "gold/vader", "loss/value", "policy/clipfrac"):
        assert parsed.text_of("code.").count(name) >= 2  # at its panel and among the definitions
    assert "KL(policy || reference), summed over tokens, mean over completions" in parsed.text
    assert "PPO · smollm2 · 20 iterations · 640 completions · seed 0" in parsed.text
    assert "6 min 52 s · 3.87 GB peak memory · completed" in parsed.text
    assert "FixedKL · coef 0.05 · estimator k1" in parsed.text
    assert "task_name: ppo" in parsed.text_of("pre.")[0]


def test_curves_are_those_of_training_and_validation(pipeline):
    (run,) = load_runs(pipeline / "ppo")
    train, held = run.series("objective/kl")
    assert (train.role, list(train.x)) == ("train", list(range(1, 21)))
    assert (held.role, list(held.x)) == ("held", [0, 5, 10, 15, 20])
    assert held.y[0] == 0.0
    assert run.series("policy/entropy")[0].role == "train"


def test_a_chart_takes_its_colours_from_the_page_and_survives_what_is_not_finite():
    series = [
        Series(x=[1, 2, 3], y=[math.nan, math.inf, 2.0], role="train"),
        Series(x=[0, 3], y=[1.0, 2.0], role="held"),
    ]
    svg = str(curves(series, x_label="iteration", label='a "label" <b>'))
    Page(svg)
    assert svg.count("<use ") >= 2
    assert "var(--train)" in svg
    assert "var(--held)" in svg
    assert "#0102" not in svg
    assert 'aria-label="a &#34;label&#34; &lt;b&gt;"' in svg
    assert ">iteration<" in svg  # text, not outlines


def test_a_chart_is_the_same_whatever_was_drawn_before_it():
    """Charts of a size share their axes."""
    held = Series(x=[0, 3], y=[1.0, 2.0], role="held")
    shown = [
        [Series(x=[1, 2, 3], y=[0.1, 0.4, 0.2], role="train"), held],
        [Series(x=[5, 900], y=[-3e6, 4e7], role="train")],
        [Series(x=[1, 2], y=[math.nan, math.nan], role="train")],
    ]

    def fresh(series):
        _empty_panel.cache_clear()
        return curves(series, x_label="iteration", label="x")

    alone = [fresh(series) for series in shown]
    for order in itertools.permutations(range(3)):
        assert [curves(shown[i], x_label="iteration", label="x") for i in order] == [alone[i] for i in order]


def test_a_histogram_of_equal_scores_is_drawn():
    assert "<svg" in histogram([1.0, 1.0], [1.0], label="x")


def test_a_pipeline_is_one_page_with_its_stages_in_order(pipeline):
    parsed = page(pipeline)
    assert parsed.text_of("h2.") == ["Supervised fine-tuning", "Reward model", "Reinforcement learning"]
    assert "held-out sft/perplexity 30.4" in parsed.text
    assert "held-out reward_model/accuracy 0.879" in parsed.text
    assert "0.899 step 200" in parsed.text  # the best, beside the last
    assert len(parsed.text_of("pre.")) == 3


def test_hidden_folders_of_a_pipeline_are_no_stages(pipeline):
    (pipeline / ".hydra").mkdir(exist_ok=True)
    (pipeline / ".hydra" / "config.yaml").write_text("task_name: x\n")
    assert ".hydra" not in build_report(pipeline).read_text()


def test_the_picture_is_a_png(pipeline):
    image = Image.open(io.BytesIO(picture(pipeline).read_bytes()))
    assert image.format == "PNG"
    assert image.size[0] >= 1200
    assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 50  # curves were drawn


def test_settings_are_one_line_each_without_nulls():
    kl = {"_target_": "lit_rlhf.kl.FixedKL", "_partial_": True, "coef": 0.05, "target": None, "a": {"b": [1, 2]}}
    assert settings_line(kl) == "FixedKL · coef 0.05 · a.b [1, 2]"
    assert settings_line({"_target_": "lit_rlhf.models.Policy.from_pretrained", "path": "x"}) == (
        "Policy.from_pretrained · path x"
    )
    assert settings_line(0) == "0"
    assert settings_line({"prompts": ["x" * 500]}) == "prompts ['" + "x" * 158 + "…"


# --- what may be missing ---


def test_a_run_in_progress_is_shown_up_to_its_newest_whole_row(tmp_path):
    folder = write_ppo(tmp_path / "ppo", iterations=7, prompts=6, status=None)
    for name in ("metrics.csv", "samples.jsonl"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-40])  # as a reader may find them during a write
    text = page(folder).text
    assert "The run has not ended yet" in text
    assert "6 iterations · 192 completions" in text
    assert "Before is iteration 0, after is iteration 5" in text
    assert "held-out prompts, ±" in text


def test_no_gold_judge_is_said(tmp_path):
    text = page(write_ppo(tmp_path / "ppo", prompts=6, gold=False)).text
    assert "No gold judge scored the completions" in text
    assert "Reward against KL" in text


def test_no_validation_is_said(tmp_path):
    folder = write_ppo(tmp_path / "ppo", prompts=6)
    (folder / "samples.jsonl").unlink()
    assert "no comparison of before and after: of completions of held-out prompts there are none" in page(folder).text
    write_samples(folder, [row(20, "a", 1.0)])
    assert "there are only those of iteration 20" in page(folder).text
    offline = write_offline(tmp_path / "sft", "sft")
    metrics = offline / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("val/", "my/"))
    assert "There was no validation" in page(offline).text


def test_few_prompts_get_no_interval(tmp_path):
    assert "too few 4" in page(write_ppo(tmp_path / "ppo", prompts=4)).text


def test_a_run_without_rows_or_config_is_said(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    text = page(tmp_path).text
    assert "No row of metrics has been logged." in text
    assert "seed 0 · in progress" in text
    with pytest.raises(UserError, match="no metrics to draw"):
        picture(tmp_path)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "metrics.csv").write_text("iteration,a\n1,2.0\n")
    assert "There is no config.yaml" in page(tmp_path).text


def test_a_run_that_failed_says_so(tmp_path):
    assert "The run ended early: failed." in page(write_offline(tmp_path / "sft", "sft", status="failed")).text


def test_stages_that_have_not_started_are_named(tmp_path):
    write_offline(tmp_path / "sft", "sft", status=None)
    text = page(tmp_path).text
    assert "Reward model: this stage has not started." in text
    assert "Supervised fine-tuning: this stage" not in text


def test_stages_of_the_users_own_are_shown_after_the_usual_ones(tmp_path):
    for name in ("second_sft", "sft"):
        write_offline(tmp_path / name, "sft")
    parsed = page(tmp_path)
    assert parsed.text_of("h2.") == ["Supervised fine-tuning", "second_sft"]
    assert "has not started" not in parsed.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("samples.jsonl", b'{"iteration": 1}\n{"iteration": \n', r"samples\.jsonl, line 2 is not JSON"),
        ("samples.jsonl", b"[1]\n", r"samples\.jsonl, line 1 is not an object"),
        ("config.yaml", b"a: [1\n", r"config\.yaml cannot be read"),
        ("config.yaml", b"- 1\n", r"config\.yaml is not a mapping"),
        ("config.yaml", b"\xff\xfe\x00", r"config\.yaml cannot be read"),
        ("summary.json", b"{", r"summary\.json is not JSON"),
        ("metrics.csv", b"iteration,a\n1,b\n", r"metrics\.csv, line 2"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no run folder.*config\.yaml.*metrics\.csv"):
            build_report(path)
