"""Which checkpoints a run writes and keeps, and which one it continues from."""

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from command_line import TINY, environment, run_here
from lightning.pytorch.callbacks import ModelCheckpoint
from ppo_runs import make
from tiny import Prompts

from lit_rlhf import __version__
from lit_rlhf.algorithms import PPO
from lit_rlhf.algorithms.steps import StepGuard
from lit_rlhf.callbacks import Checkpoints, Samples
from lit_rlhf.callbacks.checkpoints import written
from lit_rlhf.checkpoint_io import damage, remove
from lit_rlhf.config import differences
from lit_rlhf.errors import UserError
from lit_rlhf.loggers import CSVLogger
from lit_rlhf.run_folder import read_metrics

#: Four iterations of two steps.
RUN = ["train", *TINY, "trainer.max_epochs=4", "trainer.limit_val_batches=0", "ckpt_path=auto", "reward=function",
       "reward.function=tiny.letters", "optimizer.lr=0.05", "optimized_metric=null"]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder):
    return [path.name for path in written(Path(folder))]


def fit(trainer, *callbacks, ckpt_path=None, **settings):
    """Two iterations of four steps."""
    loop = trainer(callbacks=list(callbacks), enable_checkpointing=True, **{"max_epochs": 2, **settings})
    loop.fit(make(), datamodule=Prompts(), ckpt_path=ckpt_path)


