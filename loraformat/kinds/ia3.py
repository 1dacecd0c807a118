"""(IA)³: W∘l, every output or every input multiplied by a number of its own (Liu et al., arXiv 2205.05638).

Where outputs are multiplied, so is the bias. A grouped convolution whose inputs are multiplied has each group's own.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import REST, UNKNOWN, Change, Nature, WeightMap
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._deltas import GatheredDelta
from loraformat.kinds._factored import MATRICES, FactoredKind, flag, name_options
from loraformat.kinds._maps import ElementwiseMap, ScaleMap
from loraformat.problems import Problem

_ROLE: Final = "ia3_l"


class Ia3(FactoredKind):
    """The kind `ia3`; the option `is_feedforward` says that inputs are multiplied."""

    name = "ia3"
    nature = Nature.FUNCTION_OF_BASE
    formula = "W∘l, b∘l; of feed-forward modules the columns of W alone"
    source = "arXiv 2205.05638; PEFT IA3"
    layouts = (Layout(MATRICES, {_ROLE: "rows columns"}), Layout((SlotKind.CONV,), {_ROLE: "1 numbers *1"}))
    options = name_options(is_feedforward=flag(False))
    is_scaled = False
    rank_axis = ""
    is_beside_bias = False

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return a problem of a vector that lies the wrong way round."""
        ones, expected = ("rows", "(1, in)") if self._is_feedforward(target) else ("columns", "(out, 1)")
        if target.slot is SlotKind.CONV or axes[ones] == 1:
            return []
        found = f"{_ROLE} {target.factors[_ROLE].shape}"
        return [Problem("LF203", target.name, found, f"{expected}, as is_feedforward says")]

    def changes(self, target: Target) -> tuple[Change, ...]:
        """Return the function of the weight, and that of the bias where outputs are multiplied."""
        numbers = target.factors[_ROLE].elements
        rest = (REST,) if target.slot is SlotKind.CONV else ()
        if self._is_feedforward(target):
            inner = UNKNOWN if target.slot is SlotKind.CONV else numbers  # Of a group there are fewer inputs.
            return (Change("weight", (UNKNOWN, inner, *rest), self.nature, (_ROLE,), target.slot),)
        weight = Change("weight", (numbers, UNKNOWN, *rest), self.nature, (_ROLE,), target.slot)
        own = SlotKind.PARAMETER
        return weight, Change("bias", (numbers,), self.nature, (_ROLE,), own, is_optional=True)

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of inputs that are no groups of the weight's."""
        numbers = target.factors[_ROLE].elements
        groups = numbers // change.shape[1]
        if not self._is_feedforward(target) or (groups * change.shape[1] == numbers and not change.shape[0] % groups):
            return []
        return [Problem("LF405", target.name, f"a weight of {change.shape}", f"{numbers} inputs, or groups of them")]

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> WeightMap:
        """Return the weight or the bias with its rows or columns multiplied."""
        numbers = factors[_ROLE].reshape(-1)
        shape = change.shape[0], math.prod(change.shape[1:])
        if change.parameter == "bias" or not self._is_feedforward(target):
            return ScaleMap(shape, numbers[:, None])
        kernel, groups = math.prod(change.shape[2:]), len(numbers) // change.shape[1]
        columns = np.arange(shape[1]) // kernel
        if groups == 1:
            return ScaleMap(shape, numbers[None, columns])
        beyond = (numbers - 1).reshape(groups, change.shape[1])
        return ElementwiseMap(GatheredDelta(beyond, np.arange(shape[0]) * groups // shape[0], columns))

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1: each number is computed from itself."""
        return 1

    def _is_feedforward(self, target: Target) -> bool:
        return bool(self.option(target, "is_feedforward"))


KIND: Final = Ia3()
