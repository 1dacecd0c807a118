"""The engine behind tables of names: a row says how a tensor of some role is called, in both directions.

A row's pattern is the end of a key, after the module: `lora_A.weight`, or `lora_A.{adapter}.weight` where a name that
does not matter stands in between. The first row of a role is the one that is written. Rows of one pattern are told
apart by the tensor's shape.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from loraformat.adapter import Factor
from loraformat.derived import derive


@dataclass(frozen=True, slots=True)
class Turn:
    """How a stored tensor becomes the factor that the specification wants, and back.

    Attributes:
        read: from the stored form.
        write: to the stored form.
    """

    read: Callable[[Factor], Factor]
    write: Callable[[Factor], Factor]


def _leave(factor: Factor) -> Factor:
    return factor


def _transpose(factor: Factor) -> Factor:
    from loraformat.operations import Transpose  # here and below: most files are read without any

    return derive(Transpose(), factor)


def _column_to_vector(factor: Factor) -> Factor:
    from loraformat.operations import Reshape

    out, *ones = factor.shape
    return derive(Reshape((1, out, *ones[1:]) if ones[1:] else (out,)), factor)


def _vector_to_column(factor: Factor) -> Factor:
    from loraformat.operations import Reshape

    ones = factor.shape[2:]
    return derive(Reshape((factor.elements, 1, *ones)), factor)


AS_IT_IS: Final = Turn(_leave, _leave)
TRANSPOSED: Final = Turn(_transpose, _transpose)
COLUMN: Final = Turn(_column_to_vector, _vector_to_column)
"""`(out, 1)` for a vector `(out,)`, and `(out, 1, 1, 1)` for PEFT's `(1, out, 1, 1)` of a convolution."""


@dataclass(frozen=True, slots=True)
class Row:
    """How one role is called.

    Attributes:
        pattern: the key after `<module>.`.
        kind: the adapter kind that such a tensor speaks for; empty for a tensor that speaks for none, such as an alpha.
        role: the role, as the specification names it.
        turn: how it is stored.
        fits: which tensors of this name it is about; None for all.
    """

    pattern: str
    kind: str
    role: str
    turn: Turn = AS_IT_IS
    fits: Callable[[Factor], bool] | None = None


@dataclass(frozen=True, slots=True)
class Name:
    """A key, read."""

    target: str
    row: Row


class NameTable:
    """Rows, compiled to one expression when a key is read: most tables that are imported are for other files.

    Args:
        rows: tried in order.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        ends = "|".join(f"(?P<row{index}>{_compile(row.pattern)})" for index, row in enumerate(self.rows))
        return re.compile(rf"(?P<target>.+?)\.(?:{ends})", re.DOTALL)

    def read(self, key: str, factor: Factor | None = None) -> Name | None:
        """Return what `key` says, or None when no row knows it; the factor decides between rows of one pattern."""
        match = self._expression.fullmatch(key)
        if match is None:
            return None
        found = next(row for index, row in enumerate(self.rows) if match[f"row{index}"] is not None)
        rivals = (row for row in self.rows if row.pattern == found.pattern)
        fitting = (row for row in rivals if row.fits is None or (factor is not None and row.fits(factor)))
        row = next(fitting, None)
        return Name(match["target"], row) if row is not None else None

    def find(self, role: str, kind: str = "") -> Row | None:
        """Return the row by which a role is written, first that of the kind; None for a role that the table lacks."""
        rows = [row for row in self.rows if row.role == role and "{" not in row.pattern]
        return next((row for row in rows if row.kind == kind), rows[0] if rows else None)

    def write(self, target: str, role: str) -> str:
        """Return the key of `role` at `target`; raises KeyError for a role that the table lacks."""
        row = self.find(role)
        if row is None:
            raise KeyError(role)
        return f"{target}.{row.pattern}"


def _compile(pattern: str) -> str:
    return "[^.]+".join(re.escape(part) for part in pattern.split("{adapter}"))
