"""Replacement: values that were trained as a whole and saved as they are.

PEFT's `modules_to_save` (a classifier on top of an adapted encoder), trained biases and norms. A role is the name of a
parameter of the module, such as `cls_token`. The merged parameter is the saved one; with a weight λ it lies between:
W + λ·(V − W).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from numpy.typing import NDArray

from loraformat.adapter import Factor, SlotKind, Target
from loraformat.kinds import FLOATS, Change, Delta, Nature, RoleSet, check_roles, refuse_options
from loraformat.kinds._streams import check_multiplier, make_values
from loraformat.problems import Problem

_AXES: Final = 8


class Replace:
    """The kind `replace`."""

    name = "replace"
    nature = Nature.REPLACEMENT
    formula = "W + λ·(V − W); V itself for λ = 1"
    source = "PEFT modules_to_save"
    role_sets = (RoleSet((SlotKind.PARAMETER,), (), ("weight", "bias")),)

    def check(self, target: Target) -> list[Problem]:
        """Return problems of slot, roles, rank, scaling, number forms and shapes."""
        named = tuple(role for role in target.factors if role.isascii() and role.isidentifier())
        role_sets = [replace(each, optional=(*each.optional, *named)) for each in self.role_sets]
        problems = [*refuse_options(target), *check_roles(target, role_sets)]
        if not target.factors:
            problems.append(Problem("LF201", target.name, "no tensors", "a weight, a bias, or both"))
        problems += check_multiplier(target)
        for role, factor in target.factors.items():
            where = f"{target.name}: {role}"
            if factor.dtype.name not in FLOATS:
                problems.append(Problem("LF210", where, factor.dtype.name, "a floating-point form"))
            if not 1 <= len(factor.shape) <= _AXES or not factor.elements:
                expected = f"one to {_AXES} axes, none of them empty"
                problems.append(Problem("LF203", where, f"shape {factor.shape}", expected))
        return problems

    def rank(self, factors: Mapping[str, Factor]) -> int:
        """Return 0: there is none."""
        return 0

    def changes(self, target: Target) -> tuple[Change, ...]:
        """Return every saved parameter."""
        return tuple(
            Change(role, factor.shape, Nature.REPLACEMENT, (role,), SlotKind.PARAMETER, streams=True)
            for role, factor in target.factors.items()
        )

    def value(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> Delta:
        """Return the saved values as a matrix: the first dimension and the rest."""
        return make_values(factors[change.parameter])


KIND: Final = Replace()
