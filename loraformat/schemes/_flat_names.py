"""What a flat name may be: a module of the base, one that tables have, or the end of one of the base's."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from loraformat.base_facts import BaseFacts
from loraformat.problems import Problem
from loraformat.spellings import Reading

_OTHER_BASE: Final = (
    "Give the base that has this module. To merge the rest alone, as into a transformer without its text encoder: "
    "--allow-unmatched PATTERN."
)


@dataclass(frozen=True, slots=True)
class FlatIndex:
    """The modules of a base, by what is left of their names when every dot is `_`.

    Attributes:
        by_whole: flat path to the modules that it may be.
        by_end: flat path to the modules of which it is an end; what stands before it holds no number.
    """

    by_whole: Mapping[str, Collection[str]]
    by_end: Mapping[str, Collection[str]]

    @classmethod
    def of(cls, modules: Collection[str]) -> Self:
        """Index modules."""
        whole: dict[str, set[str]] = defaultdict(set)
        ends: dict[str, set[str]] = defaultdict(set)
        for module in modules:
            whole[module.replace(".", "_")].add(module)
            first, dot, rest = module.partition(".")
            while dot and not first.isdecimal():
                ends[rest.replace(".", "_")].add(module)
                first, dot, rest = rest.partition(".")
        return cls(whole, ends)

    def list_options(self, path: str, readings: Sequence[Reading]) -> list[str]:
        """Return the dotted paths that a flat one may be, sorted: of the first source that has any."""
        return sorted(
            self.by_whole.get(path)
            or {one for reading in readings for one in _spell(reading, path)}
            or self.by_end.get(path, ())
        )


def _spell(reading: Reading, flat: str) -> set[str]:
    found = reading.table.find(flat, reading.spelling, flat=True)
    return {place.write(reading.spelling)[place.part] for place in found}


def refuse_flat(
    module: str, path: str, options: Sequence[str], readings: Sequence[Reading], facts: BaseFacts
) -> Problem:
    """Return the problem of a flat name that may be several modules, or none."""
    if options:
        return Problem("LF314", module, " or ".join(options), "one reading")
    best = readings[0] if readings else None
    closest = f"; closest: {best}" if best is not None and path in best.missed else ""
    if facts.modules:
        found = f"a flat name in no table, nor in {facts.source}{closest}"
        return Problem("LF314", module, found, "a module of the base", _OTHER_BASE)
    return Problem("LF314", module, f"a flat name in no table{closest}", "a name that a table has")
