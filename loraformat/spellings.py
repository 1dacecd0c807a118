"""The tables of `spec/names/`: how the modules of one architecture are called in each spelling.

A table is about one component (a UNet, a transformer, a text encoder). A row is one module, or one weight that a
spelling has fused and another in parts. The paths are patterns: `{i}` stands for a number.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loraformat.strict_json import parse_json_object

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_HOLE: Final = re.compile(r"\{(\w+)\}")
_DIGITS: Final = 9
"""A number of a block has no more; a text of more is none, and may be too long to be read as one."""
_NUMBER: Final = re.compile(r"(?<![^._])\d+(?![^._])")
"""A whole part of a path that is a number."""


@dataclass(frozen=True, slots=True)
class Order:
    """How the rows of a module are ordered in one spelling, as against the table's first.

    Attributes:
        rule: a name that the engine knows, such as `halves-swapped` or `rotary-interleaved`.
        heads: which count of the base says how many heads the rows are of, where the rule asks for it.
    """

    rule: str
    heads: str = ""


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One row of a table.

    Attributes:
        paths: spelling to the patterns of its modules: one, or several parts of a weight that is one elsewhere.
        shares: how the rows of the fused weight are divided among the parts: proportions, or counts of the base.
        orders: spelling to the order of the rows of each of its modules, where it is another.
        parameters: what a spelling calls the parameter that is elsewhere `weight`.
        aspect: how many rows the whole weight has for how many columns; empty where the table does not say.
    """

    paths: Mapping[str, tuple[str, ...]]
    shares: tuple[int | str, ...]
    orders: Mapping[str, tuple[Order | None, ...]]
    parameters: Mapping[str, str]
    aspect: tuple[int, ...] = ()

    def order(self, spelling: str | None, part: int) -> Order | None:
        """Return the order of a part's rows in a spelling, None for that of the table's first."""
        orders = self.orders.get(spelling or "", ())
        return orders[part] if part < len(orders) else None


@dataclass(frozen=True, slots=True)
class Place:
    """A module, found in a table.

    Attributes:
        row: its row.
        part: which of the row's parts it is.
        numbers: what stands for the holes.
    """

    row: ModuleRow
    part: int
    numbers: tuple[tuple[str, str], ...]

    def write(self, spelling: str) -> tuple[str, ...]:
        """Return the paths of the whole row in a spelling."""
        return tuple(pattern.format(**dict(self.numbers)) for pattern in self.row.paths[spelling])


@dataclass(frozen=True, slots=True)
class SchemeNames:
    """How a scheme calls the components of a model, and in which spelling it names their modules.

    Attributes:
        spelling: of this table's own component.
        prefixes: the scheme's prefix to the component that it stands for, the one to write first.
        also: other spellings that it takes as they are.
    """

    spelling: str
    prefixes: Mapping[str, str]
    also: tuple[str, ...] = ()