class Seen(Checkpoints):
    """Notes what is there after every save."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.seen = []

    def save(self, *args, **settings):
        super().save(*args, **settings)
        self.seen.append([name[5:13].lstrip("0") + "/" + name[20:24].lstrip("0") for name in names(self.folder)])


def test_checkpoints_come_within_an_epoch_and_at_its_end_and_the_newest_stay(trainer, tmp_path):
    callback = Seen(dirpath=tmp_path / "c", every_n_steps=2, keep_last=3)
    fit(trainer, callback)
    # An epoch's last step has none of its own: that at the epoch's end follows.
    assert callback.seen == [["2/"], ["4/1", "2/"], ["6/1", "4/1", "2/"], ["8/2", "6/1", "4/1"]]
    assert (tmp_path / "c" / "last.ckpt").resolve().name == "step=00000008-epoch=0002.ckpt"
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == sorted(
        ["last.ckpt", *names(tmp_path / "c"), *(f"{name}.sha256" for name in names(tmp_path / "c"))]
    )
    assert not any(map(damage, written(tmp_path / "c")))


def test_rows_samples_and_a_checkpoint_s_bytes_are_on_the_disk_before_it_has_its_name(trainer, tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(Path(new).name), replace(old, new)))
    loggers = {"logger": CSVLogger(save_dir=tmp_path / "rows"), "default_root_dir": tmp_path / "root"}
    fit(trainer, Samples(), Checkpoints(dirpath=tmp_path / "c"), **loggers)
    for name in ("step=00000004-epoch=0001.ckpt", "step=00000008-epoch=0002.ckpt"):
        before = done[: done.index(name)]
        assert {"metrics.csv", "rows", "samples.jsonl", "root"} <= set(before)
        assert {f"{name}.tmp", f"{name}.sha256.tmp"} <= set(before)  # its own bytes, before they have their name
        done = done[done.index(name) + 1 :]
        assert done.index(f"{name}.sha256") < done.index("c")  # and then the names


def test_epochs_can_be_left_out(trainer, tmp_path):
    seldom, within = Seen(dirpath=tmp_path / "a", every_n_epochs=2), Seen(
        dirpath=tmp_path / "b", every_n_epochs=None, every_n_steps=4, keep_last=1
    )
    for callback in (seldom, within):
        fit(trainer, callback)
    assert seldom.seen == [["8/2"]]
    assert within.seen == [["4/"], ["8/1"]]


def given(monkeypatch, metric, values):
    """Every iteration logs its own one of ``values``."""
    log_row = PPO.log_row

    def patched(self, metrics):
        log_row(self, {**metrics, metric: values[self.axes["iteration"] - 1]})

    monkeypatch.setattr(PPO, "log_row", patched)


@pytest.mark.parametrize(("metric", "values", "best"), [
    ("objective/scores", [1.0, 3.0, 2.0, 0.0], 2), ("reward_model/loss", [3.0, 1.0, 2.0, 4.0], 2),
    ("objective/scores", [float("nan"), 1.0, 1.0, 0.0], 2), ("objective/kl", [1.0, 3.0, 2.0, 0.0], None),
])  # fmt: skip
def test_the_best_one_stays_in_its_metric_s_direction(trainer, tmp_path, monkeypatch, metric, values, best):
    given(monkeypatch, metric, values)
    fit(trainer, Checkpoints(dirpath=tmp_path / "c", keep_last=1, best_by=metric), max_epochs=4)
    link = tmp_path / "c" / "best.ckpt"
    assert link.is_symlink() == (best is not None)
    kept = [16] if best is None else [16, 4 * best]
    assert [torch.load(path)["global_step"] for path in written(tmp_path / "c")] == kept
    if best:
        assert torch.load(link, weights_only=True)["global_step"] == 4 * best


def test_the_best_one_survives_a_resume_and_yields_to_a_better_one(trainer, tmp_path, monkeypatch):
    values = [2.0, 1.0, 1.5, 3.0]
    given(monkeypatch, "objective/scores", values)
    settings = {"dirpath": tmp_path / "c", "keep_last": 1, "best_by": "objective/scores"}
    for epochs, best in ((2, 4), (3, 4), (4, 16)):
        last = tmp_path / "c" / "last.ckpt"
        fit(trainer, Checkpoints(**settings), max_epochs=epochs, ckpt_path=last if last.exists() else None)
        assert torch.load(tmp_path / "c" / "best.ckpt")["global_step"] == best
    shutil.copy(written(tmp_path / "c")[0], tmp_path / "alone.ckpt")  # elsewhere there is no such file
    other = Checkpoints(**{**settings, "dirpath": tmp_path / "d"})
    values.append(0.5)
    fit(trainer, other, max_epochs=5, ckpt_path=tmp_path / "alone.ckpt")
    assert torch.load(tmp_path / "d" / "best.ckpt")["global_step"] == 20


def test_a_run_that_goes_back_removes_what_came_after(trainer, tmp_path):
    fit(trainer, Checkpoints(dirpath=tmp_path / "c", keep_last=9), max_epochs=3)
    (tmp_path / "c" / "step=00000016-epoch=0004.ckpt.tmp").write_text("half")
    first = written(tmp_path / "c")[-1]
    fit(trainer, Checkpoints(dirpath=tmp_path / "c", keep_last=9), max_epochs=2, ckpt_path=first)
    assert names(tmp_path / "c") == ["step=00000008-epoch=0002.ckpt", "step=00000004-epoch=0001.ckpt"]
    assert not list((tmp_path / "c").glob("*.tmp"))


def test_a_new_run_does_not_touch_another_one_s_checkpoints(trainer, tmp_path):
    fit(trainer, Checkpoints(dirpath=tmp_path / "c"))
    before = {path: path.read_bytes() for path in written(tmp_path / "c")}
    with pytest.raises(UserError, match="c holds another run's checkpoints"):
        fit(trainer, Checkpoints(dirpath=tmp_path / "c"))
    assert {path: path.read_bytes() for path in written(tmp_path / "c")} == before


def test_another_callback_s_checkpoints_stay_beside_it(trainer, tmp_path):
    user = ModelCheckpoint(dirpath=tmp_path / "mine", filename="{step}", save_top_k=1, monitor="step", mode="max")
    fit(trainer, Checkpoints(dirpath=tmp_path / "c"), user)
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["step=8.ckpt", "step=8.ckpt.sha256"]
    assert damage(tmp_path / "mine" / "step=8.ckpt") is None
    assert len(names(tmp_path / "c")) == 2


@pytest.mark.parametrize("settings", [{"keep_last": 0}, {"every_n_epochs": 0}, {"every_n_steps": 0}])
def test_it_refuses_what_makes_no_sense(settings):
    with pytest.raises(UserError, match=f"Checkpoints: {next(iter(settings))} must be a whole number of at least 1"):
        Checkpoints(**settings)


# ---- ckpt_path ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert run_here(*RUN, f"paths.output_dir={folder}").code == 0
    return folder


def rows(run):
    with open(f"{run}/metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/") and "per_second" not in k}
                for row in csv.DictReader(file)]  # fmt: skip


def model(run):
    return Path(run, "model", "model.safetensors").read_bytes()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("spoil", [flip, cut])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(whole, spoil):
    shutil.copytree(whole, "run", symlinks=True)
    newest = written(Path("run/checkpoints"))[0]
    spoil(newest)
    result = run_here(*RUN, "paths.output_dir=run")
    assert result.code == 0, result.err
    told = result.out + result.err
    assert f"{newest} cannot be read as a checkpoint: the SHA-256 of {newest.name} is" in told
    assert "iteration 4/4" in told
    assert "iteration 3/4" not in told
    assert rows("run") == rows(whole)
    assert model("run") == model(whole)
    assert not any(map(damage, written(Path("run/checkpoints"))))


def test_a_cut_checkpoint_without_a_checksum_is_recognised_too(whole):
    shutil.copytree(whole, "run", symlinks=True)
    newest = written(Path("run/checkpoints"))[0]
    newest.with_name(newest.name + ".sha256").unlink()
    cut(newest)
    result = run_here(*RUN, "paths.output_dir=run")
    assert (result.code, f"{newest} cannot be read as a checkpoint" in result.out + result.err) == (0, True)
    assert rows("run") == rows(whole)


def test_if_every_checkpoint_is_damaged_nothing_begins_anew(whole):
    shutil.copytree(whole, "run", symlinks=True)
    for path in written(Path("run/checkpoints")):
        flip(path)
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    result = run_here(*RUN, "paths.output_dir=run")
    assert result.code == 1
    assert "none of the 2 checkpoints in" in result.err
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


#: What may bear the name of a checkpoint.
ODD = {
    "pipe": os.mkfifo, "folder": Path.mkdir, "empty": Path.touch, "device": lambda path: path.symlink_to("/dev/zero"),
    "circle": lambda path: path.symlink_to(path.name), "dangling": lambda path: path.symlink_to("nowhere"),
}  # fmt: skip


def test_what_only_has_the_name_of_a_checkpoint_is_passed_over(tmp_path):
    """In a process of its own, which can be ended: to read a pipe takes for ever."""
    Path("checkpoints").mkdir()
    for number, odd in enumerate(ODD.values(), start=2):
        odd(tmp_path / f"checkpoints/step={number:08d}-epoch=0001.ckpt")
    script = """
