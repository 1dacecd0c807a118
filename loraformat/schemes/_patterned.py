"""Names that must be those of one spelling: a scheme that has its own names for modules cannot write others."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraformat.base_facts import BaseFacts
from loraformat.problems import Problem
from loraformat.schemes._naming import NamesRead, NamesWritten
from loraformat.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class PatternedNaming:
    """Targets are called as the scheme calls its modules.

    Attributes:
        expression: which names the scheme has.
        what: whose names they are.
        prefix: in front of every name in the file.
    """

    expression: str
    what: str
    prefix: str = ""

    def read(self, modules: Sequence[str], facts: BaseFacts) -> NamesRead:
        """Return the names without the prefix."""
        return NamesRead({module: module.removeprefix(self.prefix) for module in modules})

    def write(self, targets: Sequence[str], facts: BaseFacts, remembered: Mapping[str, JsonValue]) -> NamesWritten:
        """Return the names with the prefix; LF341 for one that the scheme does not have."""
        named = {target: f"{self.prefix}{target}" for target in targets if re.fullmatch(self.expression, target)}
        nameless = sorted(set(targets) - set(named))
        if not nameless:
            return NamesWritten(named)
        found = f"{len(nameless)} modules that have no name there, such as {nameless[0]}"
        expected = f"names that {self.what} has, by the tables of spec/names"
        return NamesWritten(named, [Problem("LF341", nameless[0], found, expected)])
