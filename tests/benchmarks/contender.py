"""One side of a comparison: a process that stays alive and does one iteration for every request.

    python -m tests.benchmarks.contender PROGRAM SETTINGS MATERIALS

Requests and replies are JSON, a line each, on standard input and output. Each side runs its own, unchanged training
loop; the only thing put into it is ``Gate.wait`` where an iteration begins.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from tests.benchmarks.settings import Materials, Settings

PROGRAMS = {
    "ours.ppo": ("ours", "ppo"),
    "ours.grpo": ("ours", "grpo"),
    "ours.rollout": ("ours", "rollout"),
    "trl.ppo": ("peers", "trl_ppo"),
    "trl.grpo": ("peers", "trl_grpo"),
    "transformers.generate": ("peers", "generate"),
}


class Done(Exception):
    """There are no more requests; it ends the training loop from inside."""


class Gate:
    """Where a training loop waits before each iteration.

    Args:
        requests: ``{"do": "iterate"}``, ``{"do": "profile"}``, which is an iteration under torch's profiler, or what
            ``answers`` has.
        reply: takes the answer to a request.
    """

    def __init__(self, requests: Iterable[dict[str, Any]], reply: Callable[[dict[str, Any]], None]) -> None:
        self.requests = iter(requests)
        self.reply = reply
        self.facts: dict[str, Any] = {}  # what the loop says of the iteration under way
        self.answers: dict[str, Callable[[], dict[str, Any]]] = {}
        self._started: float | None = None
        self._profiler: Any = None

    def wait(self) -> None:
        """Ends the iteration under way, if there is one, and returns when the next one is asked for."""
        self.reply(self._finished() if self._started is not None else {"ready": True})
        for request in self.requests:
            if request["do"] in self.answers:
                self.reply(self.answers[request["do"]]())
                continue
            self.facts = {}
            if request["do"] == "profile":
                from torch.profiler import ProfilerActivity, profile

                self._profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True).__enter__()
            self._started = time.perf_counter()
            return
        raise Done

    def _finished(self) -> dict[str, Any]:
        import torch

        # Only here, after torch has read the environment: this package sets how torch's idle threads wait.
        from lit_rlhf.machine import peak_memory_gb

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        reply = {"seconds": seconds, "peak_gb": peak_memory_gb(), **self.facts}
        if torch.cuda.is_available():
            reply["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            reply["operators"] = operators(self._profiler, shapes=False)
            reply["operators_by_shape"] = operators(self._profiler, shapes=True)
            self._profiler = None
        return reply


def operators(profiler: Any, *, shapes: bool, count: int = 15) -> list[dict[str, Any]]:
    """The operators that took most time by themselves: name, calls, seconds; with ``shapes``, told apart by shapes."""
    events = sorted(profiler.key_averages(group_by_input_shape=shapes), key=lambda event: -event.self_cpu_time_total)
    return [
        {
            "name": f"{event.key} {event.input_shapes}" if shapes else event.key,
            "calls": event.count,
            "seconds": round(event.self_cpu_time_total / 1e6, 3),
        }
        for event in events[:count]
    ]


def main() -> None:
    program, settings, materials = sys.argv[1:]
    settings, materials = Settings(**json.loads(settings)), Materials(**json.loads(materials))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print is no answer

    def reply(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    import torch

    torch.set_num_threads(settings.threads)
    module, name = PROGRAMS[program]
    run = getattr(importlib.import_module(f"tests.benchmarks.{module}"), name)
    try:
        run(settings, materials, Gate(map(json.loads, sys.stdin), reply))
    except Done:
        pass


if __name__ == "__main__":
    main()
