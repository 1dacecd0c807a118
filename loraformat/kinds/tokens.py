"""Trained tokens: some rows of a table, replaced (PEFT's `trainable_token_indices` and TRAINABLE_TOKENS).

    W′[i] = V[k] for the k-th trained token i; all other rows stay as they are.

PEFT calls the rows a delta, and puts them in the table's place. Which tokens they are stands in the target's options:
`{"token_indices": [32000, 32001]}`. Tables that a model ties together get the rows alike. A table that was saved whole
beside the rows (a vocabulary that had grown) replaces the base's before.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds import FLOATS, Change, Delta, Nature, RoleSet, WeightMap, check_roles
from loraformat.kinds._matrices import Values
from loraformat.problems import Problem

INDICES: Final = "token_indices"
_ROWS: Final = "trainable_tokens_delta"
_TABLE: Final = "base_layer.weight"


@dataclass(frozen=True, slots=True)
class PutRows:
    """The map that puts given values in the place of some rows, or of some columns.

    Attributes:
        shape: `(rows, columns)` of the matrix.
        lines: the number of each row, or column.
        values: its numbers, `(lines, columns)` or `(lines, rows)`.
        sideways: whether columns are replaced.
    """

    shape: tuple[int, int]
    lines: NDArray[np.int64]
    values: NDArray[Any]
    sideways: bool = False

    @property
    def row_block(self) -> int:
        """1: each row is made from itself alone."""
        return 1

    def transposed(self) -> "PutRows":
        """Return the same function of the transposed matrix."""
        return PutRows(self.shape[::-1], self.lines, self.values, not self.sideways)

    def prepare(self, tiles: Iterable[tuple[int, NDArray[Any]]]) -> "PutRows":
        """Return the map itself: it needs nothing of the base."""
        return self

    def write_rows(self, start: int, stop: int, base: NDArray[Any], out: NDArray[Any]) -> None:
        """Write rows `start:stop`, given those of the base."""
        np.copyto(out, base)
        if self.sideways:
            out[:, self.lines] = self.values[:, start:stop].T
            return
        inside = (self.lines >= start) & (self.lines < stop)
        out[self.lines[inside] - start] = self.values[inside]


class Tokens:
    """The kind `tokens`."""

    name = "tokens"
    nature = Nature.FUNCTION_OF_BASE
    formula = "W with the rows V in the place of the tokens' own"
    source = "PEFT trainable_token_indices"
    role_sets = (RoleSet((SlotKind.PARAMETER,), (_ROWS,), (_TABLE,)),)

    def check(self, target: Target) -> list[Problem]:
        """Return problems of slot, roles, rank, scale, number forms, shapes and indices."""
        problems = check_roles(target, self.role_sets)
        if problems:
            return problems
        problems = [
            Problem("LF210", f"{target.name}: {role}", factor.dtype.name, "a floating-point form")
            for role, factor in target.factors.items()
            if factor.dtype.name not in FLOATS
        ]
        if target.rank:
            problems.append(Problem("LF205", target.name, f"rank {target.rank} stated", "rank 0: rows have none"))
        if target.scaling != Scaling(ScalingRule.MULTIPLIER, 1.0):
            found = f"{target.scaling.rule.value!r} of {target.scaling.value:g}"
            problems.append(Problem("LF122", target.name, found, "a multiplier of 1: rows have no scale"))
        return problems or _check_rows(target)

    def rank(self, factors: Mapping[str, Factor]) -> int:
        """Return 0: there is none."""
        return 0

    def changes(self, target: Target) -> tuple[Change, ...]:
        """Return the change of the table, or its replacement where it was saved whole."""
        table = target.factors.get(_TABLE)
        if table is not None:
            return (Change("weight", table.shape, Nature.REPLACEMENT, (_TABLE, _ROWS), SlotKind.PARAMETER),)
        shape = (max(_read_indices(target)) + 1, *target.factors[_ROWS].shape[1:])
        roles = (_ROWS,)
        return (Change("weight", shape, self.nature, roles, SlotKind.PARAMETER, open=True, shared=True),)

    def value(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> Delta:
        """Return the saved table with the trained rows in their places."""
        table = np.array(factors[_TABLE], order="C")
        table[list(_read_indices(target))] = factors[_ROWS]
        return Values(table)

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> WeightMap:
        """Return the map of the table's rows up to the last trained one."""
        lines = np.array(_read_indices(target), np.int64)
        return PutRows((change.shape[0], change.shape[1]), lines, np.ascontiguousarray(factors[_ROWS]))

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1: each row is made from itself alone."""
        return 1


def _read_indices(target: Target) -> tuple[int, ...]:
    """Return the tokens of the rows; empty where they are not stated as they should be."""
    stated = target.options.get(INDICES)
    if not isinstance(stated, list | tuple):
        return ()
    whole = [index for index in stated if isinstance(index, int) and not isinstance(index, bool) and index >= 0]
    return tuple(whole) if len(whole) == len(stated) else ()


def _check_rows(target: Target) -> list[Problem]:
    rows, table = target.factors[_ROWS], target.factors.get(_TABLE)
    if len(rows.shape) != 2 or not rows.elements:
        return [Problem("LF203", f"{target.name}: {_ROWS}", f"shape {rows.shape}", "(tokens, dim), not empty")]
    indices = _read_indices(target)
    if len(indices) != rows.shape[0] or len(set(indices)) != len(indices):
        found = f"{INDICES} {target.options.get(INDICES)!r:.80} for {rows.shape[0]} rows"
        return [Problem("LF227", target.name, found, "one number for each row, none twice")]
    if table is not None and (len(table.shape) != 2 or table.shape[1] != rows.shape[1]):
        return [Problem("LF203", f"{target.name}: {_TABLE}", f"shape {table.shape}", f"(tokens, {rows.shape[1]})")]
    if table is not None and max(indices) >= table.shape[0]:
        return [Problem("LF227", target.name, f"the token {max(indices)}", f"tokens of a table of {table.shape[0]}")]
    return []


KIND: Final = Tokens()