from pathlib import Path
from lit_rlhf.checkpoint_io import FileCheckpointIO, remove
from lit_rlhf.train import newest_good
from lit_rlhf.callbacks.checkpoints import written
FileCheckpointIO().save_checkpoint({"lit_rlhf": {}}, "checkpoints/step=00000001-epoch=0001.ckpt")
print(newest_good(Path("checkpoints"))[0])
for path in written(Path("checkpoints")):
    remove(path)
print(*Path("checkpoints").iterdir())
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=90)
    assert done.stdout == f"{Path('checkpoints').resolve()}/step=00000001-epoch=0001.ckpt\n\n", done.stderr
    for number in range(2, 2 + len(ODD)):
        assert f"step={number:08d}-epoch=0001.ckpt cannot be read as a checkpoint" in done.stderr


def test_a_folder_of_another_callback_s_makes_way_for_the_link_to_the_newest(trainer, tmp_path):
    (tmp_path / "c" / "last.ckpt").mkdir(parents=True)
    fit(trainer, Checkpoints(dirpath=tmp_path / "c"), max_epochs=1)
    assert os.readlink(tmp_path / "c" / "last.ckpt") == names(tmp_path / "c")[0]


@pytest.mark.parametrize("link", [True, False])
def test_a_damaged_checkpoint_given_by_hand_is_refused(whole, link):
    shutil.copytree(whole, "run", symlinks=True)
    newest = written(Path("run/checkpoints"))[0]
    flip(newest)
    path = "run/checkpoints/last.ckpt" if link else newest
    result = run_here(*RUN, f"ckpt_path='{path}'", "paths.output_dir=run", "trainer.max_epochs=5")
    assert result.code == 1
    assert f"the SHA-256 of {newest.name} is" in result.err


