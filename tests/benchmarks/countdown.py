"""Prompts of the rollout benchmark: mixed lengths, and completions that end where the prompt says.

The last token of a prompt is ``eos + n``, from which the model of ``materials.make_countdown`` counts down, so that the
completion has n tokens.
"""

import math
import random
import statistics


def stop_lengths(count: int, longest: int = 256) -> list[int]:
    """Response lengths with a long tail, in random order: log-normal with median 20, one in eighteen cut at 256.

    For another ``longest`` the median follows in proportion.

    >>> sorted(stop_lengths(8))
    [2, 5, 9, 16, 26, 44, 83, 233]
    """
    normal = statistics.NormalDist(math.log(20 * longest / 256), 1.6)
    lengths = [min(longest, max(2, round(math.exp(normal.inv_cdf((i + 0.5) / count))))) for i in range(count)]
    random.Random(0).shuffle(lengths)
    return lengths


def countdown_prompts(lengths: list[int], *, longest: int, eos: int, vocabulary: int) -> list[list[int]]:
    """A prompt of 8 to ``longest`` tokens for each completion of ``lengths`` tokens."""
    draw, prompts = random.Random(1), []
    first = eos + max(lengths) + 1  # no token of the countdown stands inside a prompt
    for length in lengths:
        size = draw.randint(min(8, longest), longest)
        prompts.append([*(draw.randrange(first, vocabulary) for _ in range(size - 1)), eos + length])
    return prompts