class SpellingTable:
    """One table.

    Args:
        fields: the JSON object of its file.

    Attributes:
        name: its file name without the suffix.
        title: for people.
        components: the components that it may be, the usual one first (`transformer`, `text_encoder_2`).
        spellings: the first is the one that orders are told against.
        widths: sizes that only this architecture has among those with the same names.
        inputs: all numbers of inputs that its modules have, where every published model has the same.
        depths: beginnings of paths, before a number, to how many blocks the largest model has there.
        classes: what configurations call it.
        schemes: how schemes call its components.
        architectures: model types to what GGUF calls the architecture.
        asks_base: whether its names are read so only for a base of one of its classes, since other models have them
            too.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.name: str = fields["table"]
        self.title: str = fields["title"]
        self.components: tuple[str, ...] = tuple(fields["components"])
        self.spellings: tuple[str, ...] = tuple(fields["spellings"])
        self.widths: frozenset[int] = frozenset(fields.get("widths", ()))
        self.inputs: frozenset[int] = frozenset(fields.get("inputs", ()))
        self.depths: Mapping[str, int] = fields.get("depths", {})
        self.classes: frozenset[str] = frozenset(fields.get("classes", ()))
        self.schemes: Mapping[str, SchemeNames] = {
            name: SchemeNames(each["spelling"], each.get("prefixes", {}), tuple(each.get("also", ())))
            for name, each in fields.get("schemes", {}).items()
        }
        self.architectures: Mapping[str, str] = fields.get("architectures", {})
        self.asks_base: bool = fields.get("asks_base", False)
        self.rows: tuple[ModuleRow, ...] = tuple(_read_row(row) for row in fields["modules"])

    @cached_property
    def _index(self) -> Mapping[tuple[str, bool, str], Sequence[tuple[ModuleRow, int, str, int | None]]]:
        """Spelling, whether flat, and path with `#` for numbers, to the rows that may fit.

        Each with its pattern, and how many blocks there are of its first hole.
        """
        index: dict[tuple[str, bool, str], list[tuple[ModuleRow, int, str, int | None]]] = {}
        for row in self.rows:
            for spelling, patterns in row.paths.items():
                for part, pattern in enumerate(patterns):
                    depth = self.depths.get(pattern.partition(".{")[0])
                    for flat in (False, True):
                        text = pattern.replace(".", "_") if flat else pattern
                        skeleton = _NUMBER.sub("#", _HOLE.sub("0", text))
                        index.setdefault((spelling, flat, skeleton), []).append((row, part, text, depth))
        return index

    def find(self, path: str, spelling: str, *, flat: bool = False) -> list[Place]:
        """Return the places that a path may mean in a spelling; `flat` takes `_` for every dot."""
        return self._find(path, _NUMBER.sub("#", path), spelling, flat)

    def find_missing(self, paths: Mapping[str, Sequence[str]], spelling: str, *, flat: bool = False) -> list[str]:
        """Return the paths that a spelling does not have; `paths` has them by what they are with `#` for numbers."""
        missed: list[str] = []
        for skeleton, group in paths.items():  # Far fewer than paths, and most tables have none of them.
            known = (spelling, flat, skeleton) in self._index
            missed += [path for path in group if not known or not self._find(path, skeleton, spelling, flat)]
        return missed

    def _find(self, path: str, skeleton: str, spelling: str, flat: bool) -> list[Place]:
        found = []
        for row, part, pattern, depth in self._index.get((spelling, flat, skeleton), ()):
            match = _compile(pattern).fullmatch(path)
            if match is not None and (depth is None or _is_below(match[1], depth)):
                found.append(Place(row, part, tuple(sorted(match.groupdict().items()))))
        return found


@dataclass(frozen=True, slots=True)
class Reading:
    """A table in a spelling, as the reading of the names of one component.

    Attributes:
        table: the table.
        spelling: which of its spellings.
        missed: names that it does not know.
        total: how many there were.
    """

    table: SpellingTable
    spelling: str
    missed: tuple[str, ...]
    total: int

    def __str__(self) -> str:
        """Return the evidence in words."""
        known = self.total - len(self.missed)
        return f"{known} of {self.total} names are those of {self.table.title} ({self.spelling})"


def read_names(paths: Iterable[str], *, flat: bool = False, architecture: str = "") -> list[Reading]:
    """Return every table and spelling that knows some of the paths, those that know most first.

    Args:
        paths: names of modules in one component.
        flat: whether `_` stands for every dot.
        architecture: what the base calls itself, for tables that are of use only then.
    """
    distinct = set(paths)
    listed: dict[str, list[str]] = {}
    for path in distinct:
        listed.setdefault(_NUMBER.sub("#", path), []).append(path)
    readings = []
    for table in all_tables():
        if table.asks_base and architecture not in table.classes:
            continue
        for spelling in table.spellings:
            missed = table.find_missing(listed, spelling, flat=flat)
            if len(missed) < len(distinct):
                readings.append(Reading(table, spelling, tuple(sorted(missed)), len(distinct)))
    return sorted(readings, key=lambda reading: (len(reading.missed), reading.table.name, reading.spelling))


@cache
def all_tables() -> tuple[SpellingTable, ...]:
    """Return every table, by name."""
    return tuple(
        SpellingTable(parse_json_object(entry.read_bytes(), entry.name))
        for entry in sorted(_folder().iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".json")
    )


def read_order_file(name: str) -> Mapping[str, Any]:
    """Return one of the files of `spec/names/orders`, for schemes that number modules instead of naming them."""
    entry = _folder() / "orders" / f"{name}.json"
    return parse_json_object(entry.read_bytes(), entry.name)


def read_renames_file(name: str) -> Mapping[str, Any]:
    """Return one of the files of `spec/names/renames`: what a library calls the tensors of its checkpoints."""
    entry = _folder() / "renames" / f"{name}.json"
    return parse_json_object(entry.read_bytes(), entry.name)


def _folder() -> "Traversable":
    """Return the packaged tables, or the checkout's own when the package runs from source."""
    from importlib.resources import files

    packaged = files("loraformat") / "_spec" / "names"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "spec" / "names"


def _read_row(fields: Mapping[str, Any]) -> ModuleRow:
    paths = {
        spelling: (value,) if isinstance(value, str) else tuple(value) for spelling, value in fields["paths"].items()
    }
    orders = {
        spelling: tuple(map(_read_order, each if isinstance(each, list) else [each]))
        for spelling, each in fields.get("orders", {}).items()
    }
    return ModuleRow(
        paths,
        tuple(fields.get("shares", ())),
        orders,
        fields.get("parameters", {}),
        tuple(fields.get("aspect", ())),
    )


def _read_order(fields: Mapping[str, Any] | None) -> Order | None:
    return Order(fields["rule"], fields.get("heads", "")) if fields else None


def _is_below(number: str, depth: int) -> bool:
    return len(number) <= _DIGITS and int(number) < depth


@cache
def _compile(pattern: str) -> re.Pattern[str]:
    """Return the expression of a pattern; a hole that stands twice must be the same number."""
    parts: list[str] = []
    seen: set[str] = set()
    end = 0
    for hole in _HOLE.finditer(pattern):
        name = hole[1]
        parts += [re.escape(pattern[end : hole.start()]), rf"(?P={name})" if name in seen else rf"(?P<{name}>\d+)"]
        seen.add(name)
        end = hole.end()
    return re.compile("".join(parts) + re.escape(pattern[end:]))
