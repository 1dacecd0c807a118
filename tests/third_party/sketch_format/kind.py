"""Outer products: W + s·u vᵀ."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Factor, SlotKind, Target
from loraformat.kinds import FLOATS, Change, Nature, RoleSet, check_roles, refuse_options
from loraformat.problems import Problem


@dataclass(frozen=True, slots=True)
class OuterDelta:
    """u vᵀ, the scale folded in.

    Attributes:
        u: (rows,).
        v: (columns,).
    """

    u: NDArray[Any]
    v: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        return len(self.u), len(self.v)

    def transposed(self) -> "OuterDelta":
        """Return v uᵀ."""
        return OuterDelta(self.v, self.u)

    def part(self, rows: slice, columns: slice) -> "OuterDelta":
        """Return some of its rows and columns."""
        return OuterDelta(self.u[rows], self.v[columns])

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out`."""
        np.multiply.outer(self.u[start:stop], self.v, out=out)


class Outer:
    """The kind `outer`."""

    name = "outer"
    nature = Nature.ADDITIVE
    formula = "W + s·u vᵀ"
    source = "this file"
    role_sets = (RoleSet((SlotKind.LINEAR,), ("u", "v")),)

    def check(self, target: Target) -> list[Problem]:
        """Return problems of roles, rank, number forms and shapes."""
        problems = [*refuse_options(target), *check_roles(target, self.role_sets)]
        if not problems and target.rank != 1:
            problems.append(Problem("LF205", target.name, f"rank {target.rank} stated", "rank 1"))
        for role, factor in target.factors.items():
            if factor.dtype.name not in FLOATS:
                problems.append(Problem("LF210", f"{target.name}: {role}", factor.dtype.name, "a floating-point form"))
            if len(factor.shape) != 1:
                problems.append(Problem("LF203", f"{target.name}: {role}", f"shape {factor.shape}", "a vector"))
        return problems

    def rank(self, factors: Mapping[str, Factor]) -> int:
        """Return 1."""
        return 1

    def changes(self, target: Target) -> tuple[Change, ...]:
        """Return the change of the weight."""
        shape = target.factors["u"].elements, target.factors["v"].elements
        return (Change("weight", shape, Nature.ADDITIVE, ("u", "v"), target.slot),)

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> OuterDelta:
        """Return s·u vᵀ; the scale is folded into u in float64."""
        scaled = (factors["u"].astype(np.float64) * scale).astype(factors["u"].dtype)
        return OuterDelta(scaled, factors["v"])

    def norm(self, target: Target, factors: Mapping[str, NDArray[Any]]) -> float:
        """Return |s|·‖u‖·‖v‖."""
        return float(abs(target.scale) * np.linalg.norm(factors["u"]) * np.linalg.norm(factors["v"]))


KIND = Outer()
