"""Frozen models in half precision take half the memory, of the process too."""

import subprocess
import sys

import pytest

from lit_rlhf.machine import resident_memory_gb

PROGRAM = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from lit_rlhf.machine import keep_freed_memory, resident_memory_gb
from lit_rlhf.models.cast import cast_layers

keep_freed_memory()
config = LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=16)
model = LlamaForCausalLM(config)
layers = sum(p.nbytes for p in model.model.layers.parameters() if p.ndim == 2)
before = resident_memory_gb()
cast_layers(model, torch.bfloat16)
print(layers / 1e9, before, resident_memory_gb())
"""


@pytest.mark.skipif(not resident_memory_gb(), reason="the system does not say how much memory a process holds")
def test_what_casting_frees_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    layers, before, after = map(float, done.stdout.split())
    assert layers > 0.25
    assert after < before - 0.4 * layers
