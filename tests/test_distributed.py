"""Two processes on this machine, by DDP and by FSDP2, do what one process does."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import processes
import pytest
import torch
from classifiers import save_classifier
from command_line import TINY, environment, run_here
from filelock import FileLock
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DeepSpeedStrategy
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lit_rlhf.algorithms import TRPO
from lit_rlhf.callbacks.checkpoints import written
from lit_rlhf.checkpoint_io import remove
from lit_rlhf.distributed import FSDP2Strategy, processes_to_start, run_in_processes, share, split_batch
from lit_rlhf.errors import UserError
from lit_rlhf.pipeline import compose_stage
from lit_rlhf.run_folder import read_metrics, read_samples, read_summary
from lit_rlhf.train import find_checkpoint, train

KINDS = ("ddp", "fsdp2")
COUNTS = ("policy/clipfrac", "value/clipfrac")  # a ratio on the edge falls to either side by rounding


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs of two processes, and the same ones of one process; made by the first worker of pytest that comes."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "two_processes"
    with FileLock(shared / "two_processes.lock"):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            save_classifier(folder / "classifier")
            run_in_processes(processes.run_all, 2, folder, folder / "classifier")
            for name in processes.RUNS:
                processes.run(folder, name, model=folder / "classifier")
            (folder / "done").touch()
    return folder


def result(folder, name, rank=0):
    return torch.load(folder / f"{name}.{rank}.pt", weights_only=True)


def texts(run):
    return [(row["iteration"], row["split"], row["prompt"], row["completion"]) for row in run["samples"]]


@pytest.mark.parametrize(
    ("kind", "name"), [("ddp", name) for name in processes.RUNS] + [("fsdp2", name) for name in processes.SHARDED]
)
class TestTwoProcesses:
    def test_agree_on_weights_rows_and_samples_to_the_bit(self, folder, kind, name):
        first, second = (result(folder, f"{kind}_{name}", rank) for rank in (0, 1))
        assert first["weights"].keys() == second["weights"].keys()
        assert all(torch.equal(x, second["weights"][n]) for n, x in first["weights"].items())
        assert first["rows"] == second["rows"]
        assert first["samples"] == second["samples"]
        assert repr(first["controllers"]) == repr(second["controllers"])  # KL, clip range, moments of scores

    def test_compute_the_gradient_of_one_process(self, folder, kind, name):
        one, two = result(folder, name)["gradient"], result(folder, f"{kind}_{name}")["gradient"]
        assert max(float(x.abs().max()) for x in one.values()) > 1e-3
        assert_close(two, one, atol=1e-5, rtol=0)

    def test_take_the_same_steps_as_one_process_with_the_same_global_batch(self, folder, kind, name):
        one, two = result(folder, name), result(folder, f"{kind}_{name}")
        assert_close(two["weights"], one["weights"], atol=2e-6, rtol=1e-5)

    def test_complete_the_same_prompts_in_the_same_way_and_log_the_same(self, folder, kind, name):
        one, two = result(folder, name), result(folder, f"{kind}_{name}")
        assert texts(one) == texts(two)
        assert len(one["rows"]) == len(two["rows"])
        for row, other in zip(one["rows"], two["rows"], strict=True):
            assert row.keys() == other.keys()
            for metric in row.keys() - {*COUNTS}:
                assert row[metric] == pytest.approx(other[metric], rel=2e-3, abs=1e-5), metric
        for curve in ("objective/scores", "rollout/response_length"):
            values = [[row[curve] for row in run["rows"] if curve in row] for run in (one, two)]
            assert values[0] == pytest.approx(values[1], rel=1e-6)

    def test_export_one_whole_model(self, folder, kind, name):
        export, expected = folder / f"{kind}_{name}_model", folder / f"{name}_model"
        assert {x.name for x in export.iterdir()} == {x.name for x in expected.iterdir()}
        if name != "reward_model":
            model, one = (AutoModelForCausalLM.from_pretrained(path) for path in (export, expected))
            assert_close(model.state_dict(), one.state_dict(), atol=2e-6, rtol=1e-5)


def test_completions_of_one_process_may_take_more_steps_than_those_of_another(folder):
    rows = result(folder, "grpo")["samples"]
    quarters = [max(row["length"] for row in rows[start : start + 4]) for start in range(0, len(rows), 4)]
    assert len(quarters) == 4  # two iterations of eight completions, four in each of two processes
    assert quarters[0] != quarters[1]
    assert quarters[2] != quarters[3]


def test_a_run_with_a_target_kl_stops_its_updates_in_all_processes_at_once(folder):
    assert [row["policy/early_stopped"] for row in result(folder, "ddp_stopped", 1)["rows"]] == [1.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "resumed"), [("full", "resumed"), ("lora", "lora_resumed")])
def test_a_resume_in_two_processes_is_exact(folder, kind, name, resumed):
    for rank in (0, 1):
        whole, cut = (result(folder, f"{kind}_{run}", rank) for run in (name, resumed))
        assert all(torch.equal(x, cut["weights"][n]) for n, x in whole["weights"].items())
        assert cut["rows"][-1] == whole["rows"][-1]
        assert texts(cut) == texts(whole)[-len(cut["samples"]) :]


@pytest.mark.parametrize("name", ["mistake", "stop"])
def test_a_reward_that_fails_in_one_process_during_a_validation_ends_both(folder, name):
    own, other = (result(folder, f"faulty_{name}", number)["said"] for number in (1, 0))
    assert ("validation: gone" if name == "stop" else "careless") in own
    assert ("validation: gone" if name == "stop" else "process 1: KeyError: 'careless'") in other
    for said in (own, other):
        assert f"The checkpoint {folder}/{name}/step=00000004-epoch=0000.ckpt is of this moment" in said


def test_or_both_leave_the_batch_out(folder):
    for name, metric, counts in (
        ("skip_batch", "val/rollout/skipped_batches", [2, 2]), ("nan", "rollout/skipped_batches", [0, 1])
    ):  # fmt: skip
        first, second = (result(folder, f"faulty_{name}", number) for number in (0, 1))
        assert (first["said"], second["said"]) == ("", "")
        for run in (first, second):
            assert [row[metric] for row in run["rows"]] == counts
        assert [row["loss/total"] for row in first["rows"]] == [row["loss/total"] for row in second["rows"]]


def test_the_first_process_decides_where_to_go_on_and_the_others_see_it_too(folder):
    for said in (torch.load(folder / f"decided.{number}.pt", weights_only=True) for number in (0, 1)):
        assert said[:2] == ["decided by 0", "refused by 0"]
        assert re.search(r"process 1 on \S+ cannot see: a run on several nodes resumes from a disk that all", said[2])


def test_a_run_asks_it_for_its_checkpoint(tmp_path, monkeypatch):
    def decided(trainer, decide):
        if decide.func is find_checkpoint:
            raise UserError("asked for find_checkpoint")
        return decide()

    monkeypatch.setattr("lit_rlhf.train.first_decides", decided)
    with pytest.raises(UserError, match="asked for find_checkpoint"):
        train(compose_stage([*TINY, "ckpt_path=auto", f"paths.output_dir={tmp_path}"]))


@pytest.mark.parametrize(("began", "count"), [(1, 2), (2, 1)])
def test_a_run_on_fixed_data_continues_with_another_number_of_processes(tmp_path, began, count):
    """From the middle of its second epoch, between batches of lengths that differ."""
    rows = [{"prompt": "a film ", "completion": "that is " + "very " * (n % 4) + "good"} for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "train", "algorithm=sft", "policy=tiny", "policy.hidden_size=16", "policy.intermediate_size=16", "data=jsonl",
        f"data.path={tmp_path}/rows.jsonl", "data.batch_size=4", "logger=csv", "trainer.max_epochs=2",
        "algorithm.max_length=64", "callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep_last=9",
        "ckpt_path=auto", f"paths.output_dir={tmp_path}/run",
    ]  # fmt: skip
    processes_of = lambda n: [  # noqa: E731
        *(["trainer=ddp", f"trainer.devices={n}"] if n > 1 else []), "trainer.accelerator=cpu",
        "trainer.precision=32-true",
    ]  # fmt: skip
    assert run_here(*command, *processes_of(began)).code == 0
    whole, run = tmp_path / "whole", tmp_path / "run"
    shutil.copytree(run, whole, symlinks=True)
    for later in written(run / "checkpoints")[:2]:
        remove(later)
    shutil.rmtree(run / "model")  # else what the first run has left would do
    result = run_here(*command, *processes_of(count))
    assert result.code == 0, result.err
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (whole, run))
    assert_close(two, one, atol=2e-6, rtol=1e-5)
    assert [row["iteration"] for row in read_metrics(run)] == [row["iteration"] for row in read_metrics(whole)]
    assert read_metrics(run)[-1]["loss/total"] == pytest.approx(read_metrics(whole)[-1]["loss/total"], rel=1e-4)


@pytest.mark.parametrize(("kind", "began", "count"), [("ddp", 1, 2), ("ddp", 2, 1), ("fsdp2", 1, 2), ("fsdp2", 2, 1)])
def test_a_run_continues_with_another_number_of_processes(folder, kind, began, count):
    """In the middle of the last iteration: with the rest of its buffer, and a sharded checkpoint dealt out anew."""
    if began == 1:
        run_in_processes(processes.run_part, 1, folder, kind, f"{kind}_alone")
    checkpoint = folder / f"{kind}_{'alone' if began == 1 else 'full'}_checkpoints" / "step=9.ckpt"
    run_in_processes(processes.run_part, count, folder, kind, f"{kind}_on_{count}", checkpoint)
    continued, one = result(folder, f"{kind}_on_{count}", count - 1), result(folder, "full")
    assert_close(continued["weights"], one["weights"], atol=2e-6, rtol=1e-5)
    assert texts(continued) == texts(one)[-len(continued["samples"]) :]
    (row,) = continued["rows"]
    for metric in row.keys() - {*COUNTS}:
        assert row[metric] == pytest.approx(one["rows"][-1][metric], rel=2e-3, abs=1e-5), metric


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_starts_the_processes_and_one_of_them_writes_the_run_folder(tmp_path, kind):
    shared = [*TINY, "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=2", "optimized_metric=objective/kl"]
    two = train(compose_stage([*shared, f"trainer={kind}", "trainer.devices=2", f"paths.output_dir={tmp_path}/two"]))
    one = train(compose_stage([*shared, f"paths.output_dir={tmp_path}/one"]))
    assert two == pytest.approx(one, rel=1e-3)
    assert read_summary(tmp_path / "two")["status"] == "completed"
    assert [row["iteration"] for row in read_metrics(tmp_path / "two")] == [0, 1, 2]
    completions = [[row["completion"] for row in read_samples(tmp_path / run)] for run in ("one", "two")]
    assert completions[0] == completions[1]
    assert (tmp_path / "two" / "report.html").exists()
    assert (tmp_path / "two" / "checkpoints" / "last.ckpt").is_dir() == (kind == "fsdp2")
    result = run_here("eval", f"run={tmp_path}/two", "checkpoint=last", f"paths.output_dir={tmp_path}/eval")
    assert result.code == 0, result.err
    evaluation = json.loads((tmp_path / "eval" / "evaluation.json").read_text())
    kl = evaluation["policies"]["policy"]["1"]["objective/kl"]["value"]
    assert kl == pytest.approx(read_summary(tmp_path / "two")["val/objective/kl"], rel=1e-3)
    other = ["trainer=cpu" if kind == "fsdp2" else "trainer=fsdp2", "trainer.devices=1", "trainer.accelerator=cpu"]
    again = [*shared, *other, f"paths.output_dir={tmp_path}/two", "ckpt_path=auto"]
    with pytest.raises(UserError, match=r"ckpt_path=.*step=0.* is a .* checkpoint, and this run.s trainer"):
        train(compose_stage(again))


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_of_its_own_takes_the_steps_of_a_run_without_any_and_leaves_no_trace_of_its_rank(
    tmp_path, kind, monkeypatch
):
    """The rank would tell the next run here, of a multirun or pipeline, that it had been started as one of several."""
    names = ("LOCAL_RANK", "RANK", "WORLD_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    shared = [*TINY, "critic=separate", "reward._target_=processes.letters", "trainer.max_epochs=2"]
    for name, trainer in (("none", "cpu"), ("one", kind)):
        own = [f"trainer={trainer}", "trainer.devices=1", f"paths.output_dir={tmp_path}/{name}"]
        train(compose_stage([*shared, *own]))
    none, one = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("none", "one"))
    assert none.keys() == one.keys()
    assert all(torch.equal(x, one[name]) for name, x in none.items())
    assert not any(name in os.environ for name in names)


def test_every_job_of_a_multirun_starts_processes_of_its_own(tmp_path):
    config = [*TINY, "trainer=ddp", "trainer.devices=2", "trainer.limit_val_batches=0"]
    result = run_here("train", "-m", *config, "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert result.code == 0, result.err
    completions = [[row["completion"] for row in read_samples(tmp_path / job)] for job in ("0", "1")]
    assert all(completions)
    assert completions[0] != completions[1]
    assert [row["status"] for row in csv.DictReader((tmp_path / "sweep.csv").open())] == ["completed"] * 2


def test_a_mistake_in_one_process_ends_the_run_with_its_message(tmp_path):
    config = ["trainer=ddp", "trainer.devices=2", "reward._target_=processes.broken_in_the_second"]
    config += ["trainer.limit_val_batches=0"]  # which has no checkpoint to write
    with pytest.raises(UserError, match=r"^iteration 1: planted in the second process\. The checkpoint .* is of this"):
        train(compose_stage([*TINY, *config, f"paths.output_dir={tmp_path}"]))
    assert read_summary(tmp_path)["status"] == "failed"


KILLED = {
    "rollout": ["reward._target_=processes.killed_in_the_second"],
    "update": ["+callbacks.kill._target_=processes.KilledInUpdate", "trainer.limit_val_batches=0"],
}


@pytest.mark.parametrize(("kind", "where"), [("ddp", "rollout"), ("fsdp2", "update")])
def test_a_process_that_is_killed_ends_the_others_within_a_minute(tmp_path, kind, where, monkeypatch):
    monkeypatch.setenv("KILLED_AT", str(tmp_path / "killed_at"))
    config = [f"trainer={kind}", "trainer.devices=2", *KILLED[where]]
    with pytest.raises(UserError, match=r"process 1 of 2 ended early: .*SIGKILL"):
        train(compose_stage([*TINY, *config, f"paths.output_dir={tmp_path / 'run'}"]))
    assert time.time() - float((tmp_path / "killed_at").read_text()) < 60
    assert read_summary(tmp_path / "run")["status"] == "failed"


def test_two_nodes_run_the_same_command_under_torchrun(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1",
    ]  # fmt: skip
    config = [*TINY, "trainer=ddp", "trainer.devices=1", "trainer.num_nodes=2"]
    nodes = [
        subprocess.Popen(
            [*launcher, "-m", "lit_rlhf.train", *config], cwd=tmp_path, env=environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert len("".join(said).split("iteration 1/1")) == 2  # one of the two speaks
    (summary,) = tmp_path.rglob("summary.json")
    assert read_summary(summary.parent)["status"] == "completed"
    assert (summary.parent / "model" / "model.safetensors").exists()


def test_what_cannot_be_sharded_says_so():
    with pytest.raises(UserError, match="TRPO cannot be sharded; trainer=ddp"):
        processes.group(TRPO).shard(mesh=None)


def test_an_optimizer_that_cannot_step_shards_is_refused():
    """As its module says; without the package there is no real one."""
    eight_bits = type("AdamW8bit", (torch.optim.AdamW,), {"__module__": "bitsandbytes.optim.adamw"})
    module = processes.ppo(optimizer=eight_bits)
    module._trainer = SimpleNamespace(strategy=FSDP2Strategy())
    with pytest.raises(UserError, match=r"bitsandbytes cannot step the sharded weights of trainer=fsdp2"):
        module.configure_optimizers()


def test_deepspeed_is_refused_by_name(trainer):
    run = trainer(max_epochs=1)
    run.strategy.__class__ = type("Strategy", (DeepSpeedStrategy,), {})  # making one needs the package
    module = processes.ppo()
    module._trainer = run
    with pytest.raises(UserError, match=r"strategy is DeepSpeed, which is not supported: it loads .* trainer=fsdp2"):
        module.setup("fit")


class TestShares:
    def test_every_process_has_as_many_rows_and_together_they_have_all_in_order(self):
        for count in range(1, 9):
            for world in (1, 2, 3, 4):
                shares = [share(count, rank, world) for rank in range(world)]
                assert len({len(rows) for rows in shares}) == 1
                assert [row for rows in shares for row in rows][:count] == list(range(count))

    def test_a_batch_is_dealt_out_row_by_row(self):
        batch = {"text": ["a", "b", "c"], "score": torch.tensor([1.0, 2.0, 3.0])}
        first, second = split_batch(batch, 2)
        assert (first["text"], second["text"]) == (["a", "c"], ["b"])
        assert torch.as_tensor(first["score"]).tolist() == [1.0, 3.0]

    def test_a_process_without_a_row_gets_none(self):
        assert split_batch({"text": ["a"]}, 3) == [{"text": ["a"]}, None, None]

    @pytest.mark.parametrize("batch", [["a", "b"], {"text": "ab"}, {"text": ["a", "b"], "score": [1]}, {}, "ab"])
    def test_what_is_no_table_is_left_to_its_reader(self, batch):
        assert split_batch(batch, 2) == [batch, None]


class TestStarting:
    def test_a_run_on_one_device_starts_no_process(self, trainer):
        assert processes_to_start(trainer(devices=1)) == 1
        assert processes_to_start(trainer(devices="auto")) == 1

    def test_a_run_on_several_devices_starts_one_process_for_each(self, trainer):
        assert processes_to_start(trainer(devices=3, strategy="ddp")) == 3

    def test_under_a_launcher_the_processes_are_there(self, trainer, monkeypatch):
        names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": 2}
        for name, value in {**names, "TORCHELASTIC_RUN_ID": "x"}.items():
            monkeypatch.setenv(name, str(value))
        assert TorchElasticEnvironment.detect()
        assert processes_to_start(trainer(devices=2, strategy="ddp")) == 1

    def test_several_nodes_need_a_launcher(self, trainer):
        with pytest.raises(UserError, match=r"trainer.num_nodes=2: start the same command on every node with torchrun"):
            processes_to_start(trainer(devices=2, num_nodes=2, strategy="ddp"))

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            (["trainer.devices=3"], "algorithm.minibatch_size / trainer.accumulate_grad_batches=2 is not divisible by"),
            (["trainer.devices=0"], "config key 'trainer'.*devices=0"),
            (["trainer.devices=2", "trainer.strategy=nonsense"], "config key 'trainer'.*invalid strategy name"),
        ],
    )
    def test_wrong_sizes_are_refused(self, tmp_path, sizes, message):
        with pytest.raises(UserError, match=message):
            train(compose_stage([*TINY, "trainer=ddp", *sizes, f"paths.output_dir={tmp_path}/run"]))
        assert not (tmp_path / "run").exists() or read_summary(tmp_path / "run")["status"] == "failed"
