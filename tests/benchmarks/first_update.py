"""A callback that ends a run at its first update: ``+callbacks.first._target_=tests.benchmarks.first_update.Stop``."""

import os
from typing import Any

import lightning as L

from tests.benchmarks.commands import FIRST_UPDATE


class Stop(L.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        os._exit(FIRST_UPDATE)