def test_a_run_without_any_checkpoint_begins_and_cuts_what_was_written_before(whole):
    shutil.copytree(whole, "run", symlinks=True)
    shutil.rmtree("run/checkpoints")
    shutil.rmtree("run/model")
    Path("run/metrics.csv.123.tmp").write_text("half")
    assert run_here(*RUN, "paths.output_dir=run").code == 0
    assert rows("run") == rows(whole)
    assert not list(Path("run").glob("*.tmp"))


def test_a_complete_run_started_again_stays_as_it_is(whole):
    shutil.copytree(whole, "run", symlinks=True)
    assert run_here(*RUN, "paths.output_dir=run").code == 0
    assert rows("run") == rows(whole)
    assert model("run") == model(whole)
    assert names("run/checkpoints") == names(whole / "checkpoints")


@pytest.mark.parametrize("linked", ["run", "run/checkpoints", "above"])
def test_a_run_behind_a_link_is_continued(whole, linked):
    run = Path("above/run" if linked == "above" else "run")
    run.parent.mkdir(exist_ok=True)
    shutil.copytree(whole, run, symlinks=True)
    remove(written(run / "checkpoints")[0])
    Path(linked).rename("elsewhere")
    Path(linked).symlink_to(Path("elsewhere").absolute())
    result = run_here(*RUN, f"paths.output_dir={run}")
    assert result.code == 0, result.err
    assert "iteration 3/4" not in result.out
    assert rows(run) == rows(whole)
    assert model(run) == model(whole)


@pytest.mark.parametrize(("length", "done"), [("trainer.max_epochs=3", "epochs=4"), ("trainer.max_steps=7", "steps=8")])
def test_a_run_that_is_to_be_shorter_than_it_is_already_is_refused_and_stays_as_it_is(whole, length, done):
    shutil.copytree(whole, "run", symlinks=True)
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    result = run_here(*RUN, "paths.output_dir=run", length)
    assert result.code == 1
    assert f"{length}: the checkpoint" in result.err
    assert f"is of {done[-1]} {done[:-2]}" in result.err
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_an_older_layout_is_continued_from(whole):
    """One file that is overwritten, as a ModelCheckpoint of the user's may write it, without a checksum."""
    shutil.copytree(whole, "run", symlinks=True)
    shutil.copy(written(Path("run/checkpoints"))[1], "old.ckpt")
    shutil.rmtree("run/checkpoints")
    Path("run/checkpoints").mkdir()
    shutil.move("old.ckpt", "run/checkpoints/last.ckpt")
    result = run_here(*RUN, "paths.output_dir=run")
    assert (result.code, "iteration 3/4" in result.out) == (0, False)
    assert rows("run") == rows(whole)
    assert Path("run/checkpoints/last.ckpt").is_symlink()


# ---- another config, another version --------------------------------------------------------------------------------


def one_before(whole):
    """A copy of the run without its newest checkpoint; returns the one before it."""
    shutil.copytree(whole, "run", symlinks=True)
    remove(written(Path("run/checkpoints"))[0])
    (path,) = written(Path("run/checkpoints"))
    return path


