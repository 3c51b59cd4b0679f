"""What ``trainer.precision=auto`` means on this machine."""

import torch


def best_precision() -> str:
    """``bf16-mixed`` where the hardware multiplies bfloat16 matrices quickly, else ``32-true``.

    On CPUs that is avx512_bf16 or amx: without them bfloat16 is emulated, slower than fp32. On GPUs, compute capability
    8.0 and later.
    """
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    capabilities = torch.cpu.get_capabilities()
    return "bf16-mixed" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "32-true"
