"""Over-optimisation: best-of-n by listing all subsets; fits of curves whose coefficients are known."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.overoptimisation import best_of_n, best_of_n_kl, fit, read_best_of_n, read_sweep


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    generator = torch.Generator().manual_seed(n)
    proxy = torch.randint(0, 3, (4, 5), generator=generator).float()  # with ties
    gold = torch.randn(4, 5, generator=generator)
    for row, (scores, golds) in enumerate(zip(proxy.tolist(), gold.tolist(), strict=True)):
        taken = []
        for subset in itertools.combinations(range(5), n):
            best = max(scores[i] for i in subset)
            ties = [golds[i] for i in subset if scores[i] == best]
            taken.append(sum(ties) / len(ties))
        found = float(best_of_n(proxy, gold, n)[row])
        # A tie within a subset is broken evenly; so it is by the shared weights, on average over prompts alike.
        assert found == pytest.approx(sum(taken) / len(taken), abs=1e-6)


def test_best_of_n_of_the_proxy_itself_rises_to_the_maximum():
    scores = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    assert [float(best_of_n(scores, scores, n)) for n in (1, 2, 4)] == pytest.approx([2.5, 10 / 3, 4.0])


def test_the_kl_of_best_of_n_by_its_definition():
    """Over many outcomes of equal probability, the best one's rank has the density n u^(n - 1) on [0, 1]."""
    size, n = 200_000, 8
    ranks = (torch.arange(size).double() + 0.5) / size
    density = n * ranks ** (n - 1)
    assert best_of_n_kl(n) == pytest.approx(float((density * density.log()).mean()), rel=1e-5)


CURVES = {
    "best_of_n": (lambda d: d * (1.5 - 0.25 * d), 1.5 / (2 * 0.25)),
    "rl": (lambda d: d * (1.5 - 0.25 * torch.log(d)), math.exp(1.5 / 0.25 - 1)),
}


@pytest.mark.parametrize("form", CURVES)
def test_a_fit_finds_the_coefficients_and_the_peak(form):
    curve, peak = CURVES[form]
    distance = torch.linspace(0.1, 6, 40)
    found = fit(distance, curve(distance), form)
    assert found.alpha == pytest.approx((1.5, 1.5, 1.5), rel=1e-6)
    assert found.beta == pytest.approx((0.25, 0.25, 0.25), rel=1e-5)
    assert found.r_squared == pytest.approx(1.0)
    assert found.peak == pytest.approx(peak, rel=1e-4)
    noise = 0.3 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    noisy = fit(distance, curve(distance) + noise, form)
    assert noisy.alpha.low < 1.5 < noisy.alpha.high
    assert noisy.beta.low < 0.25 < noisy.beta.high
    assert 0.5 < noisy.r_squared < 1
    together = fit(distance, curve(distance) + noise, form, runs=torch.arange(40) % 2)  # of two runs, one may be drawn
    assert together.alpha.value == pytest.approx(noisy.alpha.value)
    assert together.alpha.low != noisy.alpha.low


def test_the_first_policy_itself_is_a_distance_of_0_and_a_reward_that_only_rises_has_no_peak():
    distance = torch.tensor([0.0, 1.0, 2.0, 3.0])
    found = fit(distance, 2 * distance, "rl")
    assert found(torch.tensor(0.0)) == 0
    assert found.beta.value == pytest.approx(0, abs=1e-9)
    assert fit(distance, distance + distance.square(), "best_of_n").peak == math.inf


