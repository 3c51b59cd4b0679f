"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A random number is a pure function of (seed, stream, counter). Nothing is consumed, so a completion does not depend on
the batch it sits in, on the number of processes, or on where a run was resumed.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox on four 32-bit words, each held in an int64 tensor; all shapes broadcast.

    int64 products wrap around, but their low 64 bits are right, and the mask after the shift drops the sign bits.

    >>> zero = torch.zeros((), dtype=torch.long)
    >>> [hex(int(word)) for word in philox4x32((zero, zero, zero, zero), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ k0,
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniform(seed: int, episodes: Tensor, steps: int, device: torch.device | str = "cpu") -> Tensor:
    """The numbers in [0, 1) that pick the tokens of episodes: (B,) -> (B, ``steps``) in float64.

    Entry (b, t) is a function of (seed, episodes[b], t) alone. Resolution 2^-53.
    """
    episode = episodes.to(device=device, dtype=torch.long).unsqueeze(-1)
    step = torch.arange(steps, device=device).unsqueeze(0)
    zero = torch.zeros_like(episode * step)
    counter = (zero + (episode & _LOW), zero + (episode >> 32), zero + step, zero)
    high, low, *_ = philox4x32(counter, (seed & _LOW, (seed >> 32) & _LOW))
    return ((high >> 5).double() * 2.0**26 + (low >> 6).double()) * 2.0**-53


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from whole numbers, e.g. (seed, iteration, epoch): for shuffles and data passes.

    >>> derive_seed(1, 2) != derive_seed(2, 1)
    True
    """
    state = 0
    for part in parts:
        words = [torch.tensor(w) for w in (part & _LOW, (part >> 32) & _LOW, 1, 0)]
        high, low, *_ = philox4x32(tuple(words), (state & _LOW, state >> 32))
        state = ((int(high) << 32) | int(low)) & (2**63 - 1)
    return state