def rewrite(path, change):
    """Changes what a checkpoint holds, as another version might have written it."""
    stored = torch.load(path, weights_only=True)
    change(stored)
    torch.save(stored, path)
    path.with_name(path.name + ".sha256").unlink(missing_ok=True)


class StopAt(L.Callback):
    def __init__(self, iteration):
        self.iteration = iteration

    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = trainer.current_epoch + 1 == self.iteration


def test_what_is_changed_to_save_a_run_is_allowed_holds_from_there_on_and_is_told():
    command = [*RUN, "scheduler=linear", "scheduler.num_warmup_steps=0", "paths.output_dir=run"]
    command += ["+callbacks.stop._target_=test_checkpoints.StopAt", "+callbacks.stop.iteration=2"]
    assert run_here(*command).code == 0
    changed = ["optimizer.lr=0.025", "algorithm.max_skipped_steps=3", "trainer.precision=bf16-mixed", "kl.coef=0.5"]
    result = run_here(*command, *changed, "callbacks.stop.iteration=4")
    assert result.code == 0, result.err
    told = result.out + result.err
    assert "step=00000004-epoch=0002.ckpt on, these keys differ (checkpoint -> now)" in told
    for line in ("optimizer.lr: 0.05 -> 0.025", "algorithm.max_skipped_steps: 10 -> 3", "kl.coef: 0.05 -> 0.5"):
        assert line in told
    assert "callbacks" not in told.split("these keys differ")[1]
    # At the end of each of 4 iterations of 2 steps, a straight line from the rate at the start to 0.
    rates = [row["optim/lr"] for row in read_metrics(Path("run"))]
    assert rates == pytest.approx([0.05 * 6 / 8, 0.05 * 4 / 8, 0.025 * 2 / 8, 0])
    assert [row["objective/kl_coef"] for row in read_metrics(Path("run"))] == [0.05, 0.05, 0.5, 0.5]
    last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert last["config"]["optimizer"]["lr"] == 0.025
    assert last["lit_rlhf"]["lr_scale"] == 0.5


def test_a_run_that_ended_because_of_skipped_steps_has_all_its_tries_again():
    guard = StepGuard(2)
    for _ in range(2):
        guard.check(float("nan"), 1)
    assert guard.verdict
    again = StepGuard(2)
    again.load_state_dict(guard.state_dict())
    again.check(float("nan"), 2)
    assert again.verdict is None
    again.check(float("nan"), 3)
    assert again.verdict
    within = StepGuard(3)  # a run that is killed on its way there goes on from the count that it had
    within.check(float("nan"), 1)
    again = StepGuard(3)
    again.load_state_dict(within.state_dict())
    assert again.in_a_row == {"optimiser step": 1}


def test_a_checkpoint_from_before_a_key_and_a_state_were_there_is_continued_from(whole):
    def older(stored):
        del stored["config"]["algorithm"]["max_skipped_steps"]
        del stored["config"]["policy"]["compile"]
        for name in ("step_means", "guard", "halving", "lr_scale", "version"):
            del stored["lit_rlhf"][name]

    rewrite(one_before(whole), older)
    result = run_here(*RUN, "paths.output_dir=run")
    assert result.code == 0, result.err
    assert rows("run") == rows(whole)
    assert model("run") == model(whole)


@pytest.mark.parametrize("version", ["0.0.9", None])
def test_a_state_that_cannot_be_made_up_for_names_the_version(whole, version):
    def older(stored):
        del stored["lit_rlhf"]["means"]
        stored["lit_rlhf"] |= {"version": version} if version else {}
        if not version:
            del stored["lit_rlhf"]["version"]

    rewrite(one_before(whole), older)
    result = run_here(*RUN, "paths.output_dir=run")
    assert result.code == 1
    by = "lit_rlhf 0.0.9" if version else "an older version of lit_rlhf"
    assert f"was written by {by} and holds no 'means', which version {__version__} needs" in result.err


