"""What suits the machine that a run is on: its precision, how its memory is kept."""

import ctypes
import os
import platform
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

# Parameters of glibc's mallopt, from malloc.h, and of Linux's madvise
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2 * 2**20


def keep_freed_memory() -> None:
    """Lets glibc reuse large blocks instead of giving each one back to the system and faulting its pages in again.

    Logits, activations and gradients come and go in blocks of up to hundreds of megabytes, and a fresh page costs more
    time than what is computed on it. Linux gives the heap pages of 2 MB as well where its setting is ``madvise``: it
    is let grow to half of the machine's memory at once, of which only what was ever used is resident. Whatever was
    used stays with the process until it ends. Does nothing where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
    libc.mallopt(_M_TOP_PAD, 64 * 2**20)
    libc.malloc.restype = ctypes.c_void_p
    size = memory_size() // 2
    if block := libc.malloc(ctypes.c_size_t(size)):
        start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(block + size - start), _MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(block))


def memory_size() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def best_precision() -> str:
    """``bf16-mixed`` where the hardware multiplies bfloat16 matrices quickly, else ``32-true``.

    On CPUs that is avx512_bf16 or amx: without them bfloat16 is emulated, slower than fp32. On GPUs, compute capability
    8.0 and later.
    """
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    capabilities = torch.cpu.get_capabilities()
    return "bf16-mixed" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "32-true"


def decode_dtype(precision: str) -> torch.dtype:
    """Of the weights that complete prompts under a ``trainer.precision``."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32


def reset_peak_memory() -> None:
    """Lets ``peak_memory_gb`` count from now on, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb() -> float:
    """The largest resident memory of this process since ``reset_peak_memory``, in units of 1e9 bytes."""
    if (peak := _status_gb("VmHWM")) is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 3)


def resident_memory_gb() -> float:
    """The memory that this process holds now, in units of 1e9 bytes; 0 where the system does not say."""
    return _status_gb("VmRSS") or 0.0


def _status_gb(name: str) -> float | None:
    with suppress(OSError):
        if found := re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return round(int(found[1]) * 1024 / 1e9, 3)
    return None
