"""A callback that sends a run a signal at a chosen moment."""

import os
import signal
import time

import lightning as L

from lit_rlhf.distributed import rank


class Strike(L.Callback):
    """Sends ``name`` before the optimiser step after ``step``, or in the rollout phase ``phase`` after it.

    To this process, or to ``pid``; of several processes only the last one does. ``step=None`` is validation before
    training, the phase ``validation`` after the first batch of one, ``export`` the export.
    """

    def __init__(self, *, name="SIGTERM", step=None, phase=None, pid=None):
        self.name, self.step, self.phase, self.pid = name, step, phase, pid

    def strike(self):
        os.kill(self.pid or os.getpid(), getattr(signal, self.name))
        self.step = self.phase = "struck"

    def on_train_batch_start(self, trainer, *_):
        if self.phase is None and trainer.global_step == self.step and rank() == trainer.world_size - 1:
            self.strike()

    def on_phase(self, trainer, _module, phase, done, _whole):
        fitting = trainer.global_step if trainer.state.fn == "fit" else None
        last = rank() == trainer.world_size - 1
        if (phase, fitting) == (self.phase, self.step) and (done or phase != "rollout") and last:
            self.strike()

    def on_validation_batch_end(self, trainer, *_):
        fitting = trainer.global_step if trainer.state.fn == "fit" else None
        if (self.phase, self.step) == ("validation", fitting):
            self.strike()

    def on_fit_end(self, *_):
        if self.phase == "export":
            self.strike()


def strike_while_starting(parent):
    """In a process that does not listen yet: signals the parent, which passes it on."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.environ["RANK"] == "1":
        os.kill(parent, signal.SIGTERM)
    time.sleep(60)


class Mean(L.Callback):
    """Logs a mean over the steps of an epoch, as a user's callback may."""

    def on_train_batch_end(self, trainer, module, *_):
        module.log("mine/step", float(trainer.global_step), on_step=False, on_epoch=True, batch_size=1)
