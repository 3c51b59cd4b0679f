"""Loggers and the formats of the run folder: what is on disk after a run, a resume, a kill, a failed W&B."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import psutil
import pytest
import torch
import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from lit_rlhf.errors import UserError
from lit_rlhf.loggers import CSVLogger, WandbLogger
from lit_rlhf.loggers.wandb import latest_run
from lit_rlhf.loggers.wandb_file import read_offline_runs
from lit_rlhf.run_folder import read_metrics, read_samples, write_summary
from tests.wandb_file import runs

# --- metrics.csv ---


def csv_lines(folder: Path) -> list[str]:
    return (folder / "metrics.csv").read_text().split("\n")


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    logger = CSVLogger(save_dir=tmp_path / "run")
    logger.log_metrics({"objective/kl": 1.5, "episode": 8, "tokens": 90}, step=1)
    assert csv_lines(tmp_path / "run") == ["iteration,episode,tokens,objective/kl", "1,8,90,1.5", ""]
    logger.log_metrics({"episode": 16, "tokens": 180, "objective/kl": 2.0}, step=2)
    assert csv_lines(tmp_path / "run")[2] == "2,16,180,2.0"


def test_floats_read_back_to_the_bit(tmp_path):
    values = [0.1 + 0.2, 1 / 3, 5e-324, -1.7976931348623157e308, float("nan"), float("inf"), 1e22, 0.0, -0.0]
    logger = CSVLogger(save_dir=tmp_path)
    logger.log_metrics({f"reward/{i}": value for i, value in enumerate(values)}, step=1)
    (row,) = read_metrics(tmp_path)
    assert [float(row[f"reward/{i}"]).hex() for i in range(len(values))] == [value.hex() for value in values]


def test_tensors_and_flags_are_written_as_numbers(tmp_path):
    logger = CSVLogger(save_dir=tmp_path)
    logger.log_metrics({"a": torch.tensor(0.1), "b": torch.tensor(3), "c": True, "d": None}, step=1)
    assert csv_lines(tmp_path)[:2] == ["iteration,episode,tokens,a,b,c", "1,,,0.10000000149011612,3,1"]


def test_a_metric_that_appears_later_gets_a_column_and_earlier_rows_a_blank(tmp_path):
    logger = CSVLogger(save_dir=tmp_path)
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_metrics({"val/b": 2.0}, step=2)
    logger.log_metrics({"a": 3.0, "x,y": 4.0}, step=3)
    assert csv_lines(tmp_path)[0] == 'iteration,episode,tokens,a,val/b,"x,y"'
    assert csv_lines(tmp_path)[1:] == ["1,,,1.0,,", "2,,,,2.0,", "3,,,3.0,,4.0", ""]
    assert read_metrics(tmp_path)[1] == {"iteration": 2, "val/b": 2.0}
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_resume_cuts_the_rows_after_the_checkpoint(tmp_path):
    logger = CSVLogger(save_dir=tmp_path)
    for i in range(5):
        logger.log_metrics({"a": i / 3}, step=i)
    text = (tmp_path / "metrics.csv").read_text()
    resumed = CSVLogger(save_dir=tmp_path)
    resumed.resume_from(2)
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    for i in (3, 4):
        resumed.log_metrics({"iteration": i, "a": i / 3}, step=i)
    assert (tmp_path / "metrics.csv").read_text() == text


def test_rows_of_lightning_and_its_callbacks_keep_their_step_and_are_cut_by_it(tmp_path):
    """Two steps an iteration; the run is resumed from a checkpoint of the third step, within the second iteration."""

    def write(logger, steps):
        for step in steps:
            logger.log_metrics({"lr-Adam": step / 3}, step=step)  # before the step, as LearningRateMonitor does
            if step % 2:
                logger.log_metrics({"iteration": (step + 1) // 2, "a": step / 7}, step=(step + 1) // 2)

    logger = CSVLogger(save_dir=tmp_path)
    logger.resume_from(-1)
    write(logger, range(6))
    text = (tmp_path / "metrics.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["iteration"] for row in rows] == ["0", "0", "1", "1", "1", "2", "2", "2", "3"]
    assert [row["step"] for row in rows] == ["0", "1", "", "2", "3", "", "4", "5", ""]
    resumed = CSVLogger(save_dir=tmp_path)
    resumed.resume_from(1, 3)
    write(resumed, range(3, 6))
    assert (tmp_path / "metrics.csv").read_text() == text


def test_a_fresh_run_into_a_used_folder_starts_anew(tmp_path):
    CSVLogger(save_dir=tmp_path).log_metrics({"old": 1.0}, step=0)
    logger = CSVLogger(save_dir=tmp_path)
    logger.resume_from(-1)
    assert read_metrics(tmp_path) == []
    logger.log_metrics({"iteration": 1, "new": 1.0}, step=1)
    assert csv_lines(tmp_path) == ["iteration,episode,tokens,new", "1,,,1.0", ""]


def test_a_row_that_a_kill_cut_short_is_dropped(tmp_path):
    CSVLogger(save_dir=tmp_path).log_metrics({"a": 1.0, "b": 2.0}, step=1)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("2,,,1.0,2.")  # 2.0 or 2.75: nobody knows
    with open(tmp_path / "metrics.csv", "ab") as file:
        file.write(b"\xe2\x82")  # two bytes of a character's three
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [1]
    logger = CSVLogger(save_dir=tmp_path)
    logger.log_metrics({"a": 3.0, "b": 4.0}, step=2)
    assert csv_lines(tmp_path)[1:] == ["1,,,1.0,2.0", "2,,,3.0,4.0", ""]


def test_a_row_without_iteration_is_refused(tmp_path):
    with pytest.raises(UserError, match="iteration"):
        CSVLogger(save_dir=tmp_path).log_metrics({"a": 1.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"iteration,a\n1,2\n2\n", "line 3: 1 fields, but 2"),
        (b"iteration,a\n1,2\n2,x\n", "line 3: not a row of numbers"),
        (b"a\n1\n", "line 2: not a row of numbers"),
        (b"\xff\xfe\n", "cannot be read"),
    ],
)
def test_a_broken_metrics_file_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "metrics.csv").write_bytes(text)
    with pytest.raises(UserError, match=message) as error:
        read_metrics(tmp_path)
    assert str(tmp_path / "metrics.csv") in str(error.value)


def test_checkpoints_of_a_plain_trainer_land_in_the_run_folder(tmp_path):
    trainer = Trainer(
        logger=CSVLogger(save_dir=tmp_path),
        callbacks=[ModelCheckpoint(save_last=True)],
        max_steps=2,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(BoringModel())
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


# --- summary.json ---


def test_the_summary_has_last_and_best_values(tmp_path):
    logger = CSVLogger(save_dir=tmp_path)
    logger.log_metrics({"val/objective/scores": 0.1, "tokens": 0}, step=0)
    logger.log_metrics({"objective/scores": 0.5, "objective/kl": 1.0, "sft/perplexity": 3.0, "mine": 1.0}, step=1)
    logger.log_metrics({"objective/scores": 0.9, "objective/kl": 9.0, "sft/perplexity": 2.5}, step=2)
    logger.log_metrics({"objective/scores": 0.7, "objective/kl": math.nan, "sft/perplexity": 4.0}, step=3)
    summary = write_summary(tmp_path, status="finished", wall_seconds=12.5, peak_memory_gb=math.inf)
    assert summary == {
        "iteration": 3,
        "tokens": 0,
        "val/objective/scores": 0.1,
        "best/val/objective/scores": 0.1,
        "objective/scores": 0.7,
        "best/objective/scores": 0.9,
        "objective/kl": "nan",
        "sft/perplexity": 4.0,
        "best/sft/perplexity": 2.5,
        "mine": 1.0,
        "status": "finished",
        "wall_seconds": 12.5,
        "peak_memory_gb": "inf",
    }

    def refuse(constant):
        raise AssertionError(f"bare {constant} in JSON")

    assert json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse) == summary


def test_the_best_value_ignores_what_is_not_finite(tmp_path):
    logger = CSVLogger(save_dir=tmp_path)
    for step, value in enumerate([math.inf, 1.0, math.nan, 0.5]):
        logger.log_metrics({"objective/scores": value}, step=step)
    assert write_summary(tmp_path)["best/objective/scores"] == 1.0


def test_a_run_without_rows_still_gets_a_summary(tmp_path):
    assert write_summary(tmp_path, status="failed") == {"status": "failed"}


# --- Weights & Biases ---

SAMPLE = {
    "iteration": 1,
    "split": "train",
    "prompt": "A film",
    "completion": "that <b>ends</b>\u2028",
    "score": math.nan,
    "components": {"vader": 0.5},
    "gold": {"lexicon": 0.25},
    "kl": 1.5,
    "length": 4,
}
FAKE_KEY = "0" * 40
NOBODY_THERE = {"WANDB_BASE_URL": "http://localhost:9", "WANDB_INIT_TIMEOUT": "1"}


@pytest.fixture(autouse=True)
def _no_account(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    yield
    wandb.teardown()  # so that the next test's service reads its own environment


def kill_service() -> None:
    services = [p for p in psutil.Process().children(recursive=True) if "wandb-core" in p.name()]
    assert services
    for process in services:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(5)


def test_without_a_key_the_run_is_recorded_offline_and_nothing_is_printed(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger = WandbLogger(save_dir=tmp_path, name="n", group="g", job_type="ppo", tags=["t"])
        logger.log_hyperparams({"kl": {"coef": 0.02}, "seed": 0})
        logger.resume_from(-1)
        logger.log_metrics({"iteration": 1, "episode": 8, "tokens": 90, "objective/kl": 1.5})
        logger.log_metrics({"iteration": 2, "episode": 16, "tokens": 180, "objective/kl": torch.tensor(2.5)})
        logger.log_summary({"best/objective/scores": 0.75, "status": "finished"})
        logger.finish()
    (run,) = runs(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (run.run.display_name, run.run.run_group, run.run.job_type, list(run.run.tags)) == ("n", "g", "ppo", ["t"])
    assert run.config["kl"] == {"coef": 0.02}
    assert run.config["seed"] == 0
    assert "resumed_from" not in run.config
    rows = [{k: v for k, v in row.items() if not k.startswith("_")} for row in run.history]
    assert rows == [
        {"iteration": 1, "episode": 8, "tokens": 90, "objective/kl": 1.5, "attempt": 0},
        {"iteration": 2, "episode": 16, "tokens": 180, "objective/kl": 2.5, "attempt": 0},
    ]
    assert run.summary["best/objective/scores"] == 0.75
    assert run.exit_code == 0
    steps = {metric.name or metric.glob_name: metric.step_metric for metric in run.metrics}
    assert steps == {"iteration": "", "episode": "", "tokens": "", "*": "iteration"}


def test_a_table_of_samples_is_logged_with_its_iteration(tmp_path):
    logger = WandbLogger(save_dir=tmp_path)
    logger.log_samples([SAMPLE, SAMPLE | {"score": 1.0}], step=1)
    logger.finish()
    (run,) = runs(tmp_path)
    assert run.history[0]["iteration"] == 1
    table = json.loads(next(tmp_path.glob("wandb/*run-*/files/media/table/*.json")).read_text())
    assert table["columns"][:4] == ["iteration", "split", "prompt", "completion"]
    assert table["columns"][4:] == ["score", "kl", "length", "components/vader", "gold/lexicon"]
    assert table["data"] == [
        [1, "train", "A film", SAMPLE["completion"], None, 1.5, 4, 0.5, 0.25],
        [1, "train", "A film", SAMPLE["completion"], 1.0, 1.5, 4, 0.5, 0.25],
    ]


def test_a_row_that_takes_the_place_of_another_is_known_by_its_attempt(tmp_path):
    """A run that is rolled back to iteration 1, killed after iteration 3, and resumed from the checkpoint of 2."""
    logger = WandbLogger(save_dir=tmp_path)
    logger.resume_from(-1)
    logger.log_metrics({"iteration": 0, "a": 0.0})
    logger.resume_from(0)  # the validation before training
    for iteration, a in ((1, 1.0), (2, 9.0)):
        logger.log_metrics({"iteration": iteration, "a": a})
    logger.log_metrics({"lr-Adam": 0.1}, step=7)
    logger.resume_from(1)
    for iteration, a in ((2, 2.0), (3, 9.0)):
        logger.log_metrics({"iteration": iteration, "a": a})
    logger.finish()
    again = WandbLogger(save_dir=tmp_path)
    again.resume_from(2)
    again.log_samples([SAMPLE], step=3)
    again.log_metrics({"iteration": 3, "a": 3.0})
    again.finish()
    rows = [row for run in runs(tmp_path) for row in run.history]
    assert [(row["iteration"], row["attempt"]) for row in rows if "a" in row] == [
        (0, 0), (1, 0), (2, 0), (2, 1), (3, 1), (3, 2),
    ]  # fmt: skip
    assert [(row["iteration"], row["step"]) for row in rows if "lr-Adam" in row] == [(2, 7)]  # of a LearningRateMonitor
    assert {row["attempt"] for row in rows if any(name.startswith("samples") for name in row)} == {2}
    last = {row["iteration"]: row["a"] for row in sorted(rows, key=lambda row: row["attempt"]) if "a" in row}
    assert last == {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0}
    fresh = WandbLogger(save_dir=tmp_path)
    fresh.resume_from(-1)
    fresh.log_metrics({"iteration": 1, "a": 1.0})
    fresh.finish()
    assert runs(tmp_path)[-1].history[0]["attempt"] == 0
    (tmp_path / "wandb/offline-run-0").mkdir()
    (tmp_path / "wandb/offline-run-0/run-0.wandb").write_bytes(b":W&B\xe1\xbe\0")  # killed before it had a name
    found = read_offline_runs(tmp_path)
    assert [[row["iteration"] for row in run.rows] for run in found] == [[3], [1]]  # the first run was continued
    assert {"a", "samples"} <= {name.partition("/")[0] for name in found[0].rows[0]}  # two rows of one iteration


def test_an_offline_run_that_continues_has_the_rows_so_far_which_a_kill_can_have_lost(tmp_path):
    rows = [{"iteration": iteration, "a": iteration / 3, "episode": 8 * iteration} for iteration in range(4)]
    first = WandbLogger(save_dir=tmp_path)
    for logger in (first, CSVLogger(save_dir=tmp_path)):
        logger.resume_from(-1)
        for row in rows:
            logger.log_metrics(row)
    first.finish()
    resumed = WandbLogger(save_dir=tmp_path)
    resumed.resume_from(2)
    resumed.log_metrics(rows[3])
    resumed.finish()
    history = [{k: v for k, v in row.items() if not k.startswith("_")} for row in runs(tmp_path)[-1].history]
    assert history == [{**row, "attempt": 1} for row in rows]
    (found,) = read_offline_runs(tmp_path)  # of the two the one that has all rows
    assert (found.id, found.folder) == (runs(tmp_path)[-1].run.run_id, tmp_path)
    assert [{k: v for k, v in row.items() if not k.startswith("_")} for row in found.rows] == history


def test_a_resumed_run_is_new_in_the_same_group_and_names_the_old_one(tmp_path):
    for iteration in (-1, 2, -1):
        logger = WandbLogger(save_dir=tmp_path, group="g")
        logger.resume_from(iteration)
        if iteration < 0:
            logger.resume_from(0)  # a fresh run again, after the validation of its start
        logger.log_metrics({"a": 1.0}, step=iteration + 1)
        logger.finish()
    ids = {run.run.run_id: run for run in runs(tmp_path)}
    assert len(ids) == 3
    (resumed,) = [run for run in ids.values() if "resumed_from" in run.config]
    assert resumed.run.run_group == "g"
    assert resumed.config["resumed_from"] in ids.keys() - {resumed.run.run_id}
    assert not [row for row in ids[resumed.config["resumed_from"]].history if row["iteration"] == 3]


def test_a_nan_and_a_callbacks_alarm_alert_once(tmp_path):
    logger = WandbLogger(save_dir=tmp_path, alert_kl=5.0)
    for step in (1, 2):
        logger.log_metrics({"objective/kl": math.nan, "a": 1.0, "b": math.nan}, step=step)
    for text in ("first", "second"):
        logger.log_alert("Reward hacking: gold", text)
    logger.finish()
    (run,) = runs(tmp_path)
    assert run.alerts == {"NaN": "iteration 1: objective/kl, b", "Reward hacking: gold": "first"}


@pytest.mark.parametrize(
    ("error", "status", "alerts"),
    [
        (KeyboardInterrupt(), "interrupted", {}),
        (SystemExit(1), "interrupted", {}),
        (OSError("disk full"), "failed", {"Run failed": "OSError: disk full"}),
    ],
)
def test_the_summary_says_how_a_run_ended_and_only_an_error_alerts(tmp_path, error, status, alerts):
    logger = WandbLogger(save_dir=tmp_path)
    logger.log_metrics({"a": 1.0}, step=1)

    def fails():
        try:
            raise error
        finally:
            logger.finish(1)

    with pytest.raises(type(error)):
        fails()
    (run,) = runs(tmp_path)
    assert (run.exit_code, run.summary["status"], run.alerts) == (1, status, alerts)


def test_distributions_leave_out_what_is_not_finite(tmp_path):
    logger = WandbLogger(save_dir=tmp_path)
    logger.log_distributions({"scores": [1.0, math.nan, 2.0], "kl": [0.5, 0.5, math.inf], "ratios": []}, step=3)
    logger.finish()
    (row,) = runs(tmp_path)[0].history
    assert row["iteration"] == 3
    assert (sum(row["distribution/scores/values"]), sum(row["distribution/kl/values"])) == (2, 2)
    assert not [name for name in row if "ratios" in name]
    table = json.loads(next(tmp_path.glob("wandb/*run-*/files/media/table/*.json")).read_text())
    assert (table["columns"], table["data"]) == (["kl", "score"], [[0.5, 1.0]])


class Fails(BoringModel):
    def training_step(self, *_):
        raise RuntimeError("deliberate")


def fit(model, **kwargs) -> None:
    Trainer(max_steps=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, **kwargs).fit(model)  # fmt: skip


def test_a_failed_fit_closes_the_run_as_failed_and_a_good_one_leaves_it_open(tmp_path):
    good, bad = WandbLogger(save_dir=tmp_path / "good"), WandbLogger(save_dir=tmp_path / "bad")
    with pytest.raises(RuntimeError, match="deliberate"):
        fit(Fails(), logger=bad)
    failed = runs(tmp_path / "bad")[0]
    assert (failed.exit_code, failed.alerts) == (1, {"Run failed": "RuntimeError: deliberate"})
    assert failed.summary["status"] == "failed"
    fit(BoringModel(), logger=good)
    good.log_metrics({"after": 1.0}, step=9)
    good.finish()
    good.log_metrics({"too late": 1.0}, step=10)
    (run,) = runs(tmp_path / "good")
    assert run.history[-1]["after"] == 1
    assert run.exit_code == 0


def test_the_next_job_of_a_process_does_not_go_on_in_a_run_left_open(tmp_path):
    for job in ("one", "two"):
        logger = WandbLogger(save_dir=tmp_path / job)
        logger.log_metrics({"a": 1.0}, step=1)
    logger.finish()
    (one,), (two,) = runs(tmp_path / "one"), runs(tmp_path / "two")
    assert one.run.run_id != two.run.run_id
    assert [row["iteration"] for row in one.history] == [row["iteration"] for row in two.history] == [1]


def test_a_run_that_the_user_opened_is_used_and_left_open(tmp_path):
    (tmp_path / "mine").mkdir()
    with wandb.init(dir=tmp_path / "mine", mode="offline") as run:
        logger = WandbLogger(save_dir=tmp_path / "ours")
        logger.log_metrics({"a": 1.0}, step=1)
        logger.finish()
        run.log({"iteration": 2})
    assert [row["iteration"] for row in runs(tmp_path / "mine")[0].history] == [1, 2]
    assert runs(tmp_path / "ours") == []


def exercise(logger: WandbLogger) -> None:
    logger.log_hyperparams({"seed": 0})
    logger.resume_from(3)
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_samples([SAMPLE], step=1)
    logger.log_summary({"a": 1.0})
    logger.experiment.config["b"] = 2
    logger.finalize("success")
    logger.finish(exit_code=1)


def test_a_dead_service_costs_one_warning_and_spares_the_next_job(tmp_path):
    logger = WandbLogger(save_dir=tmp_path / "one")
    logger.log_metrics({"a": 1.0}, step=1)
    kill_service()
    with pytest.warns(UserWarning, match="W&B failed to log") as warned:
        exercise(logger)
    assert sum(str(w.message).startswith("W&B") for w in warned) == 1
    following = WandbLogger(save_dir=tmp_path / "two")
    following.log_metrics({"a": 1.0}, step=1)
    following.finish()
    assert runs(tmp_path / "two")[0].exit_code == 0


def test_a_service_that_dies_before_the_end_does_not_fail_the_process(tmp_path):
    script = """
        import os, signal, sys
        import psutil
        from lit_rlhf.loggers import WandbLogger
        logger = WandbLogger(save_dir=sys.argv[1])
        logger.log_metrics({"a": 1.0}, step=1)
        for process in psutil.Process().children(recursive=True):
            os.kill(process.pid, signal.SIGKILL)
            process.wait(5)
        logger.finish(0)
        print("trained")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "trained\n")
    assert done.stderr.count("W&B failed to") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("obstacle", ["file for folder", "WANDB_MODE", "WANDB_BASE_URL"])
