"""Dense differences: W + s·D, a change that was saved as a whole.

    diff      as the weight stands in PyTorch      `(out, in, *kernel)`
    diff_b    as the bias                          `(out)`
    w_norm, b_norm                                 weight and bias of a norm, `(dim)`

LyCORIS writes them for modules that were trained whole (`full`) and for norms (`norm`); extractors write `diff_b` for
biases that moved. Nothing has to be computed, so that the numbers stream from the file.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from loraformat.adapter import Factor, SlotKind, Target
from loraformat.kinds import FLOATS, Change, Delta, Nature, RoleSet, check_roles, refuse_options
from loraformat.kinds._streams import check_multiplier, make_values
from loraformat.problems import Problem

_PARAMETER_OF: Final = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}
_VECTORS: Final = frozenset({"diff_b", "b_norm"})
_AXES: Final = 8
_RUN_ROWS: Final = 1024


class Diff:
    """The kind `diff`."""

    name = "diff"
    nature = Nature.ADDITIVE
    formula = "W + s·D"
    source = "LyCORIS 4.1, modules full and norm"
    role_sets = (
        RoleSet((SlotKind.LINEAR, SlotKind.CONV), (), ("diff", "diff_b")),
        RoleSet((SlotKind.PARAMETER,), (), tuple(_PARAMETER_OF)),
    )

    def check(self, target: Target) -> list[Problem]:
        """Return problems of slot, roles, rank, scaling, number forms and shapes."""
        problems = [*refuse_options(target), *check_roles(target, self.role_sets)]
        if not target.factors:
            problems.append(Problem("LF201", target.name, "no tensors", "a difference of a weight, a bias, or both"))
        problems += check_multiplier(target)
        if problems:
            return problems
        for role, factor in target.factors.items():
            problems += _check_factor(f"{target.name}: {role}", role, factor, target.slot)
        return problems or _check_together(target)

    def rank(self, factors: Mapping[str, Factor]) -> int:
        """Return 0: there is none."""
        return 0

    def changes(self, target: Target) -> tuple[Change, ...]:
        """Return every parameter that has a difference; a weight is of the target's slot, the rest stands by itself."""
        slots = {"diff": target.slot}
        return tuple(
            Change(
                _PARAMETER_OF[role],
                factor.shape,
                Nature.ADDITIVE,
                (role,),
                slots.get(role, SlotKind.PARAMETER),
                streams=True,
            )
            for role, factor in target.factors.items()
        )

    def delta(self, target: Target, change: Change, factors: Mapping[str, Any], scale: float) -> Delta:
        """Return s·D as a matrix: its first dimension and the rest; s·d is rounded once."""
        return make_values(factors[change.roles[0]], scale)

    def norm(self, target: Target, factors: Mapping[str, Any]) -> float:
        """Return |s|·‖D‖ of the weight's difference; of the bias's where there is no other."""
        role = next(role for role in ("diff", "w_norm", "diff_b", "b_norm") if role in factors)
        values = make_values(factors[role])
        rows, columns = values.shape
        squared = 0.0
        for start in range(0, rows, _RUN_ROWS):
            part = np.empty((min(_RUN_ROWS, rows - start), columns))
            values.write_rows(start, start + len(part), part)
            squared += float(np.sum(part * part))
        return abs(target.scale) * math.sqrt(squared)


def _check_factor(where: str, role: str, factor: Factor, slot: SlotKind) -> list[Problem]:
    """Return problems of one difference alone."""
    if factor.dtype.name not in FLOATS:
        return [Problem("LF210", where, factor.dtype.name, "a floating-point form")]
    axes = {SlotKind.LINEAR: (2,), SlotKind.CONV: (3, 4, 5)}.get(slot, tuple(range(1, _AXES + 1)))
    allowed = (1,) if role in _VECTORS else axes
    if len(factor.shape) in allowed and factor.elements:
        return []
    counts = " or ".join(map(str, allowed)) if len(allowed) < _AXES else f"one to {_AXES}"
    return [Problem("LF203", where, f"shape {factor.shape}", f"{counts} axes, none of them empty")]


def _check_together(target: Target) -> list[Problem]:
    """Return a problem for two differences of one parameter, or of a weight and a bias that are not of one module."""
    parameters = [_PARAMETER_OF[role] for role in target.factors]
    if len(set(parameters)) < len(parameters):
        found = f"{', '.join(target.factors)}: two differences of one parameter"
        return [Problem("LF203", target.name, found, "one of each")]
    lengths = {factor.shape[0] for factor in target.factors.values()}
    if len(lengths) > 1:
        shapes = ", ".join(f"{role} {factor.shape}" for role, factor in target.factors.items())
        return [Problem("LF203", target.name, shapes, "one first dimension")]
    return []


KIND: Final = Diff()
