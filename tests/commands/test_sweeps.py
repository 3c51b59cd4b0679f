"""Many runs by one command: Hydra multiruns with every launcher, Optuna, and the W&B sweeps in sweeps/."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from classifiers import save_classifier
from command_line import ROOT, TINY, Result, run_here, write_module, write_ratings
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args
from wandb_file import runs

from lit_rlhf.config import CONFIG_DIR
from lit_rlhf.metrics import lookup
from lit_rlhf.run_folder import read_metrics
from lit_rlhf.sweep import Sweep

MODULE = """
import torch

def threads(prompts, completions, **columns):
    return [float(torch.get_num_threads())] * len(completions)

def raises(prompts, completions, **columns):
    return [1 / len(prompts[0][:0])]

class Interrupted:
    def __init__(self):
        raise KeyboardInterrupt
"""
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))


@pytest.fixture
def module(folder, monkeypatch) -> str:
    """Rewards of the user's, importable here and in the jobs' processes."""
    write_module(folder, "my_rewards", MODULE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{folder}")
    return "my_rewards"


def sweep(*overrides: str) -> Result:
    return run_here("train", "-m", *TINY, "reward=length", "hydra.sweep.dir=sweep", *overrides)


def table() -> list[dict[str, str]]:
    with open("sweep/sweep.csv", newline="") as file:
        return list(csv.DictReader(file))


def columns(*names: str) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in names) for row in table()]


def require_rows_of_their_runs() -> None:
    """That a row of a completed job holds what its own run folder says."""
    for row in table():
        if row["status"] != "completed":
            continue
        run = Path("sweep", row["folder"])
        summary = json.loads((run / "summary.json").read_text())
        assert {name: row[name] for name in summary if name != "status"} == {
            name: str(value) for name, value in summary.items() if name != "status"
        }
        assert row["optimized_value"] == str(summary["objective/rlhf_reward"])
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert (str(config["kl"]["coef"]), str(config["seed"])) == (row["kl.coef"], row["seed"])
        assert (run / "model" / "model.safetensors").is_file()


# ---- Hydra multirun -------------------------------------------------------------------------------------------------


def test_a_grid_leaves_a_row_for_every_job_one_report_and_one_wandb_group(folder):
    result = sweep("kl.coef=0.1,0.2", "seed=0,1", "logger=csv_wandb")
    assert result.code == 0, result.err
    assert columns("job", "kl.coef", "seed", "status", "folder", "error", "reward") == [
        ("0", "0.1", "0", "completed", "0", "", "length"),
        ("1", "0.1", "1", "completed", "1", "", "length"),
        ("2", "0.2", "0", "completed", "2", "", "length"),
        ("3", "0.2", "1", "completed", "3", "", "length"),
    ]
    require_rows_of_their_runs()
    assert Path("sweep/report.html").is_file()
    opened = [run for job in "0123" for run in runs(folder / "sweep" / job)]
    for job in range(4):
        assert f"[{job}]  iteration 1/" in result.out
    assert "├──" not in result.out  # config.yaml has it, and four trees would bury the lines
    assert len({run.run.run_id for run in opened}) == 4
    assert {run.run.run_group for run in opened} == {"sweep"}
    assert [run.run.display_name for run in opened] == [
        f"{2 * i + j} kl.coef={coef},seed={j}" for i, coef in enumerate(("0.1", "0.2")) for j in (0, 1)
    ]
    require_the_reports_panels_in_wandb([run.run.run_id for run in opened])


def require_the_reports_panels_in_wandb(ids: list[str]) -> None:
    """That one more run of the group holds what report.html shows."""
    (shared,) = runs(Path("sweep"))
    assert (shared.run.job_type, shared.run.run_group, shared.exit_code) == ("report", "sweep", 0)
    assert shared.run.display_name == "report sweep"
    assert (shared.config["runs"], shared.config["varied"]) == (ids, ["kl.coef"])
    (logged,) = shared.history

    def table_of(name: str) -> list[dict]:
        content = json.loads(next(Path("sweep/wandb").glob(f"*run-*/files/{logged[f'{name}/path']}")).read_text())
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]

    expected = []
    for row in table():
        held_out = [one for one in read_metrics(Path("sweep", row["folder"])) if "val/objective/kl" in one]
        expected += [
            (
                "1" if row["kl.coef"] == "0.1" else "2", row["kl.coef"], row["folder"],
                (one["val/objective/kl"], one["val/objective/scores"]),
            )
            for one in held_out
        ]  # fmt: skip
    points = table_of("frontier/objective/scores_table")
    found = [(str(x["setting"]), x["kl.coef"], x["run"], (x["kl"], x["reward"])) for x in points]
    assert found == expected
    assert all(point["held_out"] for point in points)
    panel = shared.config["_wandb/visualize/frontier/objective/scores"]["panel_config"]
    assert (panel["panelDefId"], panel["fieldSettings"]) == ("wandb/scatter/v0", {"x": "kl", "y": "reward"})
    lines = table_of("curves/objective/scores_table")
    assert {line["lineKey"] for line in lines} == {"1  kl.coef=0.1", "2  kl.coef=0.2"}
    results = table_of("results")
    for setting, coef in ((1, "0.1"), (2, "0.2")):
        finals = [float(row["objective/scores"]) for row in table() if row["kl.coef"] == coef]
        (band,) = [x for x in table_of("bands") if (x["setting"], x["metric"]) == (setting, "objective/scores")]
        assert (band["kl.coef"], band["episode"]) == (coef, 4)
        assert (band["lowest"], band["highest"]) == (min(finals), max(finals))
        assert {line["step"]: line["lineVal"] for line in lines if line["lineKey"].startswith(str(setting))} == {
            4: pytest.approx(sum(finals) / 2)
        }
        (row,) = [x for x in results if x["setting"] == setting]
        assert (row["kl.coef"], row["runs"].count("completed")) == (coef, 2)
    assert [list(row)[1:] for row in table_of("samples")] == [["1  kl.coef=0.1", "2  kl.coef=0.2"]] * 2
    pictures = {path.stem for path in Path("sweep/pictures").glob("*.png")}
    assert {name.split("/")[1] for name in logged if name.startswith("pictures/")} == pictures
    (page,) = Path("sweep/wandb").glob(f"*run-*/files/{logged['report/path']}")
    assert page.read_text() == Path("sweep/report.html").read_text()


def test_a_job_that_fails_ends_no_other_and_the_command_names_it(folder):
    result = sweep("kl.coef=0.1,-1,0.2", "seed=5")
    assert result.code == 1
    assert "1 of 3 jobs failed" in result.err
    assert "1 (kl.coef=-1): kl.coef must be a finite number at least 0, got -1" in result.err
    assert "Traceback" not in result.err + result.out
    assert columns("kl.coef", "seed", "status") == [
        ("0.1", "5", "completed"), ("-1", "5", "failed"), ("0.2", "5", "completed"),
    ]  # fmt: skip
    assert table()[1]["error"].startswith("kl.coef must be")
    assert table()[1]["optimized_value"] == table()[1]["objective/scores"] == ""
    require_rows_of_their_runs()


def test_a_job_that_breaks_shows_its_traceback(module, folder):
    functions = f"reward.function={module}.raises,{module}.threads"
    result = sweep("reward=function", functions, "trainer.limit_val_batches=0")
    assert result.code == 1
    assert "in raises" in result.out
    assert "ZeroDivisionError" in result.out
    assert columns("status", "error") == [("failed", "division by zero"), ("completed", "")]


def test_all_jobs_failing_still_leaves_the_table(folder):
    result = sweep("kl.coef=-1,-2")
    assert result.code == 1
    assert "2 of 2 jobs failed" in result.err
    assert columns("kl.coef", "status") == [("-1", "failed"), ("-2", "failed")]


def test_an_interrupted_multirun_leaves_the_rows_of_what_was_begun(module, folder):
    own = f"{{_target_:{module}.Interrupted}},{{_target_:{module}.threads}}"
    with pytest.raises(KeyboardInterrupt):
        run_here("train", "-m", *TINY, "hydra.sweep.dir=sweep", "~reward", f"+reward={own}")
    assert columns("job", "status") == [("0", "interrupted")]


def test_a_key_that_does_not_exist_is_refused_before_any_job(folder):
    result = sweep("kl.koef=0.1,0.2")
    assert result.code == 1
    assert "koef" in result.err
    assert not list(Path("sweep").glob("*/*"))


def test_a_range_and_another_stage_go_to_the_same_folder(folder):
    result = sweep("seed=range(3,5)", "task_name=one,two", "kl.coef=0.1")
    assert result.code == 0, result.err
    assert not Path("sweep/wandb").exists()
    assert columns("seed", "task_name") == [("3", "one"), ("3", "two"), ("4", "one"), ("4", "two")]
    require_rows_of_their_runs()


def test_a_multirun_again_in_its_folder_has_no_rows_of_the_earlier_one(folder):
    assert sweep("seed=0,1", "callbacks=samples").code == 0
    assert sweep("seed=0", "ckpt_path=auto", "kl.coef=-1").code == 1
    assert columns("job", "status") == [("0", "failed")]


def test_a_multirun_leaves_those_in_folders_below_it_alone(folder):
    for place in ("sweep/earlier", "sweep"):
        result = sweep("seed=0,1", f"hydra.sweep.dir={place}", "kl.coef=-1")  # fails before it trains
        assert "2 of 2 jobs failed" in result.err
    assert columns("job", "folder") == [("0", "0"), ("1", "1")]
    assert sorted(map(str, Path("sweep/earlier").glob("*/job.json"))) == [
        "sweep/earlier/0/job.json", "sweep/earlier/1/job.json"
    ]  # fmt: skip


def test_jobs_in_parallel_share_the_threads(module, folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    result = sweep(
        "kl.coef=0.1,-1", "seed=0,1", "reward=function", f"reward.function={module}.threads",
        "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
    )  # fmt: skip
    assert result.code == 1
    assert "2 of 4 jobs failed" in result.err
    assert "3 (kl.coef=-1 seed=1): kl.coef must be" in result.err
    assert columns("job", "kl.coef", "seed", "status", "reward/threads") == [
        ("0", "0.1", "0", "completed", "2.0"), ("1", "0.1", "1", "completed", "2.0"),
        ("2", "-1", "0", "failed", ""), ("3", "-1", "1", "failed", ""),
    ]  # fmt: skip
    require_rows_of_their_runs()


def test_submitit_runs_jobs_elsewhere(module, folder):
    result = sweep(
        "kl.coef=0.1,-1", "seed=0", "reward=function", f"reward.function={module}.threads",
        "hydra/launcher=submitit_local",
    )  # fmt: skip
    assert result.code == 1
    assert columns("kl.coef", "status", "reward/threads") == [("0.1", "completed", "1.0"), ("-1", "failed", "")]
    require_rows_of_their_runs()


@pytest.mark.real
def test_ray_runs_jobs_elsewhere(module, folder, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    try:
        result = sweep("kl.coef=0.1,-1", "seed=0", "hydra/launcher=ray")
    finally:
        ray.shutdown()
    assert result.code == 1
    assert columns("kl.coef", "status") == [("0.1", "completed"), ("-1", "failed")]
    require_rows_of_their_runs()


# ---- Optuna ---------------------------------------------------------------------------------------------------------


#: The first iteration's completions are the untrained policy's, the same in every trial.
LONGER = ["trainer.max_epochs=3", "algorithm.rollout_batch_size=16", "reward.target=1"]


def test_optuna_searches_and_leaves_its_trials_and_the_best_one(folder):
    result = sweep("hparams_search=ppo_optuna", "hydra.sweeper.n_trials=3", "kl.coef=0.05", "seed=0", *LONGER)
    assert result.code == 0, result.err
    require_rows_of_their_runs()
    best = yaml.safe_load(Path("sweep/optimization_results.yaml").read_text())
    (winner,) = [row for row in table() if float(row["optimized_value"]) == best["best_value"]]
    assert best["best_value"] == max(float(row["optimized_value"]) for row in table())
    assert {key: str(value) for key, value in best["best_params"].items()}.items() <= winner.items()
    assert len(set(columns("optimizer.lr"))) == len(table()) == 3


def test_a_failed_trial_does_not_end_the_search(folder):
    result = sweep(
        "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.seed=0", "seed=0",
        "kl.coef=choice(-1,0.1)", "callbacks=samples",
    )  # fmt: skip
    assert result.code == 1
    assert "of 4 jobs failed" in result.err
    assert len(table()) == 4
    assert set(columns("kl.coef", "status")) == {("-1", "failed"), ("0.1", "completed")}
    assert yaml.safe_load(Path("sweep/optimization_results.yaml").read_text())["best_params"] == {"kl.coef": 0.1}


def test_a_value_that_is_not_finite_is_none_to_a_search(tmp_path):
    sweep = Sweep()
    sweep._folder = tmp_path
    (tmp_path / "0").mkdir()
    hydra = {"overrides": {"task": ["seed=3"]}, "job": {"num": 0}, "runtime": {"output_dir": str(tmp_path / "0")}}
    job = JobReturn(status=JobStatus.COMPLETED, _return_value=float("nan"))
    sweep.on_job_end(OmegaConf.create({"hydra": hydra}), job_return=job)
    assert job.return_value is None
    noted = json.loads((tmp_path / "0/job.json").read_text())
    assert (noted["status"], noted["value"], noted["folder"]) == ("completed", None, "0")


def test_a_search_without_one_complete_trial_leaves_its_rows(folder):
    result = sweep("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "kl.coef=interval(-2.0,-1.0)")
    assert result.code == 1
    assert columns("status") == [("failed",), ("failed",)]


@pytest.mark.parametrize("name", [path.stem for path in (CONFIG_DIR / "hparams_search").glob("*.yaml")])
def test_a_search_goes_in_the_better_direction_of_its_metric(name):
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        config = compose("train", overrides=[f"hparams_search={name}"], return_hydra_config=True)
    better = {"higher": "maximize", "lower": "minimize"}[lookup(config.optimized_metric).better]
    assert config.hydra.sweeper.direction == better


# ---- W&B sweeps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_wandb_sweep_opens_with_its_command_and_aims_at_a_logged_metric(path):
    assert path.read_text().startswith(f"# wandb sweep --project lit_rlhf sweeps/{path.name} && wandb agent ")
    metric = yaml.safe_load(path.read_text())["metric"]
    assert {"higher": "maximize", "lower": "minimize"}[lookup(metric["name"]).better] == metric["goal"]


def arguments_of(path: Path, end: int) -> tuple[list[str], dict[str, object]]:
    """What an agent passes to the program at one end of every range, by wandb's own function; and what it chose."""
    plan = yaml.safe_load(path.read_text())
    chosen = {}
    for key, parameter in plan["parameters"].items():
        values = parameter.get("values") or [parameter["min"], parameter["max"]]
        chosen[key] = values[end]
    arguments = create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    *program, last = plan["command"]
    assert program[:4] == ["${env}", "${interpreter}", "-m", "lit_rlhf.train"]
    assert last == "${args_no_hyphens}"
    return [*program[4:], *arguments["args_no_hyphens"]], chosen


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
@pytest.mark.parametrize("end", [0, -1])
def test_the_command_of_a_wandb_sweep_composes_with_what_it_varies(path, end):
    command, chosen = arguments_of(path, end)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        overrides = [*command, "paths.output_dir=run"]
        config = compose("train", overrides=overrides, return_hydra_config=True)
        OmegaConf.to_container(compose("train", overrides=overrides), resolve=True, throw_on_missing=True)
    for key, value in chosen.items():
        member = config.hydra.runtime.choices.get(key)
        assert (OmegaConf.select(config, key) if member is None else member) == value


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_run_of_a_wandb_sweep_logs_the_metric_that_it_aims_at(path, folder, tiny_models, monkeypatch):
    monkeypatch.setenv("LIT_RLHF_CACHE", str(folder / "cache"))
    write_ratings(folder / "cache", 300)
    command, _ = arguments_of(path, -1)
    small = [
        f"policy.path={tiny_models['policy']}", "algorithm.rollout_batch_size=4", "algorithm.minibatch_size=2",
        "sampler.max_new_tokens=4", "data.batch_size=4", "data.eval_prompts=4", "trainer.max_epochs=1",
        "trainer.check_val_every_n_epoch=1", "trainer.precision=32-true", "trainer.accelerator=cpu", "logger=csv",
    ]  # fmt: skip
    if any(override.startswith("reward.path=") for override in command):
        small.append(f"reward.path={save_classifier(folder / 'judge')}")
    result = run_here(*command, *small, "paths.output_dir=run", module="lit_rlhf.train")
    assert result.code == 0, result.err
    assert yaml.safe_load(path.read_text())["metric"]["name"] in read_metrics(Path("run"))[-1]


def test_the_comparison_of_algorithms_has_every_online_one():
    compared = yaml.safe_load((ROOT / "sweeps" / "algorithms.yaml").read_text())["parameters"]["algorithm"]["values"]
    online = [p.stem for p in (CONFIG_DIR / "algorithm").glob("*.yaml") if "/sampler:" in p.read_text()]
    assert sorted(compared) == sorted(online)


def test_what_starts_the_jobs_of_a_multirun_imports_no_torch():
    code = "import sys, lit_rlhf.train_command, lit_rlhf.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
