"""Printers of one list of verdicts, one file each: pure functions from verdicts to text.

A new format is a new module here with a function `write(verdicts, setting)`. Importing this is cheap, for `--help`
lists the formats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, TypeAlias, cast

from loraformat.problems import Severity

if TYPE_CHECKING:
    from loraformat.validation import Verdict


@dataclass(frozen=True, slots=True)
class Setting:
    """What a report needs to know beside the verdicts.

    Attributes:
        root: the folder that relative paths start from, absolute; reports name files below it relative to it.
        fail_on: the severity from which on a verdict counts as failed.
    """

    root: Path
    fail_on: Severity = "error"


Writer: TypeAlias = "Callable[[Sequence[Verdict], Setting], str]"


def list_formats() -> tuple[str, ...]:
    """Return the names of all formats, sorted, without importing any."""
    return tuple(sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_")))


def write_report(name: str, verdicts: "Sequence[Verdict]", setting: Setting) -> str:
    """Return the report of a format in `list_formats()`; the same verdicts give the same text."""
    writer = cast(Writer, import_module(f"{__name__}.{name}").write)
    return writer(verdicts, setting)


def summarise(verdicts: "Sequence[Verdict]") -> str:
    """Return one line that counts the verdicts by their gravest problem."""
    gravest = [verdict.severity for verdict in verdicts]
    errors, warnings = gravest.count("error"), gravest.count("warning")
    counts = ((len(gravest) - errors - warnings, "ok"), (errors, "with errors"), (warnings, "with warnings only"))
    told = ", ".join(f"{count} {what}" for count, what in counts if count)
    return f"{len(gravest)} checked: {told}" if gravest else "nothing checked"
