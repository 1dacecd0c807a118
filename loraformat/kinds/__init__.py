"""Adapter kinds: one file each. A kind knows its roles, its shape law and how its factors change a weight."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol, runtime_checkable

from numpy.typing import NDArray

from loraformat.adapter import Factor, SlotKind, Target
from loraformat.problems import Problem
from loraformat.registry import Registry

FLOATS: Final = frozenset({"float64", "float32", "float16", "bfloat16"}) | frozenset(
    {"float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"}
)
"""Number forms that factors may have: whole numbers, exponents alone and forms below a byte are none of them."""


UNKNOWN: Final = -1
"""In a shape: a size that the factors do not tell; the base has it."""

REST: Final = -2
"""At the end of a shape: any number of axes (a kernel) that the factors do not tell."""


def fits_shape(shape: Sequence[int], pattern: Sequence[int]) -> bool:
    """Say whether a shape is as a pattern with sizes of `UNKNOWN`, or axes of `REST`, lets it be."""
    if pattern and pattern[-1] == REST:
        pattern = pattern[:-1]
        shape = shape[: len(pattern)]
    return len(shape) == len(pattern) and all(
        wanted in (size, UNKNOWN) for size, wanted in zip(shape, pattern, strict=True)
    )


class Nature(StrEnum):
    """The three natures of change, which compose differently."""

    ADDITIVE = "additive"
    FUNCTION_OF_BASE = "function of the base"
    REPLACEMENT = "replacement"


@dataclass(frozen=True, slots=True)
class Change:
    """What a target does to one parameter of its module.

    Attributes:
        parameter: the parameter: `weight`, `bias` ...
        shape: its canonical shape; of a weight `(out, in, *kernel)`, of anything in the slot `parameter` its own. What
            the factors do not tell is `UNKNOWN` or `REST` until the base has been found.
        nature: how it composes with other changes.
        roles: the factors that it is computed from.
        slot: what kind of slot the parameter is.
        streams: whether its factors are values of the parameter's own size. Those that can be read in parts are then
            handed over unread, as `PartialFactor`, in place of arrays.
        open: whether the parameter may have more rows than `shape`, which stay as they are.
        shared: whether it is meant for all tables that a model ties together, though only one is named.
        is_optional: whether a base without the parameter has nothing to change: a bias that is scaled with its weight.
        is_flat: whether it may as well be a kernel `(out, in, *kernel)`, since its factors only know the matrix.
        extent: `(out, in)`, each the largest of all weights that the adapter changes together with this one
            (`SizedTogether`); empty until all have been found.
        widens: whether a base's weight of fewer columns, which are inputs, is filled up with zeros to `shape` first.
        beside: another parameter of the module from whose base values it is computed as well; they come with the
            factors as `BESIDE`. Empty for none.
    """

    parameter: str
    shape: tuple[int, ...]
    nature: Nature
    roles: tuple[str, ...]
    slot: SlotKind
    streams: bool = False
    open: bool = False
    shared: bool = False
    is_optional: bool = False
    is_flat: bool = False
    extent: tuple[int, ...] = ()
    widens: bool = False
    beside: str = ""


BESIDE: Final = "base"
"""The role under which a kind is handed the base values of another parameter."""


class BaseRows(Protocol):
    """The base's values of a parameter as a matrix, `(out, in * kernel)` of a weight, some rows at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        ...

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows `start:stop`, `(stop - start, columns)` of a float form."""
        ...


class Delta(Protocol):
    """Values of the size of a matrix, never formed whole: an additive change, or what replaces the matrix.

    Attributes:
        shape: `(rows, columns)` of the matrix.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        ...

    def transposed(self) -> "Delta":
        """Return the values of the transposed matrix."""
        ...

    def part(self, rows: slice, columns: slice) -> "Delta":
        """Return some of its rows and columns; the slices have a start, a stop and a positive step."""
        ...

    def write_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Write rows `start:stop` into `out: (stop - start, columns)` of a float form, C-contiguous."""
        ...


class WeightMap(Protocol):
    """A function of a weight, computed tile by tile: W′ = f(W).

    Attributes:
        shape: `(rows, columns)` of the matrix.
        row_block: rows that it must see together: every tile starts at a multiple of it and holds whole blocks. 1 where
            each row is computed from itself alone, the number of rows where all are needed.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        ...

    @property
    def row_block(self) -> int:
        """Rows that it must see together."""
        ...

    def transposed(self) -> "WeightMap":
        """Return the same function of the transposed matrix."""
        ...

    def prepare(self, tiles: Iterable[tuple[int, NDArray[Any]]]) -> "WeightMap":
        """Return the map, ready to write rows; called once.

        Args:
            tiles: all rows of the base weight in order, each tile with the number of its first row; a tile's memory is
                reused for the next. Going through it costs a pass over the weight (a norm of columns needs one); a map
                that leaves it alone costs none.
        """
        ...

    def write_rows(self, start: int, stop: int, base: NDArray[Any], out: NDArray[Any]) -> None:
        """Write rows `start:stop` of f(W) into `out`, given these rows of W in `base`, of the same shape."""
        ...


