"""What goes wrong in a run by itself, in the same way however often it is restarted."""

import os
import signal
import zlib

import lightning as L
import torch

from lit_rlhf.distributed import rank
from lit_rlhf.errors import UserError


class Flaky:
    """Vowels, from a server that has no answer to about every third batch; in validations neither."""

    name = "vowels"
    on_failure = "skip_batch"

    def __call__(self, prompts, completions, **columns):
        if zlib.crc32("".join(completions).encode()) % 3 == 0:
            raise UserError("the server does not answer")
        return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


class Tight(L.Callback):
    """An update of more than ``rows`` rows finds no memory once the run has learned something."""

    def __init__(self, rows):
        self.rows = rows

    def setup(self, trainer, module, stage):
        loss = module.batch_loss

        def tight(batch, *share):
            if trainer.global_step >= 3 and module.rows_of(batch) > self.rows:
                raise torch.OutOfMemoryError("out of memory: planted")
            return loss(batch, *share)

        module.batch_loss = tight


class Struck(L.Callback):
    """Kills the second of two processes, where ``STRIKE`` says at which of its phases and steps."""

    def __init__(self):
        self.number = int(os.environ.get("STRIKE", "0"))

    def passes(self):
        self.number -= 1
        if self.number == 0 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_phase(self, *_):
        self.passes()

    def on_train_batch_start(self, *_):
        self.passes()
