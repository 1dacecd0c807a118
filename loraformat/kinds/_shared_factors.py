"""Random factors that all targets share, of which each takes the rows and columns that it has.

Where they were not saved they are drawn again, from the seed: A first, then B, each as large as the largest weight of
all that were adapted asks for.

    projection_prng_key    the seed
    sharing                how many targets share them; without all of these their sizes are not known
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Sharing
from loraformat.kinds._axes import Axes
from loraformat.kinds._factored import FactoredKind, Option, count, name_options
from loraformat.kinds._torch_random import draw_uniform
from loraformat.limits import MAX_DRAWN
from loraformat.problems import Problem

SEED: Final = "projection_prng_key"
SHARING: Final = "sharing"


class SharedFactors(FactoredKind):
    """A kind whose A and B all targets share.

    Attributes:
        down: the role of A `(rank, widest)`.
        up: the role of B `(tallest, rank)`.
    """

    options: ClassVar[Mapping[str, Option]] = name_options(
        projection_prng_key=count(None, least=0),
        sharing=count(None),
    )
    down: ClassVar[str]
    up: ClassVar[str]

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return a problem of a shared B with fewer rows than the target, or of one that nothing tells."""
        if self.up in target.factors:
            if axes["out"] <= axes["tallest"]:
                return []
            found = f"{axes['out']} rows, and a shared factor with {axes['tallest']}"
            return [Problem("LF203", target.name, found, "a shared factor with at least as many")]
        missing = [name for name in (SEED, SHARING) if self.option(target, name) is None]
        expected = f"{self.down} and {self.up}, or what they are drawn by"
        return [Problem("LF230", f"{target.name}: options", f"no {name!r}", expected) for name in missing]

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of a shared A with fewer columns than the weight."""
        axes = self.axes(target)
        if self.down not in target.factors or change.shape[1] <= axes["widest"]:
            return []
        found = f"a weight of {change.shape}, and a shared factor with {axes['widest']} columns"
        return [Problem("LF405", target.name, found, "a shared factor with at least as many")]

    def sharing(self, target: Target) -> Sharing | None:
        """Return what is drawn again, with the seed; None where the factors were saved."""
        if self.up in target.factors:
            return None
        what = f"{self.down} and {self.up}, seed {self.option(target, SEED)}"
        return Sharing(what, self.option(target, SHARING))

    def check_extent(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of factors that are larger than anyone would draw."""
        numbers = sum(rows * columns for rows, columns in self._sizes(target, change))
        if numbers <= MAX_DRAWN:
            return []
        return [Problem("LF235", target.name, f"{numbers} random numbers to draw", f"at most {MAX_DRAWN}")]

    def count_ranks(self, target: Target) -> tuple[int, int]:
        """Return the rows of A and the columns of B."""
        return target.rank, target.rank

    def share(
        self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return A and B, saved or drawn again, in the form of the other factors."""
        if self.up in factors:
            return factors[self.down], factors[self.up]
        form = next(iter(factors.values())).dtype
        drawn = _draw(self.option(target, SEED), *self._sizes(target, change))
        return drawn[0].astype(form, copy=False), drawn[1].astype(form, copy=False)

    def _sizes(self, target: Target, change: Change) -> tuple[tuple[int, int], tuple[int, int]]:
        tallest, widest = change.extent
        rows, columns = self.count_ranks(target)
        return (rows, widest), (tallest, columns)


@lru_cache(maxsize=1)
def _draw(seed: int, down: tuple[int, int], up: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return A and B as PEFT draws them: He's uniform numbers, each for its own number of columns."""
    numbers = draw_uniform(seed, [(math.prod(shape), _find_bound(shape[1])) for shape in (down, up)])
    return numbers[0].reshape(down), numbers[1].reshape(up)


def _find_bound(fan: int) -> float:
    """Return the largest number, computed in the order in which `torch.nn.init.kaiming_uniform_` does."""
    return math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan))
