"""How long operations take on a machine: bound by arithmetic, by memory, or by what starting them costs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lit_rlhf.checks import check_int, check_number
from lit_rlhf.estimation.shapes import Operation, Shape, Trace
from lit_rlhf.machine import best_precision, keep_freed_memory, memory_size, resident_memory_gb
from lit_rlhf.models.policy import Policy

_HALF = (torch.bfloat16, torch.float16)


@dataclass(kw_only=True)
class Machine:
    """Equal devices, described by their data sheet.

    An operation takes the longer of its arithmetic and of the bytes that it moves (the roofline, Williams et al. 2009,
    doi:10.1145/1498765.1498785). A device runs them while the program starts the next ones, so a stage takes the longer
    of all operations and of all starts.

    Args:
        name: what the device is called.
        devices: how many there are, on all nodes together.
        memory: of each, in 1e9 bytes.
        bandwidth: of its memory, in 1e9 bytes per second.
        fp32, bf16: dense matrix products in these precisions, in 1e12 FLOP per second. On a GPU fp32 is TF32's, which
            training allows.
        efficiency: the share of the three rates above that is reached.
        interconnect: what each device sends to and gets from the others, in 1e9 bytes per second; 0 does not count it.
        start: what starting an operation costs the program, in microseconds.
        reserved: memory that is taken before a run begins, in 1e9 bytes.

    Raises:
        UserError: a number out of its range.
    """

    name: str
    devices: int = 1
    memory: float
    bandwidth: float
    fp32: float
    bf16: float
    efficiency: float = 1.0
    interconnect: float = 0.0
    start: float = 0.0
    reserved: float = 0.0

    def __post_init__(self) -> None:
        check_int("machine.devices", self.devices, at_least=1)
        for key in ("memory", "bandwidth", "fp32", "bf16"):
            check_number(f"machine.{key}", getattr(self, key), above=0)
        for key in ("interconnect", "start", "reserved"):
            check_number(f"machine.{key}", getattr(self, key), at_least=0)
        check_number("machine.efficiency", self.efficiency, above=0, at_most=1)

    @property
    def precision(self) -> str:
        """What ``trainer.precision=auto`` is there."""
        return "bf16-mixed" if self.bf16 > self.fp32 else "32-true"

    def seconds(self, trace: Trace) -> float:
        """The time of all operations of a trace."""
        return max(self.alone(trace), trace.calls * self.start * 1e-6)

    def alone(self, trace: Trace) -> float:
        """The time of all operations of a trace, without what starting them costs."""
        return sum(count * self.operation(operation) for operation, count in trace.operations)

    def operation(self, operation: Operation) -> float:
        """The time of one operation, in seconds."""
        rate = self.bf16 if operation.dtype in _HALF else self.fp32
        return max(operation.flops / rate / 1e12, operation.moved / self.bandwidth / 1e9) / self.efficiency

    def transfer(self, bytes_: float) -> float:
        """The time that a device takes to send this much and to get as much, in seconds."""
        return bytes_ / self.interconnect / 1e9 if self.interconnect else 0.0


#: An operation that is larger is not tried out: its time follows from the rates.
_MOST_FLOPS, _MOST_BYTES = 2e10, 4e8


class ThisMachine(Machine):
    """The CPU of this machine, measured: every operation is run a few times at the shapes at which it occurs.

    What it reads from memory rather than from a cache is bound by the bandwidth besides, and around each operation
    there is what Python, transformers and autograd take, as measured on a tiny model. GPUs are not measured.

    Args:
        devices: processes among which the cores are shared; their operations are measured as if each had all of them.
    """

    def __init__(self, *, devices: int = 1) -> None:
        keep_freed_memory()
        self._timed: dict[str, float] = {}
        reserved = resident_memory_gb()
        large = torch.zeros(2**26)
        super().__init__(
            name=f"this CPU ({torch.get_num_threads()} threads)",
            devices=devices,
            memory=memory_size() / 1e9 / devices,
            bandwidth=2 * large.nbytes / _seconds(lambda: large.clone()) / 1e9,
            fp32=_product_rate(torch.float32) / 1e12,
            bf16=_product_rate(torch.bfloat16) / 1e12,
            reserved=reserved,
        )
        self.start = 1e6 * self._around()

    @property
    def precision(self) -> str:
        return best_precision()

    def seconds(self, trace: Trace) -> float:
        return self.alone(trace) + trace.calls * self.start * 1e-6

    def operation(self, operation: Operation) -> float:
        if operation.flops > _MOST_FLOPS or operation.moved > _MOST_BYTES:
            return super().operation(operation)
        key = f"{operation[:3]}{operation.held}"
        if key not in self._timed:
            try:
                self._timed[key] = _replay(operation)
            except RuntimeError:  # some operations refuse what zeros say
                self._timed[key] = super().operation(operation)
        return self._timed[key]

    def _around(self) -> float:
        """Seconds that go by around an operation, on average: of a tiny model's forward pass, less its operations."""
        policy = Policy.from_config(
            tokenizer="bytes", hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        )
        ids = torch.ones(1, 4, dtype=torch.long)
        tokens = (ids, ids.bool(), ids, ids.bool())

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                policy(*tokens).logprobs.sum().backward()

        with Trace() as trace:
            step()
        return max(0.0, _seconds(step) - self.alone(trace)) / trace.calls


def _product_rate(dtype: torch.dtype) -> float:
    """FLOP per second of products of 512 rows with a weight of 1024 by 1024."""
    rows, weight = torch.zeros(512, 1024, dtype=dtype), torch.zeros(1024, 1024, dtype=dtype)
    return 2 * 512 * 1024 * 1024 / _seconds(lambda: rows @ weight)


#: More than the caches hold, and how many bytes of results are kept while operations go by.
_BEYOND_CACHE = 1e8


def _replay(operation: Operation) -> float:
    """Seconds of an operation on zeros.

    What it reads of weights has not been touched for a while and what it writes goes to fresh memory, as in a run.
    """
    size = max(1.0, operation.held, operation.moved / 2)
    count = int(min(64, max(2, _BEYOND_CACHE / size)))
    copies = range(count if operation.held else 1)
    inputs = [tree_map_only(Shape, _zeros, (operation.args, operation.kwargs)) for _ in copies]

    def all_of_them() -> list[Any]:
        return [operation.func(*inputs[n % len(inputs)][0], **inputs[n % len(inputs)][1]) for n in range(count)]

    return _seconds(all_of_them) / count


def _seconds(run: Callable[[], Any]) -> float:
    """The shortest of some runs after a first one: other processes only ever add to it."""
    run()
    times: list[float] = []
    while len(times) < 5 and sum(times) < 0.02:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _zeros(shape: Shape) -> Tensor:
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape.size, shape.stride, strict=True))
    fill = torch.ones if shape.dtype == torch.bool else torch.zeros
    return fill(max(span, 0) if all(shape.size) else 0, dtype=shape.dtype).as_strided(shape.size, shape.stride)
