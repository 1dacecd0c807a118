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
        result = NamesWritten()
        for target in targets:
            if re.fullmatch(self.expression, target):
                result.modules[target] = f"{self.prefix}{target}"
            else:
                expected = f"a name that {self.what} has, by the tables of spec/names"
                result.problems.append(Problem("LF341", target, "a module that has no name there", expected))
        return result