@dataclass(frozen=True, slots=True)
class RoleSet:
    """The factors of one slot kind: role suffixes as they stand in files, `<target>.<role>`."""

    slots: tuple[SlotKind, ...]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


def refuse_options(target: Target) -> list[Problem]:
    """Return a problem for each option of a target whose kind has none."""
    return [Problem("LF120", target.name, f"the option {name!r}", "no options") for name in target.options]


_TABLE: Final = "base_layer.weight"
_MEND_TABLE: Final = (
    "PEFT saves the base's own table beside a changed one. If the vocabulary was not resized it is the same as in the "
    "base: save the adapter again with save_embedding_layers=False, or take the tensor out."
)


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
        mend = _MEND_TABLE if unknown == [_TABLE] else ""
        problems.append(Problem("LF202", target.name, f"the roles {', '.join(unknown)}", expected, mend))
    return problems


class Kind(Protocol):
    """What a file in this folder provides as `KIND`; one or more of the three below, as the natures of its changes say.

    Attributes:
        name: as in the manifest.
        nature: how its change of the weight composes with others.
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

    def changes(self, target: Target) -> tuple[Change, ...]:
        """Return what the target does to each parameter of its module; a parameter may be replaced and added to."""
        ...


class AdditiveKind(Kind, Protocol):
    """A kind with changes that are added."""

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return an additive change as a matrix `(out, in * kernel)`, from its factors in float32 or wider."""
        ...

    def norm(self, target: Target, factors: Mapping[str, NDArray[Any]]) -> float:
        """Return the Frobenius norm of the weight's change at the target's own scale, without forming it."""
        ...


class ReplacingKind(Kind, Protocol):
    """A kind that brings the values themselves."""

    def value(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> Delta:
        """Return the new values of one parameter as a matrix: its first dimension and the rest."""
        ...


class MappingKind(Kind, Protocol):
    """A kind whose merged weight is a function of the base weight."""

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> WeightMap:
        """Return f for the matrix `(out, in * kernel)`, at the target's own scale, from factors in float32 or wider."""
        ...

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return the `row_block` that the map, or the transposed map, will have; reads no factor."""
        ...


@runtime_checkable
class SizedByBase(Kind, Protocol):
    """A kind whose factors do not tell every size of the weight, and which can say whether those of a base will do."""

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return what is wrong with the shape of `change`, all of whose sizes are known by now; may read indices."""
        ...


@dataclass(frozen=True, slots=True)
class Sharing:
    """What a target shares with others of its adapter, and how many they are.

    Attributes:
        what: what it is; equal for all of them.
        targets: how many have it.
    """

    what: str
    targets: int


@runtime_checkable
class SizedTogether(Kind, Protocol):
    """A kind of which some numbers follow from the sizes of all weights that an adapter changes."""

    def sharing(self, target: Target) -> Sharing | None:
        """Return what follows from the sizes of several weights; None for a target that holds all its numbers."""
        ...

    def check_extent(self, target: Target, change: Change) -> list[Problem]:
        """Return what is wrong with the extent of `change`, which is known by now."""
        ...


KINDS: Registry[Kind] = Registry("loraformat.kinds", "KIND")
