"""Several runs on one page: what names a setting, seeds as bands, the frontier, jobs that failed, forty of them."""

import io
import json
import math
import random
import re

import pytest
import yaml
from command_line import run_here
from PIL import Image

from lit_rlhf.errors import UserError
from lit_rlhf.report import build_report
from lit_rlhf.report_comparison import build_comparison
from lit_rlhf.report_comparison_charts import MANY, Look, looks
from lit_rlhf.report_comparison_data import band, collect, compare, evaluations, frontier, last
from lit_rlhf.report_comparison_table import columns, own_penalties, table
from lit_rlhf.report_settings import group
from lit_rlhf.report_wandb import panels
from lit_rlhf.run_folder import write_summary
from tests.run_folders import HOSTILE, PPO_CONFIG, write_offline, write_ppo, write_samples
from tests.test_report import Page


def write_run(folder, rows=(), *, seed=0, status="completed", samples=(), drop=(), **changes):
    """A run folder with these rows of metrics; `changes` are keys of its configuration, `kl__coef` for `kl.coef`."""
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(PPO_CONFIG)) | {"seed": seed, "paths": {"output_dir": str(folder)}}
    config |= {"logger": {"csv": {"save_dir": str(folder)}}, "task_name": folder.name}
    for key in drop:
        del config[key]
    for key, value in changes.items():
        part, *inner = key.split("__")
        if inner:
            config[part] = config[part] | {inner[0]: value}
        else:
            config[part] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if rows:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        lines = [",".join(str(row.get(name, "")) for name in columns) for row in rows]
        (folder / "metrics.csv").write_text("\n".join([",".join(columns), *lines]) + "\n")
    write_samples(folder, list(samples))
    if status:
        write_summary(folder, status=status)
    return folder


def points(*values, prefix="", metric="objective/scores"):
    """Rows of metrics.csv from pairs (KL, score)."""
    return [
        {"iteration": i, "episode": 8 * i, f"{prefix}objective/kl": kl, f"{prefix}{metric}": score}
        for i, (kl, score) in enumerate(values, start=1)
    ]


