"""Adapter kinds: one file each. A kind knows its roles, its shape law and how its factors change a weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

from numpy.typing import NDArray

from loraformat.adapter import Factor, SlotKind, Target
from loraformat.problems import Problem
from loraformat.registry import Registry

FLOATS: Final = frozenset({"float64", "float32", "float16", "bfloat16"}) | frozenset(
    {"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"}
)
"""Number forms that factors may have: whole numbers, exponents alone and forms below a byte are none of them."""


class Nature(StrEnum):
    """The three natures of change, which compose differently."""

    ADDITIVE = "additive"
    FUNCTION_OF_BASE = "function of the base"
    REPLACEMENT = "replacement"


class Delta(Protocol):
    """An additive change of a matrix, never formed whole.

    Attributes:
        shape: `(rows, columns)` of the matrix that it changes.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        ...

    def transposed(self) -> "Delta":
        """Return the change of the transposed matrix."""
        ...

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` of the change into `out: (stop - start, columns)` of a float form."""
        ...


@dataclass(frozen=True, slots=True)
class RoleSet:
    """The factors of one slot kind: role suffixes as they stand in files, `<target>.<role>`."""

    slots: tuple[SlotKind, ...]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


def check_roles(target: Target, role_sets: Sequence[RoleSet]) -> list[Problem]:
    """Return problems of a target's slot and of roles that it lacks or should not have."""
    roles = next((roles for roles in role_sets if target.slot in roles.slots), None)
    if roles is None:
        allowed = ", ".join(slot.value for roles in role_sets for slot in roles.slots)
        return [Problem("LF408", target.name, f"the slot {target.slot.value!r}", f"one of {allowed}")]
    unknown = sorted(set(target.factors) - {*roles.required, *roles.optional})
    missing = [role for role in roles.required if role not in target.factors]
    have = ", ".join(sorted(target.factors)) or "nothing"
    problems = [Problem("LF201", target.name, f"only {have}", f"{role} beside it") for role in missing]
    if unknown:
        expected = ", ".join((*roles.required, *roles.optional))
        problems.append(Problem("LF202", target.name, f"the roles {', '.join(unknown)}", expected))
    return problems


class Kind(Protocol):
    """What a file in this folder provides as `KIND`; one of the two below.

    Attributes:
        name: as in the manifest.
        nature: how it composes with others.
        formula: the merged weight, on one line.
        source: the paper or file that defines it.
        role_sets: which factors belong to which slot.
    """

    name: str
    nature: Nature
    formula: str
    source: str
    role_sets: Sequence[RoleSet]

    def check(self, target: Target) -> list[Problem]:
        """Return what is wrong with the target's factors, from names, shapes and number forms alone."""
        ...

    def rank(self, factors: Mapping[str, Factor]) -> int:
        """Return the rank that the factors have; 0 when they cannot tell."""
        ...

    def parameters(self, target: Target) -> Mapping[str, tuple[int, ...]]:
        """Return the module's parameters that the target changes (`weight`, `bias`), each with its canonical shape.

        The canonical shape of a weight is `(out, in, *kernel)`.
        """
        ...


class AdditiveKind(Kind, Protocol):
    """A kind whose change is added to the weight."""

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return the canonical shape of the weight that the target changes, `(out, in, *kernel)`."""
        ...

    def delta(self, target: Target, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change of the weight as a matrix `(out, in * kernel)`, from factors in float32 or wider."""
        ...

    def norm(self, target: Target, factors: Mapping[str, NDArray[Any]]) -> float:
        """Return the Frobenius norm of the change at the target's own scale, without forming it."""
        ...


class ReplacingKind(Kind, Protocol):
    """A kind that brings the values themselves."""

    def value(self, factors: Mapping[str, NDArray[Any]], parameter: str) -> Delta:
        """Return the new values of one parameter as a matrix: its first dimension and the rest."""
        ...


KINDS: Registry[Kind] = Registry("loraformat.kinds", "KIND")
