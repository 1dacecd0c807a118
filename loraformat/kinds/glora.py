"""GLoRA as PEFT has it: W∘(1 + A) + B, b∘(1 + D) + E + W·C (Chavan et al., arXiv 2306.07967).

A and B are each a product `Xd (out, rank)·Xu (rank, in)`, a number of every row `X (out, 1)`, one number `X (1)`, or
nothing, `zeros (out, in)`; D and E a number of every row `X (out)`, one number `X (1)`, or nothing.

C is a product `Xd (in, rank)·Xu (rank, 1)`, a number of every input `X (in, 1)`, or nothing; W is the base's own.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import BESIDE, UNKNOWN, BaseRows, Change, Delta, Nature
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._deltas import GatheredDelta, SumDelta
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.kinds._maps import ElementwiseMap
from loraformat.kinds._matrices import Values, scale_product
from loraformat.problems import Problem

_WEIGHT_ROLES: Final = {
    f"glora_{which}.{form}": axes.format(which)
    for which in "AB"
    for form, axes in (("Xd", "out rank{0}"), ("Xu", "rank{0} in"), ("X", "1|out 1"), ("zeros", "out in"))
}
_BIAS_ROLES: Final = {
    f"glora_{which}.{form}": axes for which in "DE" for form, axes in (("X", "1|out"), ("zeros", "out"))
}
_C_ROLES: Final = {"glora_C.Xd": "in rankC", "glora_C.Xu": "rankC 1", "glora_C.X": "in 1", "glora_C.zeros": "in 1"}


_ROWS: Final = 256


class Glora(FactoredKind):
    """The kind `glora`."""

    name = "glora"
    nature = Nature.FUNCTION_OF_BASE
    formula = "W∘(1 + A) + B, b∘(1 + D) + E + W·C"
    source = "arXiv 2306.07967; PEFT GLORA"
    layouts = (Layout(MATRICES, {}, {**_WEIGHT_ROLES, **_BIAS_ROLES, **_C_ROLES}),)
    is_scaled = False
    rank_axis = ""
    is_beside_bias = False

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return problems of halves, of two forms at once, and of C."""
        for which in "ABCDE":
            forms = {role.rpartition(".")[2] for role in target.factors if role.startswith(f"glora_{which}.")}
            missing = not forms and which in "AB"
            if missing or forms not in ({"Xd", "Xu"}, {"X"}, {"zeros"}, set()):
                found = f"glora_{which} as {', '.join(sorted(forms)) or 'nothing'}"
                return [Problem("LF201", target.name, found, f"glora_{which} as Xd and Xu, or X, or zeros")]
        return []

    def changes(self, target: Target) -> tuple[Change, ...]:
        """Return the function of the weight, and that of the bias where there is one."""
        axes = self.axes(target)
        out, inner = axes.sizes.get("out", UNKNOWN), axes.sizes.get("in", UNKNOWN)
        roles = {which: _roles_of(target.factors, which) for which in "ABCDE"}
        found = []
        if roles["A"] or roles["B"] or roles["C"]:
            found.append(Change("weight", (out, inner), self.nature, roles["A"] + roles["B"], target.slot))
        if roles["C"] or roles["D"] or roles["E"]:
            all_roles, beside = roles["C"] + roles["D"] + roles["E"], "weight" if roles["C"] else ""
            slot = SlotKind.PARAMETER
            found.append(Change("bias", (out,), self.nature, all_roles, slot, is_optional=not beside, beside=beside))
        return tuple(found)

    def map(self, target: Target, change: Change, factors: Mapping[str, Any]) -> ElementwiseMap:
        """Return the changed weight or bias."""
        shape = change.shape[0], change.shape[1] if len(change.shape) > 1 else 1
        if change.parameter == "weight":
            return ElementwiseMap(_make_path(factors, "A", shape), _make_path(factors, "B", shape))
        added = _make_path(factors, "E", shape)
        if BESIDE in factors:
            added = SumDelta((added, Values(_multiply(factors[BESIDE], factors))))
        return ElementwiseMap(_make_path(factors, "D", shape), added)

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1: each number is computed from itself."""
        return 1


def _roles_of(roles: Mapping[str, Any], which: str) -> tuple[str, ...]:
    """Return the roles of a path that is not missing."""
    return tuple(role for role in roles if role.startswith(f"glora_{which}.X"))


def _multiply(base: BaseRows, factors: Mapping[str, Any]) -> NDArray[Any]:
    """Return W·C `(out, 1)`, some rows at a time."""
    column = factors["glora_C.X"] if "glora_C.X" in factors else factors["glora_C.Xd"] @ factors["glora_C.Xu"]
    parts = [
        base.read_rows(start, min(start + _ROWS, base.shape[0])) @ column for start in range(0, base.shape[0], _ROWS)
    ]
    return np.concatenate(parts)


def _make_path(factors: Mapping[str, NDArray[Any]], which: str, shape: tuple[int, int]) -> Delta:
    """Return a path as a matrix of the weight's shape, or of the bias's `(out, 1)`."""
    if f"glora_{which}.Xd" in factors:
        return scale_product(factors[f"glora_{which}.Xd"], factors[f"glora_{which}.Xu"], 1.0)
    form = next((array.dtype for role, array in factors.items() if role != BESIDE), np.dtype(np.float32))
    numbers = factors.get(f"glora_{which}.X", np.zeros(1, form)).reshape(-1, 1)
    rows = np.arange(shape[0]) if len(numbers) > 1 else np.zeros(shape[0], np.intp)
    return GatheredDelta(numbers, rows, np.zeros(shape[1], np.intp))


KIND: Final = Glora()