def test_a_run_that_cannot_start_costs_one_warning(tmp_path, monkeypatch, obstacle):
    folder = tmp_path / "run"
    if obstacle == "file for folder":
        folder.mkdir()
        (folder / "wandb").write_text("in the way")
    else:
        monkeypatch.setenv(obstacle, "nonsense")
    with pytest.warns(UserWarning, match="W&B failed to start") as warned:
        exercise(WandbLogger(save_dir=folder))
    assert sum(str(w.message).startswith("W&B") for w in warned) == 1


@pytest.mark.parametrize(
    ("variables", "mode", "reason"),
    [
        ({"WANDB_API_KEY": FAKE_KEY, **NOBODY_THERE}, None, "refused"),
        ({"WANDB_API_KEY": "short"}, None, "40"),
        ({}, "online", "no API key"),
        ({"WANDB_MODE": "online"}, None, "no API key"),
    ],
)
def test_a_run_that_cannot_go_online_is_recorded_offline(tmp_path, monkeypatch, variables, mode, reason):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    logger = WandbLogger(save_dir=tmp_path, mode=mode)
    with pytest.warns(UserWarning, match=rf"cannot go online \(.*{reason}.*wandb sync") as warned:
        exercise(logger)
    assert sum(str(w.message).startswith("W&B") for w in warned) == 1
    assert runs(tmp_path)[-1].history[0]["a"] == 1


