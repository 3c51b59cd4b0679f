"""One thread, no hub, no W&B server; a quiet trainer."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("WANDB_SILENT", "true")

import lightning as L
import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish():
    """What is imported by now stays: without this, every full collection, as at the end of a run, goes through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def trainer(tmp_path):
    """Makes a quiet trainer; keyword arguments go to Lightning's."""

    def make(**changes):
        settings = {
            "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "default_root_dir": tmp_path, "num_sanity_val_steps": 0,
        }  # fmt: skip
        return L.Trainer(**{**settings, **changes})

    return make
