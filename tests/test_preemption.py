"""A signal asks a run to stop: it does, with a checkpoint, and the same command ends where it would have ended."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import TINY, environment, run_here
from preempting import strike_while_starting
from wandb_file import runs

from lit_rlhf.distributed import run_in_processes
from lit_rlhf.preemption import PREEMPTED, Preempted, listening
from lit_rlhf.run_lock import LOCK

#: Three iterations of four steps.
RUN = [*TINY, "algorithm.ppo_epochs=2", "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2", "ckpt_path=auto"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_here("train", *RUN, f"paths.output_dir={folder}").code == 0
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs in the background
    yield tmp_path
    signal.signal(signal.SIGINT, before)


def start(*more, run="cut", strike=None):
    given = [f"+callbacks.strike.{key}={value}" for key, value in (strike or {}).items()]
    target = ["+callbacks.strike._target_=preempting.Strike"] if strike else []
    return run_here("train", *RUN, f"paths.output_dir={run}", *target, *given, *more)


def rows(run):
    with open(f"{run}/metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/") and "per_second" not in k}
                for row in csv.DictReader(file)]  # fmt: skip


def assert_same(one, two="cut"):
    assert rows(one) == rows(two)
    assert Path(one, "samples.jsonl").read_text() == Path(two, "samples.jsonl").read_text()
    weights = [Path(run, "model", "model.safetensors").read_bytes() for run in (one, two)]
    assert weights[0] == weights[1]


def summary(run="cut"):
    return json.loads(Path(run, "summary.json").read_text())


def last(run="cut"):
    return torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("name", "step", "iterations", "position"), [("SIGTERM", 5, 1, 2), ("SIGINT", 3, 1, 0), ("SIGUSR1", 11, 2, 4)]
)
def test_a_signal_ends_the_run_after_its_step_and_the_same_command_continues(whole, name, step, iterations, position):
    """In the middle of an iteration; in the last step of one, which is then finished, unless it is validated."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    result = start(strike={"name": name, "step": step})
    assert result.code == PREEMPTED == 75, result.err
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert (summary()["status"], summary()["iteration"]) == ("preempted", iterations)
    assert (last()["global_step"], last()["lit_rlhf"]["loader"]["position"]) == (step + 1, position)
    assert not Path("cut/model").exists()
    assert start().code == 0
    assert summary()["status"] == "completed"
    assert_same(whole)


@pytest.mark.parametrize(
    ("phase", "step", "saved"),
    [("anchor", 8, 8), ("rollout", 0, None), ("anchor", "null", None)],
)
def test_in_a_rollout_the_run_ends_at_once_for_it_will_be_drawn_again(whole, phase, step, saved):
    """The checkpoint of the iteration before is that of this one's start; before the first there is nothing to keep."""
    assert start(strike={"phase": phase, "step": step}).code == PREEMPTED
    assert summary()["status"] == "preempted"
    assert Path("cut/checkpoints").exists() == (saved is not None)
    if saved:
        assert last()["global_step"] == saved
    assert start().code == 0
    assert_same(whole)


def test_after_the_last_step_of_an_epoch_the_rows_that_lightning_logs_of_it_are_there_too():
    mine = ["+callbacks.mean._target_=preempting.Mean", "trainer.limit_val_batches=0"]
    assert start(*mine, strike={"step": 7}).code == PREEMPTED
    assert last()["global_step"] == 8
    assert start(*mine).code == 0
    # Counted after the steps 1 to 4, 5 to 8 and 9 to 12; the row's step is the last one's, before it.
    assert [(row["step"], row["mine/step"]) for row in rows("cut") if row["mine/step"]] == [
        ("3", "2.5"), ("7", "6.5"), ("11", "10.5")
    ]  # fmt: skip


BATCHES = ["data.prompts=[A film that,The plot,A book,The end]", "data.batch_size=1"]


@pytest.fixture(scope="module")
def whole_in_batches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    assert start(*BATCHES, run=folder).code == 0
    return folder