def note_job(folder, number, status="completed", error="", **overrides):
    """What a job of a multirun leaves beside its run."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {key.replace("__", "."): str(value) for key, value in overrides.items()}
    job = {"job": number, "overrides": named, "status": status, "value": None, "error": error}
    job["folder"] = folder.name
    (folder / "job.json").write_text(json.dumps(job))


def labels(*folders):
    return [setting.label for setting in group(collect(folders))[1]]


def page(path):
    return Page(path.read_text(encoding="utf-8"))


# --- which runs are one setting ---


def test_runs_that_differ_only_in_seed_names_and_paths_are_one_setting(tmp_path):
    folders = [write_run(tmp_path / f"run{seed}", seed=seed, data__seed=seed) for seed in (2, 0, 1)]
    keys, (setting,) = group(collect(folders))
    assert keys == []
    assert setting.label == "one setting"
    assert [member.folder.name for member in setting.members] == ["run0", "run1", "run2"]


def test_a_setting_is_named_by_the_keys_that_differ(tmp_path):
    folders = [
        write_run(tmp_path / f"{coef}_{lr}_{seed}", seed=seed, kl__coef=coef, optimizer__lr=lr)
        for coef in (0.1, 0.2)
        for lr in (0.001, 0.002)
        for seed in (0, 1)
    ]
    assert labels(*folders) == [
        "kl.coef=0.1  optimizer.lr=0.001",
        "kl.coef=0.1  optimizer.lr=0.002",
        "kl.coef=0.2  optimizer.lr=0.001",
        "kl.coef=0.2  optimizer.lr=0.002",
    ]
    assert labels(folders[0], folders[4]) == ["kl.coef=0.1", "kl.coef=0.2"]


def test_another_class_is_named_without_the_arguments_that_come_with_it(tmp_path):
    wide = {"_target_": "lit_rlhf.clip.AsymmetricClip", "low": 0.2, "high": 0.28}
    rloo = {"_target_": "lit_rlhf.algorithms.RLOO", "rollout_batch_size": 32}
    critic = {"_target_": "lit_rlhf.models.ValueHead"}
    a = write_run(tmp_path / "a", critic=critic)
    b = write_run(tmp_path / "b", critic=critic, clip=wide)
    c = write_run(tmp_path / "c", clip=wide, algorithm=rloo)
    d = write_run(tmp_path / "d", clip=wide | {"high": 0.4}, algorithm=rloo)
    assert labels(a, b) == ["clip=SymmetricClip", "clip=AsymmetricClip"]
    assert labels(b, c) == ["algorithm=PPO", "algorithm=RLOO"]
    assert labels(c, d) == ["clip.high=0.28", "clip.high=0.4"]


def test_a_path_inside_the_own_folder_is_no_difference(tmp_path):
    folders = [
        write_run(tmp_path / name, policy__path=str(tmp_path / name / "start"), kl__coef=coef)
        for name, coef in (("x", 0.1), ("y", 0.1), ("z", 0.2))
    ]
    assert labels(*folders) == ["kl.coef=0.1", "kl.coef=0.2"]


def test_the_overrides_of_a_multirun_name_its_settings_as_they_were_written(tmp_path):
    wide = {"_target_": "lit_rlhf.clip.AsymmetricClip", "low": 0.2, "high": 0.28}
    for number, (clip, seed) in enumerate([("symmetric", 0), ("symmetric", 1), ("asymmetric", 0), ("asymmetric", 1)]):
        write_run(tmp_path / str(number), seed=seed, **({"clip": wide} if clip == "asymmetric" else {}))
        note_job(tmp_path / str(number), number, experiment="tiny", clip=clip, seed=seed)
    (tmp_path / "sweep.csv").write_text("job\n")
    assert labels(tmp_path) == ["clip=symmetric", "clip=asymmetric"]


def test_overrides_that_hide_a_difference_do_not_name_the_settings(tmp_path):
    for number, coef in enumerate((0.1, 0.2)):
        write_run(tmp_path / str(number), kl__coef=coef)
        note_job(tmp_path / str(number), number, experiment="tiny")
    (tmp_path / "sweep.csv").write_text("job\n")
    assert labels(tmp_path) == ["kl.coef=0.1", "kl.coef=0.2"]


# --- numbers ---


def test_evaluations_are_those_of_validation(tmp_path):
    rows = points((1, 0.1), (2, 0.2), (3, 0.3)) + points((10, 0.5), (20, math.nan), prefix="val/")
    (member,) = collect([write_run(tmp_path / "a", rows)])
    assert evaluations(member.run, "objective/scores") == ([(10, 0.5)], True)
    assert last(member.run, "objective/kl") == 20


def test_without_validation_every_iteration_of_training_is_an_evaluation(tmp_path):
    (member,) = collect([write_run(tmp_path / "a", points((1, 0.1), (math.nan, 0.3), (2, 0.2)))])
    assert evaluations(member.run, "objective/scores") == ([(1, 0.1), (2, 0.2)], False)
    assert evaluations(member.run, "gold/vader") == ([], False)


def test_of_a_long_training_evenly_spread_iterations_are_evaluations(tmp_path):
    (member,) = collect([write_run(tmp_path / "a", points(*((kl, 0.5) for kl in range(1001))))])
    found, _ = evaluations(member.run, "objective/scores")
    assert [kl for kl, _ in found] == list(range(10, 1001, 11))  # 91 of 1,001, the last among them


def test_the_frontier_is_what_no_other_point_beats_with_as_little_kl():
    assert frontier([(3, 0.6), (1, 0.2), (2, 0.1), (2, 0.5), (1, 0.1), (4, 0.6), (5, 0.7)]) == [
        (1, 0.2), (2, 0.5), (3, 0.6), (5, 0.7),
    ]  # fmt: skip
    assert frontier([]) == []


def test_a_band_is_the_mean_of_the_seeds_between_their_lowest_and_highest(tmp_path):
    seeds = [
        write_run(tmp_path / "0", points((0, 1.0), (0, 2.0), (0, 9.0)), seed=0),
        write_run(tmp_path / "1", points((0, 3.0), (0, 4.0), (0, math.inf)), seed=1),
        write_run(tmp_path / "2", points((0, 2.0), (0, 9.0)), seed=2),
    ]
    _, (setting,) = group(collect(seeds))
    found = band(setting.runs, "objective/scores", "episode", Look(colour="#000000"))
    assert list(found.x) == [8, 16, 24]
    assert list(found.mean) == [2.0, 5.0, 9.0]  # (1 + 3 + 2) / 3, (2 + 4 + 9) / 3, the one finite value
    assert list(found.low) == [1.0, 2.0, 9.0]
    assert list(found.high) == [3.0, 9.0, 9.0]
    assert band(setting.runs, "gold/vader", "episode", Look(colour="#000000")) is None


def test_the_table_holds_the_mean_over_seeds(tmp_path):
    folders = [
        write_run(tmp_path / f"{coef}_{seed}", points((kl, score)), seed=seed, kl__coef=coef)
        for coef, seed, kl, score in [(0.1, 0, 4, 0.5), (0.1, 1, 6, 0.7), (0.2, 0, 2, 0.3), (0.2, 1, 2, 0.4)]
    ]
    text = page(build_comparison(folders, tmp_path / "out")).text
    assert "0.600 0.500 to 0.700 5 4 to 6 0.1_0 completed 0.1_1 completed" in text  # (0.5 + 0.7) / 2
    assert "0.350 0.300 to 0.400 2 0.2_0 completed" in text
    assert "4 runs · 2 settings · 4 completed" in text
    assert "in a band from the lowest to the highest" in text


def test_a_column_is_written_with_the_decimals_of_its_finest_value(tmp_path):
    folders = [write_run(tmp_path / str(kl), points((kl, 0.5)), kl__coef=kl) for kl in (8, 7.914, 10.25)]
    text = page(build_comparison(folders, tmp_path / "out")).text
    assert [f"0.500 {kl} " in text for kl in ("8.00", "7.91", "10.25")] == [True] * 3


def test_rewards_are_marked_that_no_other_setting_reaches_with_as_little_kl(tmp_path):
    folders = []
    for kl, score in [(1, 0.2), (2, 0.5), (3, 0.4), (4, 0.9), (5, 0.9)]:
        rows = [row | {"objective/rlhf_reward": score - 0.1 * kl} for row in points((kl, score))]
        folders.append(write_run(tmp_path / str(kl), rows, kl__coef=kl, optimized_metric="objective/rlhf_reward"))
    parsed = page(build_comparison(folders, tmp_path / "out"))
    assert parsed.text_of("b.best") == ["0.200", "0.500", "0.900"]
    assert "no other setting ends as high with as little KL" in parsed.text
    assert "the best of the column" not in parsed.text
    assert "Reward minus KL penalty optimized_metric in training" in parsed.text
    assert "has no common best" in parsed.text


@pytest.mark.parametrize(
    ("name", "varied", "title", "where", "values", "best"),
    [
        ("objective/rlhf_reward", "optimizer__lr", "Reward minus KL penalty", "training", [0.2, 0.6], [False, True]),
        ("objective/rlhf_reward", "kl__coef", "Reward minus KL penalty", "training", [0.2, 0.6], [False, False]),
        ("val/objective/rlhf_reward", "seed", "Reward minus KL penalty", "validation", [0.2], [False]),
        ("objective/scores", "optimizer__lr", "Reward", "training", [0.4, 0.8], [False, True]),
    ],
)
def test_what_the_runs_were_optimised_for_is_a_column_with_the_values_that_a_sweeper_saw(
    tmp_path, name, varied, title, where, values, best
):
    for number, (score, penalised, held) in enumerate([(0.4, 0.2, 0.3), (0.8, 0.6, 0.1)]):
        rows = points((1, score)) + points((1, 0.5), prefix="val/")
        rows[0]["objective/rlhf_reward"], rows[1]["val/objective/rlhf_reward"] = penalised, held
        write_run(tmp_path / str(number), rows, optimized_metric=name, **{varied: number})
    comparison = compare([tmp_path / "0", tmp_path / "1"])
    column = columns(comparison)[2]  # after reward and KL
    assert (column.metric, column.title) == (name.removeprefix("val/"), title)
    assert column.notes == ("optimized_metric", f"in {where}")
    cells = [row["values"][2] for row in table(comparison, tmp_path)]
    assert [cell["mean"] for cell in cells] == pytest.approx(values)
    assert [cell["marked"] for cell in cells] == best
    assert own_penalties(comparison) == (varied == "kl__coef")


def test_an_optimised_metric_that_is_shown_anyway_or_differs_is_no_further_column(tmp_path):
    def shown(*names):
        folders = []
        for i, name in enumerate(names):
            folders.append(tmp_path / f"{len(list(tmp_path.iterdir()))}")
            write_run(folders[-1], points((1, 0.5)), optimized_metric=name, kl__coef=i)
        return [(column.metric, column.notes) for column in columns(compare(folders))]

    marked = [("objective/scores", ("optimized_metric",)), ("objective/kl", ())]
    assert shown("objective/scores", "objective/scores") == marked
    plain = [("objective/scores", ()), ("objective/kl", ())]
    assert shown("objective/scores", "objective/kl") == shown(None, None) == shown("gold/x", "gold/x") == plain


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ((True, True), ("Each dot is an evaluation on the validation prompts", "Final values on validation data.")),
        ((False, False), ("These runs have no validation", "Final values: those at the end of training.")),
        ((True, False), ("A hollow one, of a run without validation", "on validation data where they were measured")),
    ],
)
def test_the_page_says_where_its_points_are_from(tmp_path, held, said):
    folders = [
        write_run(tmp_path / str(i), points((1, 0.5)) + points((2, 0.6), prefix="val/") * one, kl__coef=i)
        for i, one in enumerate(held)
    ]
    text = page(build_comparison(folders, tmp_path / "out")).text
    every = ("Each dot is an", "These runs have no", "A hollow one")
    assert [one in text for one in every] == [said[0].startswith(one) for one in every]
    assert said[1] in text


# --- how a setting is drawn ---


def test_in_a_grid_of_two_keys_the_colour_is_of_the_first_and_the_line_of_the_second():
    found = looks([(coef, clip) for coef in ("0.01", "0.05", "0.2") for clip in ("narrow", "wide")])
    assert [one.colour for one in found[::2]] == [one.colour for one in found[1::2]]
    assert len({one.colour for one in found}) == 3
    for attribute in ("dashes", "marker"):
        kinds = [getattr(one, attribute) for one in found]
        assert kinds == kinds[:2] * 3
        assert len(set(kinds)) == 2


def test_in_a_grid_whose_second_key_has_many_values_the_line_is_of_the_first():
    found = looks([(clip, str(coef)) for clip in ("narrow", "wide") for coef in range(5)])
    assert [one.colour for one in found[:5]] == [one.colour for one in found[5:]]
    assert [one.marker for one in found] == ["o"] * 5 + ["s"] * 5


@pytest.mark.parametrize(
    "chosen",
    [
        [("a",), ("b",), ("c",)],
        [("a", "1", "x"), ("a", "2", "x"), ("b", "1", "y")],
        [(str(i), str(j)) for i in range(4) for j in range(4)],  # too many kinds of lines
        [("a", "1"), ("b", "2"), ("c", "1")],  # no grid: no two share the first
        [("a", "1"), ("a", "1"), ("b", "2")],  # long values may look the same when they are cut
        [("a", "1"), ("a", "2"), ("b",)],
    ],
)
def test_otherwise_every_setting_has_a_colour_of_its_own(chosen):
    found = looks(chosen)
    assert len({one.colour for one in found}) == len(chosen)
    assert {(one.dashes, one.marker) for one in found} == {((), "o")}


# --- the page and its pictures ---


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A multirun of two settings with two seeds, and a job that failed before it had a run."""
    folder = tmp_path_factory.mktemp("multirun")
    for number, (coef, seed) in enumerate([(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]):
        run = write_ppo(folder / str(number), prompts=12)
        config = yaml.safe_load((run / "config.yaml").read_text()) | {"seed": seed}
        config["kl"]["coef"] = coef
        (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        note_job(run, number, kl__coef=coef, seed=seed)
    note_job(folder / "4", 4, "failed", "kl.coef must be at least 0, got <b>-1</b>\nmore", kl__coef=-1, seed=0)
    (folder / "sweep.csv").write_text("job\n")
    return folder


def test_a_multirun_is_one_page_with_its_frontier_curves_table_and_samples(sweep):
    parsed = page(build_report(sweep))
    assert parsed.text_of("h3.") == [
        "What the KL bought", "Results", "Learning curves", "The same prompts, side by side",
    ]  # fmt: skip
    assert [title for title in parsed.text_of("b.") if " against KL" in title] == [
        "Reward against KL", "Gold: vader against KL",
    ]  # fmt: skip
    assert {"Reward", "Gold: vader", "KL to the reference", "Entropy", "Response length"} <= set(parsed.text_of("b."))
    assert parsed.attributes.count(("role", "img")) == 7
    assert "5 runs · 3 settings · 4 completed · 1 failed" in parsed.text


def test_a_failed_job_is_shown_with_its_error_as_text(sweep):
    parsed = page(build_report(sweep))
    assert "4: kl.coef must be at least 0, got <b>-1</b>\nmore" in parsed.text_of("td.left error")
    assert "3 -1" in parsed.text  # its place in the table


def test_every_picture_is_also_a_png(sweep):
    build_report(sweep)
    names = {path.name for path in (sweep / "pictures").iterdir()}
    assert names == {
        "frontier.png", "frontier_gold_vader.png", "objective_scores.png", "gold_vader.png", "objective_kl.png",
        "policy_entropy.png", "rollout_response_length.png",
    }  # fmt: skip
    for name in names:
        image = Image.open(io.BytesIO((sweep / "pictures" / name).read_bytes()))
        assert image.format == "PNG"
        assert image.size[0] >= 1000
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 50  # something was drawn


def test_the_comparison_needs_nothing_from_elsewhere_and_repeats_its_bytes(sweep):
    first = build_report(sweep)
    parsed = page(first)
    links = [value for name, value in parsed.attributes if name in {"src", "href", "xlink:href", "action"}]
    assert all(value.startswith("#") for value in links)
    data = first.read_bytes()
    assert build_report(sweep).read_bytes() == data


def test_completions_of_the_same_prompts_stand_side_by_side_escaped(sweep):
    parsed = page(build_report(sweep))
    assert not {"script", "img", "iframe", "object", "link"} & set(parsed.tags)
    shown = parsed.text_of("div.text")
    assert shown.count(HOSTILE[0]) == 2  # of each setting its first seed
    assert shown.count(HOSTILE[1]) == 2


def test_samples_are_the_newest_of_prompts_that_all_settings_answered(tmp_path):
    def rows(name):
        return [
            {"iteration": i, "split": "validation", "prompt": prompt, "completion": f"{name} {prompt}{i}", "score": 1.0}
            for i in (1, 2)
            for prompt in ("p", name, "q")
        ]

    folders = [write_run(tmp_path / n, points((1, 1)), kl__coef=i, samples=rows(n)) for i, n in enumerate("ab")]
    parsed = page(build_comparison(folders, tmp_path / "out"))
    assert parsed.text_of("div.text") == ["p", "a p2", "b p2", "q", "a q2", "b q2"]


def test_settings_without_a_common_prompt_say_so(tmp_path):
    folders = [
        write_run(tmp_path / n, points((1, 1)), kl__coef=i, samples=[{"iteration": 1, "prompt": n, "completion": n}])
        for i, n in enumerate("ab")
    ]
    assert "No prompt was answered in all settings" in page(build_comparison(folders, tmp_path / "out")).text


def test_hostile_names_are_text_in_the_page_and_its_pictures(tmp_path):
    evil = "</style><script>alert(1)</script>$x_{$\x07\n"
    metric = "gold/<i>$"
    folders = [
        write_run(tmp_path / f"<b>{i}", points((1, 1), metric=metric), status="<em>", reward__path=f"{evil}{i}")
        for i in range(2)
    ]
    for folder in folders:
        build_report(folder)
    parsed = page(build_comparison(folders, tmp_path / "out"))
    assert not {"script", "i>", "em"} & set(parsed.tags)
    assert any(evil.split("\x07")[0] in text for text in parsed.text_of("td.left"))


def test_the_panels_of_wandb_hold_what_the_page_shows(tmp_path):
    folders = []
    for kl, score in [(1, 0.2), (2, 0.5), (3, 0.4)]:
        rows = [row | {"objective/rlhf_reward": score - 0.1} for row in points((0.5 * kl, 0.1), (kl, score))]
        folders.append(write_run(tmp_path / str(kl), rows, optimizer__lr=kl, optimized_metric="objective/rlhf_reward"))
    build_comparison(folders, tmp_path / "out")
    found = panels(compare(folders), tmp_path / "out")
    results = [dict(zip(found["results"].columns, row, strict=True)) for row in found["results"].data]
    assert [row["objective/scores"] for row in results] == [0.2, 0.5, 0.4]
    assert [row["objective/scores marked"] for row in results] == [True, True, False]
    penalised = "objective/rlhf_reward (optimized_metric)"
    assert [row[penalised] for row in results] == pytest.approx([0.1, 0.4, 0.3])
    assert [row[f"{penalised} marked"] for row in results] == [False, True, False]
    assert "objective/kl marked" not in results[0]
    shown = [(row[0], *row[-3:]) for row in found["frontier/objective/scores"].table.data]
    assert shown == [
        (1, False, 0.5, 0.1), (1, False, 1, 0.2), (2, False, 1, 0.1), (2, False, 2, 0.5), (3, False, 1.5, 0.1),
        (3, False, 3, 0.4),
    ]  # fmt: skip
    assert {name for name in found if name.startswith("pictures/")} == {
        "pictures/frontier", "pictures/objective_scores", "pictures/objective_kl",
    }  # fmt: skip


def test_of_many_settings_those_are_numbered_in_the_picture_that_are_bold_in_the_table(tmp_path):
    best = {3: (1, 0.5), 7: (2, 0.9)}
    folders = [
        write_run(tmp_path / f"{i:02}", points((0.1, 0.95), best.get(i, (3, 0.1))), kl__coef=i / 100)
        for i in range(1, MANY + 2)
    ]
    html = build_comparison(folders, tmp_path / "out").read_text()
    assert Page(html).text_of("b.best") == ["0.500", "0.900"]
    picture = html.partition("Reward against KL</b>")[2].partition("</svg>")[0]
    assert re.findall(r"font-weight: 700[^>]*>(\d+)<", picture) == ["3", "7"]


def test_forty_runs_have_a_legend_of_values_and_distinct_colours(tmp_path):
    for number in range(40):
        rng = random.Random(number)
        rows = points(*((rng.random() * i, rng.random()) for i in range(5)))
        write_run(tmp_path / str(number), rows, kl__coef=number / 100, optimizer__lr=0.001 * (1 + number % 2))
        note_job(tmp_path / str(number), number, kl__coef=number / 100, optimizer__lr=0.001 * (1 + number % 2))
    (tmp_path / "sweep.csv").write_text("job\n")
    _, settings = group(collect([tmp_path]))
    assert [setting.number for setting in settings] == list(range(1, 41))
    html = build_report(tmp_path).read_text()
    text = Page(html).text
    assert "40 runs · 40 settings · 40 completed" in text
    assert "kl.coef · optimizer.lr" in text
    assert "40 0.39 · 0.002" in text
    keys = html.split('class="look"')[1:]
    assert len({key.partition('fill="')[2][:7] for key in keys}) == 40 > MANY


# --- what may be missing ---


def test_one_job_alone_is_compared_with_nothing(tmp_path):
    write_run(tmp_path / "0", points((1, 0.5)))
    note_job(tmp_path / "0", 0, kl__coef=0.1)
    (tmp_path / "sweep.csv").write_text("job\n")
    assert "1 run · 1 setting · 1 completed" in page(build_report(tmp_path)).text


def test_jobs_that_all_failed_still_make_a_page(tmp_path):
    for number in range(2):
        note_job(tmp_path / str(number), number, "failed", f"reason {number}", kl__coef=-number)
    (tmp_path / "sweep.csv").write_text("job\n")
    text = page(build_report(tmp_path)).text
    assert "reason 0" in text
    assert "reason 1" in text
    assert "No run has logged a metric to draw" in text


def test_how_a_job_ended_is_what_the_multirun_noted_before_what_its_run_did(tmp_path):
    for number, (noted, run) in enumerate([("failed", "completed"), ("completed", "completed")]):
        write_run(tmp_path / str(number), points((1, 0.5)), kl__coef=number + 1, status=run)  # it failed at the upload
        note_job(tmp_path / str(number), number, noted, kl__coef=number + 1)
    write_run(tmp_path / "2", points((1, 0.5)), kl__coef=3)
    write_summary(tmp_path / "2", status="completed", stopped_by="kl.budget")
    note_job(tmp_path / "2", 2, kl__coef=3)
    (tmp_path / "sweep.csv").write_text("job\n")
    assert "1 failed · 1 completed · 1 stopped by kl.budget" in page(build_report(tmp_path)).text


def test_a_multirun_that_still_runs_is_shown_as_far_as_it_is(tmp_path):
    write_run(tmp_path / "0", points((1, 0.5)), kl__coef=0.1)
    note_job(tmp_path / "0", 0, kl__coef=0.1)
    write_run(tmp_path / "1", kl__coef=0.2, status=None)
    note_job(tmp_path / "1", 1, "interrupted", kl__coef=0.2)
    (tmp_path / "multirun.yaml").write_text("hydra: {}\n")
    assert "1 completed · 1 in progress" in page(build_report(tmp_path)).text
    (tmp_path / "sweep.csv").write_text("job\n")
    assert "1 completed · 1 interrupted" in page(build_report(tmp_path)).text


def test_offline_runs_have_curves_and_no_frontier(tmp_path):
    folders = [write_offline(tmp_path / name, "sft") for name in "ab"]
    parsed = page(build_comparison(folders, tmp_path / "out"))
    assert "What the KL bought" not in parsed.text_of("h3.")
    assert {"Loss", "Perplexity"} <= set(parsed.text_of("b."))


def test_of_pipelines_the_last_stage_is_compared(tmp_path):
    for number, coef in enumerate((0.1, 0.2)):
        job = tmp_path / str(number)
        write_offline(job / "sft", "sft")
        write_run(job / "ppo", points((1, 0.5)), kl__coef=coef, reward__path=str(job / "reward_model" / "model"))
    assert labels(tmp_path / "0", tmp_path / "1") == ["kl.coef=0.1", "kl.coef=0.2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.csv", "iteration,a\n1,b\n", r"metrics\.csv, line 2"),
        ("config.yaml", "- 1\n", r"config\.yaml is not a mapping"),
        ("job.json", "{", r"one of its job\.json files is broken"),
        ("job.json", "[1]", r"one of its job\.json files is broken"),
    ],
)
def test_a_broken_file_of_a_job_is_refused_by_name(tmp_path, name, content, message):
    write_run(tmp_path / "0", points((1, 0.5)))
    note_job(tmp_path / "0", 0)
    (tmp_path / "sweep.csv").write_text("job\n")
    (tmp_path / "0" / name).write_text(content)
    with pytest.raises(UserError, match=message):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_multirun_without_jobs_is_refused(tmp_path):
    (tmp_path / "sweep.csv").write_text("job\n")
    with pytest.raises(UserError, match="no job has begun"):
        build_report(tmp_path)


# --- the command ---


def test_the_command_compares_several_runs_beside_them(tmp_path):
    runs = [write_run(tmp_path / name, points((1, 0.5)), kl__coef=i) for i, name in enumerate("ab")]
    result = run_here("report", *runs)
    assert result.code == 0, result.err
    assert result.out.strip() == str(tmp_path / "comparison" / "report.html")
    assert "2 runs · 2 settings" in page(tmp_path / "comparison" / "report.html").text
    assert not (runs[0] / "report.html").exists()


def test_the_command_names_the_folder_that_is_no_run(tmp_path):
    run = write_run(tmp_path / "a", points((1, 0.5)))
    result = run_here("report", run, tmp_path / "nowhere")
    assert result.code == 1
    assert "nowhere is no run folder" in result.err
    assert "Traceback" not in result.err
