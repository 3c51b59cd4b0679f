"""What loggers have on disk after real tiny runs: W&B's offline files, TensorBoard's event files, MLflow's database."""

import html
import json
import shutil
from pathlib import Path

import lightning.pytorch.loggers.mlflow as lightning_mlflow
import pytest
import torch
import wandb
import yaml
from command_line import TINY, run_here, write_module, write_ratings
from wandb_file import WandbFile, runs

from lit_rlhf.loggers.wandb_objects import input_artifacts
from lit_rlhf.run_folder import read_metrics, read_samples

PPO = [*TINY, "reward=distinct", "algorithm.ppo_epochs=2", "optimizer.lr=0.01", "trainer.max_epochs=2"]


def start(*arguments: str | Path, run: str = "run", code: int = 0) -> WandbFile | None:
    """A run in the folder `run`, and the newest file that it left to W&B, if any."""
    result = run_here("train", *PPO, "logger=wandb", f"paths.output_dir={run}", *arguments)
    assert result.code == code, result.err
    return (runs(Path(run)) or [None])[-1]


def rows_with(run: WandbFile, name: str) -> list[dict]:
    return [row for row in run.history if any(key.split("/_type")[0] == name for key in row)]


def table_of(row: dict, name: str) -> list[list[float]]:
    return json.loads(next(Path("run/wandb").glob(f"*run-*/files/{row[f'{name}/path']}")).read_text())["data"]


# ---- Weights & Biases -----------------------------------------------------------------------------------------------


def test_the_histograms_and_the_scatter_plot_hold_every_completion_and_token(folder):
    run = start("callbacks.samples.max_samples=4", "reward=length")
    samples = [row for row in read_samples(Path("run")) if row["split"] == "train"]
    for iteration in (1, 2):
        mine = [row for row in samples if row["iteration"] == iteration]
        (row,) = [row for row in rows_with(run, "distribution/scores") if row["iteration"] == iteration]
        tokens = sum(sample["length"] for sample in mine)
        counts = {name: sum(row[f"distribution/{name}/values"]) for name in ("scores", "kl", "advantages", "ratios")}
        assert counts == {"scores": 4, "kl": 4, "advantages": tokens, "ratios": tokens}
        assert row["distribution/ratios/bins"][0] < 1 < row["distribution/ratios/bins"][-1]
        assert table_of(row, "kl_reward_table") == [[sample["kl"], sample["score"]] for sample in mine]
    panel = run.config["_wandb/visualize/kl_reward"]["panel_config"]
    assert (panel["panelDefId"], panel["fieldSettings"]) == ("wandb/scatter/v0", {"x": "kl", "y": "score"})


def test_distributions_and_samples_come_as_often_as_they_are_asked_for(folder):
    run = start(
        "trainer.max_epochs=4", "callbacks.distributions.every_n_iterations=2",
        "callbacks.samples.every_n_iterations=4", "trainer.limit_val_batches=0",
    )  # fmt: skip
    assert [row["iteration"] for row in rows_with(run, "distribution/scores")] == [2, 4]
    assert [row["iteration"] for row in rows_with(run, "samples")] == [4]


@pytest.mark.parametrize("axis", ["iteration", "episode", "tokens"])
def test_everything_can_be_plotted_against_every_axis(folder, axis):
    run = start(f"logger.wandb.step_metric={axis}")
    steps = {metric.name or metric.glob_name: metric.step_metric for metric in run.metrics}
    assert steps == {"iteration": "", "episode": "", "tokens": "", "*": axis}
    rows = [row for row in run.history if "objective/scores" in row]
    assert [(row["iteration"], row["episode"]) for row in rows] == [(1, 4), (2, 8)]
    assert all(row["tokens"] > 0 for row in rows)


def test_a_run_says_what_it_is(folder):
    run = start("tags=[a,b]", "task_name=mine")
    record = run.run
    assert (record.display_name, record.job_type, record.run_group, list(record.tags)) == (
        "mine run", "mine", "", ["a", "b"],
    )  # fmt: skip
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert {key: run.config[key] for key in config} == config
    assert "${" not in str(config)
    assert (run.exit_code, run.alerts, run.summary["status"]) == (0, {}, "completed")