@pytest.mark.parametrize("step", [8, None])
def test_a_validation_ends_before_its_next_batch_and_is_done_again(whole_in_batches, step):
    """The one after the second iteration, and the one before training."""
    result = start(*BATCHES, strike={"phase": "validation", "step": step or "null"})
    assert result.code == PREEMPTED
    assert summary()["status"] == "preempted"
    assert Path("cut/checkpoints").exists() == (step is not None)
    assert step is None or [row["iteration"] for row in rows("cut")] == ["0", "1"]
    assert start(*BATCHES).code == 0
    assert_same(whole_in_batches)


def test_without_a_checkpoint_of_its_start_a_rollout_is_finished_first(whole):
    rare = "callbacks.checkpoint.every_n_epochs=3"
    assert start(rare, strike={"phase": "rollout", "step": 4}).code == PREEMPTED
    assert last()["global_step"] == 5
    assert start(rare).code == 0
    assert_same(whole)


def test_a_signal_in_the_last_moments_changes_nothing_for_a_single_run():
    assert start(strike={"phase": "export", "step": -1}).code == 0
    assert summary()["status"] == "completed"


def test_without_checkpoints_a_signal_does_what_it_always_does():
    assert start("callbacks=progress", strike={"name": "SIGINT", "step": 5}).code == 1
    assert summary()["status"] == "interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_wandb_is_told_that_the_run_is_preempting():
    assert start("logger=csv_wandb", strike={"step": 5}).code == PREEMPTED
    assert start("logger=csv_wandb").code == 0
    first, second = runs(Path("cut"))
    assert [any(record.HasField("preempting") for record in run.records) for run in (first, second)] == [True, False]
    assert (first.exit_code, first.summary["status"], first.alerts) == (1, "preempted", {})
    assert (second.exit_code, second.summary["status"]) == (0, "completed")
    assert [row["iteration"] for row in second.history if "objective/kl" in row] == [1, 2, 3]  # offline: all so far


def test_a_multirun_stops_with_its_job():
    strike = ["+callbacks.strike._target_=preempting.Strike", "+callbacks.strike.step=5"]
    result = run_here("train", "-m", *RUN, *strike, "seed=0,1", "hydra.sweep.dir=sweep")
    assert result.code == PREEMPTED
    assert Path("sweep/0/summary.json").exists()
    assert not Path("sweep/1").exists()


