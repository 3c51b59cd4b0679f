"""What writing a checkpoint takes, and what is left of the one before when it does not get through."""

import tempfile
import tracemalloc

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from tiny import Prompts, letters, tiny_policy

from lit_rlhf.algorithms import PPO
from lit_rlhf.checkpoint_io import FileCheckpointIO
from lit_rlhf.rollout.sampler import Sampler


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


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    writer, path = FileCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint({"step": 1}, path)

    def half(_checkpoint, file):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="no space"):
            writer.save_checkpoint({"step": 2}, path)
    assert torch.load(path) == {"step": 1}
    writer.save_checkpoint({"step": 3}, path)
    assert torch.load(path) == {"step": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


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