def test_a_key_that_has_come_since_counts_as_its_default_and_no_other_value():
    new = {"algorithm": {"_target_": "lit_rlhf.algorithms.PPO", "max_skipped_steps": 10}, "gold": None, "seed": 1,
           "policy": {"_target_": "lit_rlhf.models.Policy.from_config", "compile": False, "lora": None},
           "optimizer": {"_target_": "torch.optim.Adam", "betas": [0.9, 0.999]}}  # fmt: skip
    old = {name: {"_target_": node["_target_"]} for name, node in new.items() if isinstance(node, dict)}
    assert differences(old, new, ()) == ["seed: (absent) -> 1"]  # nothing says what it was
    new["algorithm"]["max_skipped_steps"], new["policy"]["compile"] = 5, True
    assert differences({**old, "seed": 1}, new, ()) == [
        "algorithm.max_skipped_steps: (absent) -> 5", "policy.compile: (absent) -> True"
    ]  # fmt: skip
    assert differences(new, {**new, "gold": {}}, ()) == ["gold: None -> {}"]


def test_a_damaged_shard_is_recognised_and_the_sharded_checkpoint_before_is_used():
    two = [*RUN, "trainer=fsdp2", "trainer.devices=2", "trainer.limit_val_batches=0", "paths.output_dir=run"]
    assert run_here(*two, "trainer.max_epochs=2").code == 0
    first, took = rows("run"), [row["time/iteration"] for row in read_metrics(Path("run"))]
    newest = written(Path("run/checkpoints"))[0]
    assert newest.is_dir()
    flip(newest / "__1_0.distcp")
    assert f"the SHA-256 of {newest.name}/__1_0.distcp is" in damage(newest)
    result = run_here(*two, "trainer.max_epochs=3")
    assert result.code == 0, result.err
    assert rows("run")[:2] == first
    again = [row["time/iteration"] for row in read_metrics(Path("run"))]
    assert (again[0], again[1] == took[1]) == (took[0], False)  # the second iteration was done again
    assert [path.name for path in written(Path("run/checkpoints"))] == [
        "step=00000006-epoch=0003.ckpt", "step=00000004-epoch=0002.ckpt"
    ]  # fmt: skip
    assert not any(map(damage, written(Path("run/checkpoints"))))


# ---- a full disk ----------------------------------------------------------------------------------------------------


class FullDisk:
    """A reward: from its third call on, no file can grow over ``size`` bytes."""

    def __init__(self, size):
        self.size, self.calls = size, 0

    def __call__(self, prompts, completions, **columns):
        self.calls += 1
        if self.calls == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
        return [float(len(text)) for text in completions]


@pytest.mark.parametrize(("size", "file"), [(20_000, "step=00000006-epoch=0003.ckpt"), (1000, "metrics.csv")])
def test_a_full_disk_ends_the_run_with_what_it_was_writing_and_the_older_ones_are_intact(size, file):
    own = ["~reward", f"+reward={{_target_:test_checkpoints.FullDisk,size:{size}}}"]
    command = [argument for argument in RUN if not argument.startswith("reward")]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        result = run_here(*command, *own, "paths.output_dir=run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert result.code == 1
    assert f"{file} cannot be written: File too large" in result.err
    assert "Traceback" not in result.err
    if file != "metrics.csv":
        assert "the newest is step=00000004-epoch=0002.ckpt" in result.err
        assert json.loads(Path("run/summary.json").read_text())["status"] == "failed"
    assert names("run/checkpoints") == ["step=00000004-epoch=0002.ckpt", "step=00000002-epoch=0001.ckpt"]
    assert not any(map(damage, written(Path("run/checkpoints"))))
    assert not list(Path("run").rglob("*.tmp"))
    more = [argument.replace(f"size:{size}", "size:1000000000") for argument in own]
    result = run_here(*command, "ckpt_path=auto", *more, "paths.output_dir=run")
    assert "another configuration" in result.err  # the reward is part of it
    assert [row["iteration"] for row in read_metrics(Path("run"))][:2] == [1, 2]