def test_a_job_that_was_complete_when_its_multirun_was_stopped_is_noted_so():
    strike = ["+callbacks.strike._target_=preempting.Strike", "+callbacks.strike.phase=export"]
    metric = ["optimized_metric=objective/scores"]
    assert run_here("train", "-m", *RUN, *strike, *metric, "seed=0,1", "hydra.sweep.dir=sweep").code == PREEMPTED
    with open("sweep/sweep.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["status"], row["optimized_value"]) == ("completed", str(summary("sweep/0")["objective/scores"]))


def test_of_a_joblib_multirun_all_jobs_stop_with_checkpoints_and_no_further_one_begins(whole):
    """One of the workers strikes the command alone, as ``kill`` does."""
    sweep = ["train", "-m", *RUN, "seed=0,1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    strike = ["+callbacks.strike._target_=preempting.Strike", "+callbacks.strike.step=5"]
    result = run_here(*sweep, *strike, f"+callbacks.strike.pid={os.getpid()}", "hydra.sweep.dir=sweep")
    assert result.code == PREEMPTED, result.err
    begun = sorted(path.parent.name for path in Path("sweep").glob("*/summary.json"))
    assert begun in (["0"], ["1"], ["0", "1"])  # the other worker may still have been starting
    assert [summary(f"sweep/{job}")["status"] for job in begun] == ["preempted"] * len(begun)
    assert 6 in [last(path.parents[1])["global_step"] for path in Path("sweep").glob("*/checkpoints/last.ckpt")]
    with open("sweep/sweep.csv", newline="") as file:
        assert {row["status"] for row in csv.DictReader(file)} == {"interrupted"}
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run_here(*sweep, "hydra.sweep.dir=sweep").code == 0
    assert_same(whole, "sweep/0")
    assert [summary(f"sweep/{job}")["status"] for job in "012"] == ["completed"] * 3


def test_a_worker_without_a_job_is_not_ended_by_the_signal_and_a_job_that_is_complete_then_is_noted_so():
    """joblib starts as many workers as jobs may run at once; where one is ended, it ends those that work."""
    strike = ["+callbacks.strike._target_=preempting.Strike", f"+callbacks.strike.pid={os.getpid()}"]
    sweep = ["train", "-m", *RUN, *strike, "seed=0", "hydra/launcher=joblib", "hydra.launcher.n_jobs=3"]
    sweep += ["optimized_metric=objective/kl", "hydra.sweep.dir=sweep"]
    result = run_here(*sweep, "+callbacks.strike.step=5")
    assert result.code == PREEMPTED, result.err
    assert summary("sweep/0")["status"] == "preempted"
    assert last("sweep/0")["global_step"] >= 6
    assert noted() == [("interrupted", "")]
    assert run_here(*sweep, "+callbacks.strike.phase=export").code == PREEMPTED
    assert summary("sweep/0")["status"] == "completed"
    assert noted() == [("completed", str(summary("sweep/0")["objective/kl"]))]


def noted():
    with open("sweep/sweep.csv", newline="") as file:
        return [(row["status"], row["optimized_value"]) for row in csv.DictReader(file)]


PIPELINE = """
# @package _global_
stages:
  one: [{stage}]
  two: [{stage}]
"""


def write_pipeline():
    strike = ["+callbacks.strike._target_=preempting.Strike", "+callbacks.strike.step=null"]
    stage = ", ".join(map(json.dumps, [*RUN[:-1], *strike, "+callbacks.strike.phase=null"]))
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/signals.yaml").write_text(PIPELINE.format(stage=stage))


def test_a_signal_in_the_last_moments_of_a_pipeline_ends_its_multirun():
    write_pipeline()
    sweep = ["pipeline", "-m", "--config-dir=conf", "experiment=signals", "seed=0,1", "hydra.sweep.dir=sweep"]
    assert run_here(*sweep, "two.callbacks.strike.phase=export").code == PREEMPTED
    assert summary("sweep/0/two")["status"] == "completed"
    assert json.loads(Path("sweep/0/job.json").read_text())["status"] == "completed"
    assert not Path("sweep/1").exists()


def test_a_pipeline_stops_between_its_stages_too_and_the_same_command_ends_it(whole):
    write_pipeline()

    def pipeline(*more):
        return run_here("pipeline", "--config-dir=conf", "experiment=signals", "paths.output_dir=cut", *more)

    assert pipeline("one.callbacks.strike.phase=export").code == PREEMPTED
    assert summary("cut/one")["status"] == "completed"
    assert not Path("cut/two").exists()
    assert pipeline("two.callbacks.strike.step=5").code == PREEMPTED
    assert summary("cut/two")["status"] == "preempted"
    assert pipeline().code == 0
    for stage in ("one", "two"):
        assert_same(whole, f"cut/{stage}")


@pytest.mark.parametrize("to", ["one of them, in a rollout", "their parent, in an update"])
def test_of_several_processes_all_stop_together_whoever_got_the_signal(to):
    """After the rollout, or after the same step, which may be a later one: the parent is another process."""
    two = ["trainer=ddp", "trainer.devices=2", "trainer.limit_val_batches=0"]
    strike = {"phase": "rollout", "step": 4} if "rollout" in to else {"step": 5, "pid": os.getpid()}
    result = start(*two, strike=strike)
    assert result.code == PREEMPTED, result.err
    assert summary()["status"] == "preempted"
    assert last()["global_step"] in ([4] if "rollout" in to else range(6, 12))
    assert start(*two).code == start(*two, run="two").code == 0
    assert_same("two")


def test_processes_that_are_still_starting_stop_with_the_same_code():
    with listening(), pytest.raises(Preempted):
        run_in_processes(strike_while_starting, 2, os.getpid())


SECOND = """
import signal, sys, time
from lit_rlhf.preemption import asked_to_stop, listening
number = getattr(signal, sys.argv[1])
with listening():
    assert not asked_to_stop()
    with listening():
        signal.raise_signal(number)
    assert asked_to_stop()
    signal.raise_signal(number)  # the same one again, from a parent
    print("alive", flush=True)
    time.sleep(1.1)
    signal.raise_signal(number)
    print("still alive", flush=True)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_second_signal_ends_the_process_at_once(name):
    result = subprocess.run([sys.executable, "-c", SECOND, name], env=environment(), capture_output=True, text=True)
    assert result.returncode == -getattr(signal, name)
    assert result.stdout == "alive\n"
    assert f"{name}: stopping after this step" in result.stderr


def test_an_ignored_signal_stays_ignored():
    script = SECOND.replace("with listening()", "signal.signal(number, signal.SIG_IGN)\nwith listening()", 1)
    script = script.replace("assert asked", "assert not asked")
    result = subprocess.run([sys.executable, "-c", script, "SIGINT"], env=environment(), capture_output=True, text=True)
    assert result.stdout == "alive\nstill alive\n", result.stderr


def test_the_processes_of_a_run_stop_with_a_checkpoint_when_what_started_them_is_killed():
    """Also where a shell, of a command in its background, has them ignore SIGINT."""
    arguments = ["trainer=ddp", "trainer.devices=2", "trainer.precision=32-true", "trainer.max_epochs=100000"]
    command = [sys.executable, "-m", "lit_rlhf", "train", *RUN, "trainer.accelerator=cpu", *arguments]
    run = subprocess.Popen(
        [*command, "paths.output_dir=cut"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    while not Path("cut/checkpoints/last.ckpt").exists():
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.1)
    run.kill()
    told, _ = run.communicate(timeout=60)  # when all of them have closed it
    assert b"SIGTERM: stopping after this step" in told
    assert summary()["status"] == "preempted"
    assert not Path("cut", LOCK).exists()


# ---- a run whose folder another process still trains in ------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from lit_rlhf.run_lock import alone_in
with alone_in(Path("cut")):
    print("held", flush=True)
    time.sleep(float(sys.argv[1]))
"""


def hold(seconds):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(seconds)], stdout=subprocess.PIPE, env=environment())
    assert holder.stdout.readline() == b"held\n"
    return holder


