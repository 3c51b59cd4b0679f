"""What suits the machine that a run is on: its precision, how its memory is kept."""

import ctypes
import platform
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

# Parameters of glibc's mallopt, from malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Lets glibc reuse large blocks instead of giving each one back to the system and faulting its pages in again.

    Logits and activations come and go in blocks of tens of megabytes: a PPO iteration of SmolLM2 on two cores takes a
    fifth less time, at the same peak. Does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 64 * 2**20)


def best_precision() -> str:
    """``bf16-mixed`` where the hardware multiplies bfloat16 matrices quickly, else ``32-true``.

    On CPUs that is avx512_bf16 or amx: without them bfloat16 is emulated, slower than fp32. On GPUs, compute capability
    8.0 and later.
    """
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    capabilities = torch.cpu.get_capabilities()
    return "bf16-mixed" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "32-true"


def reset_peak_memory() -> None:
    """Lets ``peak_memory_gb`` count from now on, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb() -> float:
    """The largest resident memory of this process since ``reset_peak_memory``, in units of 1e9 bytes."""
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return round(int(found[1]) * 1024 / 1e9, 3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 3)
