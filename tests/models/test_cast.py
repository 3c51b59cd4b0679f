"""A reward model in half precision leaves nothing of its file in memory."""

from pathlib import Path

import pytest
import torch
from classifiers import save_classifier

from lit_rlhf.rewards.model import ModelReward

MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not say which files a process has in memory")
def test_the_file_of_a_reward_model_is_not_in_memory_once_its_weights_are_cast(tmp_path):
    folder = save_classifier(tmp_path)
    reward = ModelReward(path=folder)
    scores = reward(["a b"], ["c"])
    assert str(tmp_path) in MAPS.read_text()
    reward.place("cpu", torch.bfloat16)
    assert str(tmp_path) not in MAPS.read_text()
    torch.testing.assert_close(reward(["a b"], ["c"]), scores, rtol=0, atol=0.05)
