"""Where words go: results on stdout, everything else on stderr.

rich is imported for the bar, and for a table that is wider than the terminal.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO, get_args

import click

if TYPE_CHECKING:
    from rich.console import Console

    from loraformat.problems import Problem
    from loraformat_cli.bar import ByteBar

ColourMode = Literal["auto", "always", "never"]
COLOUR_MODES: Final[tuple[str, ...]] = get_args(ColourMode)
Stream = Literal["stdout", "stderr"]
_FOLDED_ROWS: Final = 1000
"""rich takes a second for so many; lines of longer tables are left to the terminal to break."""
_IN_FULL: Final = 6
"""Problems of one code that are printed whole; more say the same again."""
RIGHT: Final = ">"
"""A heading that starts with it stands over a column that is set to the right."""
_SEVERITY_STYLES: Final = {"error": "red", "warning": "yellow", "note": "cyan"}


@dataclass(slots=True)
class Screen:
    """What the user wants to see, and the ways to show it.

    Attributes:
        json: exactly one JSON object on stdout.
        quiet: results and errors only.
        verbose: say more.
        color: when to use colours.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    color: ColourMode = "auto"

    def line(self, text: str = "") -> None:
        """Print one line of the result."""
        click.echo(text)

    def path(self, path: str | Path) -> None:
        """Print a path as the result: its exact bytes for a program, harmless ones for a terminal."""
        click.echo(plain(path) if sys.stdout.isatty() else os.fsencode(path))

    def document(self, value: Mapping[str, Any]) -> None:
        """Print the one JSON object."""
        click.echo(json.dumps(_strict(value), indent=2, allow_nan=False))

    def note(self, text: str) -> None:
        """Say something beside the result."""
        if not self.quiet:
            self._say(text)

    def problem(self, problem: "Problem") -> None:
        """Print a problem on stderr; warnings and notes are left out when quiet."""
        if problem.severity == "error" or not self.quiet:
            self._say(str(problem), problem.severity)

    def problems(self, problems: "Sequence[Problem]") -> None:
        """Print problems; of many with one code the first few in full, and the rest by what they are about."""
        counts: dict[str, int] = {}
        rest: dict[str, list[str]] = {}
        for problem in problems:
            counts[problem.code] = counts.get(problem.code, 0) + 1
            if counts[problem.code] <= _IN_FULL or self.verbose:
                self.problem(problem)
            else:
                rest.setdefault(problem.code, []).append(problem.where)
        for code, places in rest.items():
            self._say(plain(f"{code} also: {', '.join(places)}"), "error")

    def error_line(self, text: str) -> None:
        """Print, on one line, an error that has no reason code."""
        self._say(plain(text))

    def _say(self, text: str, severity: str = "") -> None:
        coloured = self._coloured(sys.stderr)
        label = click.style(f"{severity}:", fg=_SEVERITY_STYLES[severity], bold=True) + " " if severity else ""
        with suppress(OSError):  # a closed stderr does not change how a run ends
            click.echo(label + text, err=True, color=coloured)

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[object]], to: Stream = "stdout") -> None:
        """Print rows in columns; long cells are folded on a terminal only, for grep lines are never broken."""
        if to == "stderr" and self.quiet:
            return
        stream = sys.stdout if to == "stdout" else sys.stderr
        coloured = self._coloured(stream)
        cells = [[plain(cell) for cell in row] for row in rows]
        lines = align(headings, cells, bold=coloured)
        from shutil import get_terminal_size  # here: it imports every compressor

        widest = max(len(click.unstyle(line)) for line in lines) if lines else 0
        if stream.isatty() and len(cells) <= _FOLDED_ROWS and widest > get_terminal_size().columns:
            lines = self._fold(headings, cells, stream)
        with suppress(OSError) if to == "stderr" else nullcontext():
            click.echo("\n".join(lines), err=to == "stderr", color=coloured)

    def _fold(self, headings: Sequence[str], cells: Sequence[Sequence[str]], stream: TextIO) -> list[str]:
        """Return the table's lines with long cells folded, so that it fits the terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=any(headings), pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for heading in headings:
            justify: Literal["left", "right"] = "right" if heading.startswith(RIGHT) else "left"
            table.add_column(heading.removeprefix(RIGHT), justify=justify, overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        console = self._console(stream)
        with console.capture() as captured:
            console.print(table)
        return captured.get().splitlines()

    @contextmanager
    def progress(self, verb: str) -> Iterator["ByteBar | None"]:
        """Show a bar of bytes on stderr while the block runs, where somebody can see it move."""
        if self.quiet or self.json or not _can_redraw(sys.stderr):
            yield None
            return
        from loraformat_cli.bar import ByteBar

        with ByteBar(self._console(sys.stderr), verb) as bar:
            yield bar

    def _console(self, stream: TextIO) -> "Console":
        from rich.console import Console

        coloured = self._coloured(stream)
        return Console(
            file=stream,
            force_terminal=coloured or None,
            color_system="standard" if coloured else None,
            no_color=not coloured,
            markup=False,
            emoji=False,
            highlight=False,
        )

    def _coloured(self, stream: TextIO) -> bool:
        """Return whether to use colours on `stream`; an explicit --color wins over the environment."""
        decided: tuple[tuple[Callable[[], bool], bool], ...] = (
            (lambda: self.color == "always", True),
            (lambda: self.color == "never", False),
            (lambda: bool(os.environ.get("NO_COLOR")), False),
            (lambda: os.environ.get("FORCE_COLOR", "0") not in ("", "0"), True),
            (lambda: not _can_redraw(stream), False),
        )
        return next((answer for holds, answer in decided if holds()), True)


def _can_redraw(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal that knows control sequences."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def align(headings: Sequence[str], rows: Sequence[Sequence[str]], *, bold: bool) -> list[str]:
    """Return lines in columns, headings first unless all are empty."""
    titles = [heading.removeprefix(RIGHT) for heading in headings]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    sides = [str.rjust if heading.startswith(RIGHT) else str.ljust for heading in headings]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(side(cell, width) for side, cell, width in zip(sides, cells, widths, strict=True)).rstrip()

    head = [click.style(line(titles), bold=True) if bold else line(titles)] if any(titles) else []
    return head + [line(row) for row in rows]


def plain(value: object) -> str:
    """Return `value` as text on one line that cannot drive a terminal."""
    from loraformat.problems import escape_controls

    return escape_controls(str(value)).replace("\n", "\\n")


def _strict(value: Any) -> Any:
    """Return `value` as JSON can hold it: NaN and infinity, which JSON lacks, as null."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
