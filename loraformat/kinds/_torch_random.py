"""The numbers that torch's generator on the CPU gives for a seed, as far as adapters leave them to be drawn again.

`torch.Generator().manual_seed(s)` is the Mersenne Twister MT19937 with the lower 32 bits of the seed, as numpy's
`RandomState` has it; `torch.randperm` for fewer than 2³²/20 numbers is a forward Fisher-Yates shuffle over its words.
A uniform float32 is the lower 24 bits of a word, times the width of the interval, plus its begin, rounded once.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change
from loraformat.problems import Problem

MAX_PERMUTED: Final = (1 << 32) // 20
"""Of more numbers torch makes a permutation in another way."""


def draw_permutation(numbers: int, first: int, seed: int) -> NDArray[np.intp]:
    """Return the first entries of `torch.randperm(numbers)`, as it is after `manual_seed(seed)`.

    Args:
        numbers: how many are permuted, below `MAX_PERMUTED`.
        first: how many entries are wanted.
        seed: the seed.
    """
    words = _draw_words(min(first, numbers - 1), seed)
    moved: dict[int, int] = {}
    entries = np.empty(first, np.intp)
    for place in range(first):
        other = place + (int(words[place]) % (numbers - place) if place < len(words) else 0)
        entries[place] = moved.get(other, other)
        moved[other] = moved.get(place, place)
    return entries


def draw_uniform(seed: int, runs: Sequence[tuple[int, float]]) -> list[NDArray[np.float32]]:
    """Return what `tensor.uniform_(-bound, bound)` gives for one float32 tensor after the other of one generator.

    Args:
        seed: the seed.
        runs: numbers of each tensor, and its bound.
    """
    words = _draw_words(sum(numbers for numbers, _ in runs), seed)
    drawn, place = [], 0
    for numbers, bound in runs:
        low, high = np.float32(-bound), np.float32(bound)
        parts = (words[place : place + numbers] & 0xFFFFFF).astype(np.float64) * 2.0**-24
        parts *= np.float64(high - low)  # Products of two 24-bit numbers and their sum with a third: exact in float64.
        drawn.append((parts + np.float64(low)).astype(np.float32))
        place += numbers
    return drawn


def _draw_words(count: int, seed: int) -> NDArray[np.uint32]:
    twister = np.random.MT19937()
    twister._legacy_seeding(seed & 0xFFFFFFFF)
    words = twister.random_raw(count)
    return np.asarray(words, np.uint32)


def check_places(target: Target, change: Change, wanted: int) -> list[Problem]:
    """Return a problem of a weight that has not as many places, or too many for the shuffle."""
    numbers = math.prod(change.shape)
    if wanted <= numbers < MAX_PERMUTED:
        return []
    found = f"a weight of {change.shape}, {numbers} numbers"
    return [Problem("LF405", target.name, found, f"at least {wanted} of them, and fewer than {MAX_PERMUTED}")]
