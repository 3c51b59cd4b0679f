"""What writing a checkpoint takes, and what is left of the one before when it does not get through."""

import resource
import subprocess
import sys
import tempfile
import tracemalloc
from contextlib import contextmanager

import pytest
import torch
from command_line import environment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors.torch import save_file
from tiny import Prompts, letters, tiny_policy

from lit_rlhf.algorithms import PPO
from lit_rlhf.checkpoint_io import FileCheckpointIO, damage, folder_sums, place, written_to
from lit_rlhf.errors import UserError
from lit_rlhf.rollout.sampler import Sampler
from lit_rlhf.run_folder import writing


def ppo():
    sampler = Sampler(max_new_tokens=2)
    return PPO(policy=tiny_policy(), reward=letters, sampler=sampler, rollout_batch_size=2, minibatch_size=2)


def test_a_checkpoint_is_not_put_together_in_memory(tmp_path):
    state = {"weight": torch.randn(2**20)}
    tracemalloc.start()  # counts Python's memory, a buffer for the file too, but not torch's
    FileCheckpointIO().save_checkpoint(state, tmp_path / "new" / "last.ckpt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 < (tmp_path / "new" / "last.ckpt").stat().st_size
    assert torch.equal(torch.load(tmp_path / "new" / "last.ckpt")["weight"], state["weight"])


@contextmanager
def small_disk(size):
    """No file can grow over ``size`` bytes: the system refuses in the middle of a write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(tmp_path):
    writer, path = FileCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint({"step": 1}, path)
    with small_disk(100_000), pytest.raises(UserError, match=r"last.ckpt cannot be written: File too large"):
        writer.save_checkpoint({"step": 2, "weight": torch.randn(100_000)}, path)
    assert torch.load(path) == {"step": 1}
    assert damage(path) is None
    writer.save_checkpoint({"step": 3}, path)
    assert torch.load(path) == {"step": 3}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]


def test_a_model_that_does_not_fit_on_the_disk_is_named(tmp_path):
    with small_disk(1000), pytest.raises(UserError, match=r"model cannot be written: File too large"):
        with writing(tmp_path / "model"):
            save_file({"weight": torch.zeros(10_000)}, tmp_path / "model.safetensors")


def test_a_mistake_that_is_not_the_disk_s_is_shown_as_it_is(tmp_path):
    with pytest.raises(Exception, match=r"pickle|local object"):
        FileCheckpointIO().save_checkpoint({"step": lambda: None}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["cut", "flip", "missing", "sums", "no sums"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_that_is_not_what_was_written_is_recognised(tmp_path, change, sharded):
    path = tmp_path / "a.ckpt"
    if sharded:
        with written_to(path) as temporary:
            temporary.mkdir()
            for name in ("meta.pt", "__0_0.distcp"):
                (temporary / name).write_bytes(name.encode() * 100)
            place(temporary, path, folder_sums(temporary))
    else:
        FileCheckpointIO().save_checkpoint({"weight": torch.randn(100)}, path)
    (tmp_path / "last.ckpt").symlink_to("a.ckpt")
    check = subprocess.run(["sha256sum", "-c", "a.ckpt.sha256"], cwd=tmp_path, capture_output=True, text=True)
    assert check.stdout.count("OK") == (2 if sharded else 1)
    assert damage(path) is None
    file = path / "__0_0.distcp" if sharded else path
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if change == "missing":
        file.unlink()
    elif change == "sums":
        (tmp_path / "a.ckpt.sha256").write_text("0" * 64 + f"  {file.relative_to(tmp_path)}\n")
    elif change == "no sums":
        (tmp_path / "a.ckpt.sha256").write_text("\n")
        assert damage(path) == "a.ckpt.sha256 is empty"
        return
    else:
        file.write_bytes(content if change == "flip" else content[:-1])
    for name in ("a.ckpt", "last.ckpt") if change != "missing" or sharded else ["a.ckpt"]:
        assert file.name in damage(tmp_path / name)


def test_a_kill_between_any_two_steps_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    """Ends a write before each thing that it asks of the file system, in turn."""
    script = """
import os, signal, sys, torch
from lit_rlhf.checkpoint_io import FileCheckpointIO, damage, folder_sums, place, written_to
from lit_rlhf.errors import UserError
def end(event, _arguments):
    if event in ("open", "os.rename", "os.remove") and armed:
        armed[0] -= 1
        if armed[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
armed = []
sys.addaudithook(end)
folder = sys.argv[1]
for number in range(1, 30):
    path = f"{folder}/{number}.ckpt"
    FileCheckpointIO().save_checkpoint({"step": 1}, path)
    if (child := os.fork()) == 0:
        armed.append(number)
        FileCheckpointIO().save_checkpoint({"step": 2}, path)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(number)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    steps = []
    for number in range(1, int(result.stdout) + 1):
        path = tmp_path / f"{number}.ckpt"
        assert damage(path) is None
        steps.append(torch.load(path)["step"])
    assert steps == sorted(steps)
    assert steps[0] == 1
    assert steps[-2:] == [2, 2]


def test_a_run_s_checkpoints_need_no_room_in_the_temporary_folder(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    callback = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
    trainer(max_epochs=1, enable_checkpointing=True, callbacks=[callback]).fit(ppo(), datamodule=Prompts())
    assert "lit_rlhf" in torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_user_s_own_way_of_writing_checkpoints_stays(trainer):
    class Own(TorchCheckpointIO):
        pass

    loop = trainer(max_epochs=1, plugins=[Own()])
    loop.fit(ppo(), datamodule=Prompts())
    assert type(loop.strategy.checkpoint_io) is Own
