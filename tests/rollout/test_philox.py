"""Known answers of Random123's kat_vectors for philox4x32-10, and the statistics of the uniform numbers."""

import pytest
import torch

from lit_rlhf.rollout.philox import derive_seed, philox4x32, uniform

KNOWN = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_equals_the_published_vectors(counter, key, expected):
    words = philox4x32(tuple(torch.tensor(c) for c in counter), key)
    assert " ".join(f"{int(w):08x}" for w in words) == expected


def test_numbers_are_uniform_and_uncorrelated():
    u = uniform(3, torch.arange(2000), 50)
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, bins=20, min=0, max=1)
    chi_square = ((counts - u.numel() / 20) ** 2 / (u.numel() / 20)).sum()
    assert chi_square < 43.8  # 99.9 % point with 19 degrees of freedom
    for a, b in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):  # along tokens, along episodes
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.015


def test_a_number_depends_on_seed_episode_and_token_alone():
    whole = uniform(7, torch.arange(10), 6)
    assert torch.equal(uniform(7, torch.tensor([8, 3]), 4), whole[[8, 3], :4])
    assert not torch.equal(uniform(8, torch.arange(10), 6), whole)
    large = uniform(7, torch.tensor([3, 3 + 2**32]), 6)
    assert not torch.equal(large[0], large[1])


def test_derived_seeds_differ():
    seeds = {derive_seed(s, i, k) for s in range(4) for i in range(20) for k in range(4)}
    assert len(seeds) == 4 * 20 * 4
    assert all(0 <= s < 2**63 for s in seeds)