@pytest.mark.parametrize(
    ("distance", "reward", "form", "message"),
    [
        ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], "log", "best_of_n, rl"),
        ([0.0, 1.0], [0.0, 1.0], "rl", "three or more"),
        ([0.0, 1.0, 2.0], [0.0, 1.0], "rl", "as many"),
        ([-1.0, 1.0, 2.0], [0.0, 1.0, 2.0], "rl", "not below 0"),
        ([0.0, 1.0, 2.0], [0.0, math.nan, 2.0], "rl", "finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(distance, reward, form, message):
    with pytest.raises(UserError, match=message):
        fit(torch.tensor(distance), torch.tensor(reward), form)


@pytest.mark.parametrize("runs", [[7, 7, 7], [0, 1]])
def test_a_single_run_has_no_interval(runs):
    distance = torch.tensor([0.0, 1.0, 2.0])
    with pytest.raises(UserError, match="two runs or more"):
        fit(distance, distance, "rl", runs=torch.tensor(runs))


def test_more_than_there_are_completions_is_refused():
    with pytest.raises(UserError, match=r"best of 4 .* 3 completions"):
        best_of_n(torch.ones(1, 3), torch.ones(1, 3), 4)


# ---- reading a sweep ------------------------------------------------------------------------------------------------


def write_job(job: Path, *, comparisons: int = 300, rows: str = "1,0.0,0.5,0.25\n2,4.0,1.5,0.75\n") -> Path:
    """A job's folder as the sweep leaves it, with what is read."""
    for stage, config in (
        ("proxy", {"data": {"pairs_per_epoch": comparisons}}), ("ppo", {"kl": {"coef": 0.1}, "seed": 7}),
    ):  # fmt: skip
        (job / stage).mkdir(parents=True)
        (job / stage / "config.yaml").write_text(yaml.safe_dump(config))
    head = "iteration,objective/kl,reward/model,gold/model\n0,,,0.5\n"  # a validation before training
    (job / "ppo" / "metrics.csv").write_text(head + rows)
    return job


def write_evaluation(job: Path, proxy: list[list[float]], gold: list[list[float]], policy: str = "policy") -> None:
    """Scores (N, B) of N completions of each of B prompts, in the order in which they are asked for."""
    (job / "best_of_n").mkdir()
    (job / "best_of_n" / "evaluation.json").write_text(json.dumps({"samples_per_prompt": len(proxy)}))
    lines = [
        {"policy": name, "prompt": f"p{i}", "components": {"model": x}, "gold": {"model": y}}
        for name, sign in ((policy, 1), ("reference", -1)) for xs, ys in zip(proxy, gold, strict=True)
        for i, (x, y) in enumerate(zip((sign * x for x in xs), ys, strict=True))
    ]  # fmt: skip
    (job / "best_of_n" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_sweep_is_read_job_by_job_and_iteration_by_iteration(tmp_path):
    write_job(tmp_path / "0")
    write_job(tmp_path / "1", comparisons=1000, rows="1,0.0,0.0,0.0\n")
    first = {"comparisons": 300, "kl_coef": 0.1, "seed": 7}
    assert read_sweep(tmp_path) == [
        {**first, "iteration": 1, "kl": 0.0, "proxy": 0.5, "gold": 0.25},
        {**first, "iteration": 2, "kl": 4.0, "proxy": 1.5, "gold": 0.75},
        {**first, "comparisons": 1000, "iteration": 1, "kl": 0.0, "proxy": 0.0, "gold": 0.0},
    ]


def test_the_best_of_n_comes_from_a_policy_s_own_completions_prompt_by_prompt(tmp_path):
    # Two prompts; of the first the proxy likes the third completion best, of the second the first one.
    write_evaluation(write_job(tmp_path / "0"), [[0, 9], [1, 5], [2, 1]], [[10, 1], [20, 2], [60, 3]])
    rows = read_best_of_n(tmp_path)
    found = {(row["part"], row["n"]): (row["proxy"], row["gold"]) for row in rows}
    assert found == {
        (0, 1): pytest.approx((1, 30)), (0, 2): pytest.approx(((1 + 2 + 2) / 3, (20 + 60 + 60) / 3)),
        (0, 3): pytest.approx((2, 60)), (1, 1): pytest.approx((5, 2)), (1, 2): pytest.approx(((9 + 9 + 5) / 3, 4 / 3)),
        (1, 3): pytest.approx((9, 1)),
    }  # fmt: skip
    assert {(row["comparisons"], row["seed"]) for row in rows} == {(300, 7)}
    assert all(row["kl"] == best_of_n_kl(row["n"]) for row in rows)
    together = read_best_of_n(tmp_path, parts=1)
    assert [row["gold"] for row in together] == pytest.approx([16, (140 / 3 + 4 / 3) / 2, 30.5])


def test_what_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no ppo in its jobs"):
        read_sweep(tmp_path)
    job = write_job(tmp_path / "0")
    with pytest.raises(UserError, match="there is no best_of_n in its jobs"):
        read_best_of_n(tmp_path)
    write_evaluation(job, [[0, 9], [1, 5]], [[1, 1], [2, 2]], policy="other")
    with pytest.raises(UserError, match="does not hold 2 completions of each prompt"):
        read_best_of_n(tmp_path)
    (job / "best_of_n" / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="no evaluation by two reward models"):
        read_best_of_n(tmp_path)
    (job / "ppo" / "metrics.csv").write_text("iteration,objective/kl,reward/model\n1,0,0\n")
    with pytest.raises(UserError, match="has no column gold/model"):
        read_sweep(tmp_path)
    (job / "proxy" / "config.yaml").unlink()
    with pytest.raises(UserError, match="proxy is no run folder"):
        read_sweep(tmp_path)
