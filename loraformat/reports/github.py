"""For GitHub Actions: a workflow command for each problem, which becomes a note on the file.

    ::error file=adapters/style.safetensors,title=LF101 file too short::...

What may stand in a command is set by the runner (actions/toolkit, packages/core/src/command.ts).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from loraformat.problems import Problem, Severity
from loraformat.reports import Setting
from loraformat.reports._words import locate, one_line

if TYPE_CHECKING:
    from loraformat.validation import Verdict

_COMMANDS: Final[Mapping[Severity, str]] = {"error": "error", "warning": "warning", "note": "notice"}
_IN_DATA: Final = {ord(character): f"%{ord(character):02X}" for character in "%\r\n"}
_IN_PROPERTY: Final = {ord(character): f"%{ord(character):02X}" for character in "%\r\n:,"}


def write(verdicts: "Sequence[Verdict]", setting: Setting) -> str:
    """Return one line for each problem."""
    return "".join(f"{line}\n" for verdict in verdicts for line in _commands(verdict, setting))


def _commands(verdict: "Verdict", setting: Setting) -> Iterator[str]:
    place, _ = locate(verdict.file or verdict.path, setting.root)
    file = one_line(place).translate(_IN_PROPERTY)
    for problem in verdict.problems:
        title = f"{problem.code} {problem.title}".translate(_IN_PROPERTY)
        yield f"::{_COMMANDS[problem.severity]} file={file},title={title}::{_message(problem).translate(_IN_DATA)}"


def _message(problem: Problem) -> str:
    """Return what the title does not say, in lines."""
    _, *rest = str(problem).split("\n")
    return "\n".join((one_line(problem.where), *(line.strip() for line in rest)))