def test_a_job_of_a_wandb_sweep_is_in_its_group(folder, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    assert start().run.run_group == "s1"


@pytest.mark.parametrize("log_model", [True, False])
def test_artifacts_lead_from_ratings_over_the_reward_model_to_the_policy(folder, tiny_models, monkeypatch, log_model):
    monkeypatch.setenv("LIT_RLHF_CACHE", str(folder / "cache"))
    write_ratings(folder / "cache")
    keep = f"logger.wandb.log_model={log_model}"
    judge = run_here(
        "train", "algorithm=reward_model", f"algorithm.model_path={tiny_models['encoder']}", "data.batch_size=8",
        "algorithm.max_length=48", "data.eval_pairs=8", "trainer.precision=32-true", "logger=wandb", keep,
        "trainer.max_steps=2", "paths.output_dir=judge",
    )  # fmt: skip
    assert judge.code == 0, judge.err
    (judge,) = runs(Path("judge"))
    policy = start(keep, "reward=model", "reward.path=judge/model")
    assert [(a.type, a.name) for a in judge.inputs] == [("dataset", "HumanRatingsPairs")]
    assert json.loads(judge.inputs[0].metadata) == judge.config["data"]
    assert [(a.type, a.name) for a in judge.outputs] == [("model", f"model-{judge.run.run_id}")]
    prompts, used = policy.inputs
    assert (prompts.type, prompts.name) == ("dataset", "ListPrompts")
    # The same version, so that W&B joins the two runs.
    assert (used.type, used.name, used.digest) == ("model", judge.outputs[0].name, judge.outputs[0].digest)
    (made,) = policy.outputs
    files = {path.name: path.stat().st_size for path in Path("run/model").iterdir()}
    assert {entry.path: entry.size for entry in made.manifest.contents} == files
    assert all(bool(entry.local_path) == log_model == (not entry.ref) for entry in made.manifest.contents)


def test_a_model_that_was_trained_anew_is_another_version_and_a_stale_note_is_no_lineage(folder):
    def used() -> list[str]:
        return [artifact.digest for artifact in input_artifacts({"policy": {"path": "run/model"}})]

    first = start().outputs[0].digest
    assert used() == [first]
    shutil.rmtree("run")
    second = start("optimizer.lr=0.02").outputs[0].digest
    assert first != second
    assert used() == [second]
    Path("run/model/config.json").write_text("{}")  # as another run without W&B would
    assert used() == []


@pytest.mark.parametrize("path", ["mine", "mine/*.jsonl", "mine/0.jsonl"])
def test_data_that_was_written_anew_is_another_version(folder, path):
    config, digests = {"data": {"_target_": "DatasetPrompts", "path": path, "split": "mine"}}, []
    for text in ("one", "one", "two"):
        Path("mine").mkdir(exist_ok=True)
        Path("mine/0.jsonl").write_text(json.dumps({"prompt": text}))
        (used,) = input_artifacts(config)
        assert sorted(used.manifest.entries) == ["0/0.jsonl", "data.yaml"]
        digests.append(used.digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_kl_over_the_threshold_alerts_once(folder):
    run = start("optimizer.lr=0.5", "logger.wandb.alert_kl=0.001", "trainer.max_epochs=4")
    crossed = next(row for row in read_metrics(Path("run")) if row.get("objective/kl", 0) > 0.001)
    text = f"iteration {crossed['iteration']}: objective/kl is {crossed['objective/kl']:.4g} nats, over 0.001"
    assert run.alerts == {"KL blow-up": text}
    assert len([record for record in run.records if record.HasField("alert")]) == 1


def test_a_failed_run_alerts_with_its_error(folder, tmp_path, monkeypatch):
    write_module(tmp_path, "breaks", "def broken(prompts, completions, **columns):\n    return [float('nan')] * 4\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = start("reward=function", "reward.function=breaks.broken", "trainer.limit_val_batches=0", code=1)
    assert (run.exit_code, run.summary["status"]) == (1, "failed")
    assert list(run.alerts) == ["Run failed"]
    assert "nan" in run.alerts["Run failed"]
    assert not run.outputs


def test_a_resumed_offline_run_is_a_new_one_that_names_the_old(folder):
    first = start()
    second = start("ckpt_path=auto", "trainer.max_epochs=3")
    assert second.run.run_id != first.run.run_id
    assert second.config["resumed_from"] == first.run.run_id
    # Those of before are read from metrics.csv: a kill could have lost them.
    assert [row["iteration"] for row in second.history if "objective/kl" in row] == [1, 2, 3]


def test_a_resumed_online_run_is_the_same_one(folder, monkeypatch):
    first = start()
    (offline,) = Path("run/wandb").glob("offline-run-*")
    offline.rename(offline.with_name(offline.name.removeprefix("offline-")))  # as if it had been online
    init, asked = wandb.init, []

    def record(**settings):
        asked.append((settings["mode"], settings.get("id"), settings.get("resume")))
        return init(**{**settings, "mode": "offline", "resume": None})

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", record)
    monkeypatch.delenv("WANDB_MODE")
    second = start("ckpt_path=auto", "trainer.max_epochs=3")
    assert asked == [("online", first.run.run_id, "allow")]
    assert second.run.run_id == first.run.run_id
    assert "resumed_from" not in second.config
    shutil.rmtree("run/checkpoints")
    shutil.rmtree("run/model")
    start()  # a fresh run in the same folder
    assert asked[1:] == [("online", None, None)]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("step_metric", "epoch", "iteration, episode, tokens"), ("alert_kl", -1, "logger.wandb.alert_kl must be")],
)
def test_values_that_make_no_sense_are_refused(folder, key, value, message):
    result = run_here("train", *PPO, "logger=wandb", f"logger.wandb.{key}={value}")
    assert result.code == 1
    assert message in result.err
    assert "Traceback" not in result.err


# ---- other loggers --------------------------------------------------------------------------------------------------


def test_many_loggers_get_the_same_rows(folder):
    run = start("logger=many")
    table = read_metrics(Path("run"))
    shown = events()
    names = {name for row in table for name in row}
    assert names <= set(shown.Tags()["scalars"])
    for name in sorted(names):
        written = {row["iteration"]: row[name] for row in table if name in row}
        assert {event.step: event.value for event in shown.Scalars(name)} == pytest.approx(written, rel=1e-6)
        assert {row["iteration"]: row[name] for row in run.history if name in row} == written


def events(folder: str = "run/tensorboard"):
    """What TensorBoard shows of the event files, in the order they were written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(folder, size_guidance={"tensors": 0, "histograms": 0}).Reload()


def test_tensorboard_shows_every_step_of_a_resumed_run_once(folder):
    steps = ["logger=tensorboard", "callbacks.checkpoint.every_n_epochs=2", "trainer.limit_val_batches=0"]
    start(*steps, "trainer.max_epochs=3")
    shutil.rmtree("run/model")
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)["lit_rlhf"]["iteration"]
    assert saved == 2  # the row of iteration 3 is taken back
    assert [event.step for event in events().Scalars("objective/kl")] == [1, 2, 3]
    start(*steps, "ckpt_path=auto", "trainer.max_epochs=4")
    shown = events()
    table = {row["iteration"]: row["objective/kl"] for row in read_metrics(Path("run"))}
    assert [(event.step, event.value) for event in shown.Scalars("objective/kl")] == [
        (step, pytest.approx(value)) for step, value in table.items()
    ]
    assert [event.step for event in shown.Histograms("distribution/scores")] == [1, 2, 3, 4]
    shutil.rmtree("run/checkpoints")
    shutil.rmtree("run/model")
    start(*steps, "trainer.max_epochs=1")  # a fresh run in the same folder
    assert [event.step for event in events().Scalars("objective/kl")] == [1]


def test_tensorboard_gets_the_distributions_and_the_samples_as_they_were_written(folder):
    start("logger=tensorboard", "trainer.limit_val_batches=0", "callbacks.samples.max_samples=4")
    samples, shown = read_samples(Path("run")), events()
    for iteration in (1, 2):
        mine = [row for row in samples if row["iteration"] == iteration]
        tokens = sum(row["length"] for row in mine)
        counts = {
            name: event.histogram_value.num
            for name in ("scores", "kl", "advantages", "ratios")
            for event in shown.Histograms(f"distribution/{name}")
            if event.step == iteration
        }
        assert counts == {"scores": 4, "kl": 4, "advantages": tokens, "ratios": tokens}
        (text,) = [e for e in shown.Tensors("samples/text_summary") if e.step == iteration]
        header, _, *lines = text.tensor_proto.string_val[0].decode().split("\n")
        assert [cell.strip() for cell in header.strip("|").split("|")][:3] == ["split", "prompt", "completion"]
        for line, row in zip(lines, mine, strict=True):
            cells = [html.unescape(cell).strip() for cell in line.strip("|").split("|")]
            assert cells[:3] == ["train", row["prompt"], " ".join(row["completion"].split())]
            assert float(cells[3]) == pytest.approx(row["score"], rel=1e-3)


def test_without_mlflow_its_absence_is_named(folder, monkeypatch):
    class Missing:
        def __bool__(self):
            return False

        def __str__(self):
            return "Requirement 'mlflow>=1.0.0' not met. HINT: Try running `pip install -U 'mlflow>=1.0.0'`"

    monkeypatch.setattr(lightning_mlflow, "_MLFLOW_AVAILABLE", Missing())
    result = run_here("train", *PPO, "logger=mlflow", "paths.output_dir=run")
    assert result.code == 1
    assert "config key 'logger.mlflow': Requirement 'mlflow>=1.0.0' not met" in result.err
    assert "Traceback" not in result.err


def test_mlflow_gets_the_rows(folder):
    mlflow = pytest.importorskip("mlflow")
    start("logger=mlflow")
    client = mlflow.MlflowClient("sqlite:///run/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'lit_rlhf'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("ppo", "FINISHED")
    written = {row["iteration"]: row["objective/kl"] for row in read_metrics(Path("run")) if "objective/kl" in row}
    history = client.get_metric_history(run.info.run_id, "objective/kl")
    assert {point.step: point.value for point in history} == pytest.approx(written)