def test_a_run_waits_until_no_other_process_trains_in_its_folder(whole):
    with hold(4) as holder:
        result = start()
        assert holder.poll() == 0
    assert result.code == 0, result.err
    assert f"process {holder.pid} on " in result.out + result.err
    assert_same(whole)
    assert not Path("cut", LOCK).exists()


def test_a_run_is_refused_while_another_process_goes_on_training_in_its_folder(monkeypatch):
    monkeypatch.setattr("lit_rlhf.run_lock.PATIENCE", 0.5)
    with hold(600) as holder:
        result = start()
        assert [path.name for path in Path("cut").iterdir()] == [LOCK]
        holder.kill()
    assert result.code == 1
    assert f"process {holder.pid} on " in result.err
    assert "trains there. Let it end" in result.err
    assert start().code == 0  # the system has given back what was killed


def test_a_signal_ends_the_wait_for_another_process():
    with hold(600) as holder:
        command = [sys.executable, "-m", "lit_rlhf", "train", *RUN, "paths.output_dir=cut"]
        waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment())
        assert any(b"waiting up to a minute" in line for line in waiting.stdout)
        waiting.send_signal(signal.SIGTERM)
        waiting.communicate(timeout=30)
        holder.kill()
    assert waiting.returncode == PREEMPTED