def test_a_key_in_netrc_means_online(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text(f"machine localhost:9\n login user\n password {FAKE_KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in NOBODY_THERE.items():
        monkeypatch.setenv(name, value)
    logger = WandbLogger(save_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"cannot go online \(.*refused"):  # it tried
        logger.log_metrics({"a": 1.0}, step=1)
    logger.finish()


def test_disabled_writes_nothing_and_says_nothing(tmp_path, recwarn):
    logger = WandbLogger(save_dir=tmp_path, mode="disabled")
    logger.log_hyperparams({"data": {"_target_": "my_pkg.Prompts"}})
    exercise(logger)
    assert runs(tmp_path) == []
    assert not [warning for warning in recwarn if "W&B" in str(warning.message)]


@pytest.mark.parametrize("bad", [{"mode": "off"}, {"project": "a/b?c"}, {"project": ""}, {"step_metric": "loss"}])
def test_settings_that_wandb_cannot_take_are_refused(tmp_path, bad):
    with pytest.raises(UserError, match=rf"logger\.wandb\.{next(iter(bad))}="):
        WandbLogger(save_dir=tmp_path, **bad)


def test_a_lone_surrogate_does_not_stop_reading_or_writing(tmp_path):
    (tmp_path / "samples.jsonl").write_bytes(b'{"iteration": 1, "prompt": "\\ud800"}\n{"iteration": 2, "pro')
    assert read_samples(tmp_path) == [{"iteration": 1, "prompt": "\ud800"}]


def test_the_newest_of_a_folders_wandb_runs_is_the_one_to_continue(tmp_path):
    assert latest_run(tmp_path) == (None, False)
    for name in ("run-20260102_000000-second", "offline-run-20260101_000000-first"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    assert latest_run(tmp_path) == ("second", True)
    (tmp_path / "wandb" / "offline-run-20260103_000000-third").mkdir()
    assert latest_run(tmp_path) == ("third", False)
