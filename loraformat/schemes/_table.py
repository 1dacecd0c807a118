"""The engine behind tables of names: a row says how a tensor of some role is called.

A row's pattern is the end of a key, after the target: `lora_A.weight`, or `lora_A.{adapter}.weight` where a name that
does not matter stands in between. The first row of a role is the one that is written.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """How one role is called.

    Attributes:
        pattern: the key after `<target>.`.
        kind: the adapter kind that such a tensor speaks for.
        role: the role, as the specification names it.
    """

    pattern: str
    kind: str
    role: str


@dataclass(frozen=True, slots=True)
class Name:
    """A key, read."""

    target: str
    row: Row


class NameTable:
    """Rows, compiled to one expression.

    Args:
        rows: tried in order.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)
        ends = "|".join(f"(?P<row{index}>{_compile(row.pattern)})" for index, row in enumerate(self.rows))
        self._expression = re.compile(rf"(?P<target>.+?)\.(?:{ends})", re.DOTALL)

    def read(self, key: str) -> Name | None:
        """Return what `key` says, or None when no row knows it."""
        match = self._expression.fullmatch(key)
        if match is None:
            return None
        found = next(index for index in range(len(self.rows)) if match[f"row{index}"] is not None)
        return Name(match["target"], self.rows[found])

    def write(self, target: str, role: str) -> str:
        """Return the key of `role` at `target`; raises KeyError for a role that the table lacks."""
        for row in self.rows:
            if row.role == role and "{" not in row.pattern:
                return f"{target}.{row.pattern}"
        raise KeyError(role)


def _compile(pattern: str) -> str:
    return "[^.]+".join(re.escape(part) for part in pattern.split("{adapter}"))
