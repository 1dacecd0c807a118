"""LoKr as PEFT has it: which sides a weight is divided into, and which factors are whole, follows from few fields.

Source: huggingface/peft 0.21, tuners/lokr/layer.py.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from loraformat.adapter import Factor, Target
from loraformat.problems import Problem
from loraformat.strict_json import JsonValue

_KERNELS: Final = (1, 9, 25, 49, 4, 16, 3, 5, 7)
"""Elements of kernels, the usual first: a w2 that is a product has the columns of the whole kernel."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    """How a target divides the sides of its weight, `(a * c, b * d)`.

    Attributes:
        left: `(a, b)`, the sides of w1.
        right: `(c, d)`, those of w2; d with the elements of the kernel where w2 is a product without a core.
        ranks: those of w1 and w2, 0 for a whole one.
    """

    left: tuple[int, int]
    right: tuple[int, int]
    ranks: tuple[int, int]


def complete_lokr(targets: Mapping[str, Target], config: dict[str, JsonValue]) -> list[Problem]:
    """Add the fields under which PEFT makes just these factors; return the targets for which there are none.

    Args:
        targets: by the names that the configuration has for them.
        config: gets `decompose_both`, `decompose_factor` and `use_effective_conv2d`.
    """
    sizes = {name: _measure(target.factors) for name, target in targets.items()}
    both = any(each.ranks[0] for each in sizes.values())
    has_core = any("lokr_t2" in target.factors for target in targets.values())
    candidates = (-1, *sorted({side for each in sizes.values() for side in each.left}))
    others = {each: [name for name, size in sizes.items() if not _is_divided(size, each)] for each in candidates}
    factor = min(candidates, key=lambda each: len(others[each]))
    expected = f"the sides that PEFT gives it by decompose_factor {factor}, as others have them"
    if others[factor]:
        found = {name: f"w1 {sizes[name].left}, w2 {sizes[name].right}" for name in others[factor]}
        return [Problem("LF312", targets[name].name, each, expected) for name, each in found.items()]
    config |= {"decompose_both": both, "decompose_factor": factor, "use_effective_conv2d": has_core}
    found_against = [_check_ranks(target, sizes[name], both=both) for name, target in targets.items()]
    return [problem for problem in found_against if problem is not None]


def stated_rank(target: Target) -> int:
    """Return a target's rank; for whole factors one from which on PEFT has them whole, by which nothing is rounded."""
    widest = max(size for factor in target.factors.values() for size in factor.shape[:2])
    return target.rank or 1 << (widest - 1).bit_length()


def _measure(factors: Mapping[str, Factor]) -> _Sizes:
    left, first = _measure_side(factors, "lokr_w1")
    right, second = _measure_side(factors, "lokr_w2", has_core="lokr_t2" in factors)
    return _Sizes(left, right, (first, second))


def _measure_side(factors: Mapping[str, Factor], role: str, *, has_core: bool = False) -> tuple[tuple[int, int], int]:
    if role in factors:
        rows, columns = factors[role].shape[:2]
        return (rows, columns), 0
    first, second = factors[f"{role}_a"].shape, factors[f"{role}_b"].shape
    return (first[1 if has_core else 0], second[1]), second[0]


def _check_ranks(target: Target, sizes: _Sizes, *, both: bool) -> Problem | None:
    """Return a problem of factors that PEFT has in another form: from half of the longer side on, it has them whole."""
    rank = stated_rank(target)
    made = both and rank < max(sizes.left) / 2, rank < max(sizes.right) / 2
    if made == tuple(map(bool, sizes.ranks)) and {each for each in sizes.ranks if each} <= {rank}:
        return None
    words = [f"{name} {side} of {f'rank {rank}' if rank else 'full rank'}" for name, side, rank in _name_sides(sizes)]
    return Problem("LF312", target.name, ", ".join(words), f"the factors that PEFT makes for rank {rank}")


def _name_sides(sizes: _Sizes) -> Iterator[tuple[str, tuple[int, int], int]]:
    yield "w1", sizes.left, sizes.ranks[0]
    yield "w2", sizes.right, sizes.ranks[1]


def _is_divided(sizes: _Sizes, factor: int) -> bool:
    """Say whether a factor divides both sides of the weight as they are."""
    (a, b), (c, d) = sizes.left, sizes.right
    inner = [d // each for each in (_KERNELS if sizes.ranks[1] else (1,)) if d % each == 0]
    return factorise(a * c, factor) == (a, c) and any(factorise(b * each, factor) == (b, each) for each in inner)


@cache
def factorise(size: int, factor: int) -> tuple[int, int]:
    """Return the two sides into which PEFT divides a size: `factor` and the rest, or as near to it from below as goes.

    -1 stands for a factor near the root.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    small, large = 1, size
    for divisor in _list_divisors(size):
        if small >= large or divisor > (size if factor == -1 else factor):
            break
        small, large = divisor, size // divisor
    return min(small, large), max(small, large)


def _list_divisors(size: int) -> Collection[int]:
    """Return the divisors from 2 on, in order."""
    small = [each for each in range(2, math.isqrt(size) + 1) if size % each == 0]
    return [*small, *(size // each for each in reversed(small) if each * each != size), size]
