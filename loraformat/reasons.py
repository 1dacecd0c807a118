"""The one list of reason codes, read from `spec/reasons.toml`.

Errors, `--json`, `loraformat explain CODE` and the documentation all speak from this list. It is read only when
something has to be said.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

EXIT_FINDING: Final = 1
EXIT_INPUT: Final = 3
EXIT_REFUSED: Final = 4
EXIT_OUTPUT: Final = 5
EXIT_BUG: Final = 70


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason code.

    Attributes:
        code: `LF` and three digits; the first says what it is about (1 container, 2 adapter, 3 names, 4 match,
            5 numbers, 6 output, 7 algebra, 9 safety).
        title: what it means, in a few words.
        exit: the exit code of a command that ends for this reason.
        mend: how to mend it.
        since: the version of the specification that introduced it.
    """

    code: str
    title: str
    exit: int
    mend: str
    since: str


@cache
def all_reasons() -> dict[str, Reason]:
    """Return every reason code, in ascending order."""
    import tomllib

    table = tomllib.loads(_source().read_text(encoding="utf-8"))
    return {code: Reason(code=code, **fields) for code, fields in sorted(table.items())}


def find_reason(code: str) -> Reason:
    """Return the reason behind `code`; raises KeyError for a code that the list lacks."""
    return all_reasons()[code]


def _source() -> "Traversable":
    """Return the packaged list, or the checkout's own when the package runs from source."""
    from importlib.resources import files

    packaged = files("loraformat") / "_spec" / "reasons.toml"
    return packaged if packaged.is_file() else Path(__file__).parent.parent / "spec" / "reasons.toml"
