"""Where words go: results on stdout, everything else on stderr. rich is imported when a table or a bar is shown."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
_UNWRAPPED: Final = 100_000
"""Columns of a screen that is no terminal: lines are for grep then, never broken."""
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

    def error_line(self, text: str) -> None:
        """Print, on one line, an error that has no reason code."""
        self._say(plain(text))

    def _say(self, text: str, severity: str = "") -> None:
        coloured = self._coloured(sys.stderr)
        label = click.style(f"{severity}:", fg=_SEVERITY_STYLES[severity], bold=True) + " " if severity else ""
        with suppress(OSError):  # a closed stderr does not change how a run ends
            click.echo(label + text, err=True, color=coloured)

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[object]], to: Stream = "stdout") -> None:
        """Print rows in columns; headings that start with `>` are set to the right."""
        if to == "stderr" and self.quiet:
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=any(headings), pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for heading in headings:
            right = heading.startswith(">")
            table.add_column(heading.removeprefix(">"), justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(plain(cell)) for cell in row))
        self._print(table, to)

    def _print(self, renderable: object, to: Stream) -> None:
        """Print through rich into text first, so that one write reports a full disk or a closed pipe."""
        console = self._console(sys.stdout if to == "stdout" else sys.stderr)
        with console.capture() as captured:
            console.print(renderable)
        lines = "\n".join(line.rstrip() for line in captured.get().splitlines())
        if to == "stdout":
            click.echo(lines, color=self._coloured(sys.stdout))
        else:
            with suppress(OSError):
                click.echo(lines, err=True, color=self._coloured(sys.stderr))

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
            width=None if stream.isatty() else _UNWRAPPED,
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
