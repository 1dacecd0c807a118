"""`loraformat inspect`."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from loraformat_cli.options import adapter_options, check_stated, common_options, json_option
from loraformat_cli.screen import Screen

Record = Mapping[str, Any]

_COLUMNS: Final = {
    "adapter": ("targets", ("name", "kind", "slot", "rank", "scale", "scaling", "shape", "parameters", "norm")),
    "base": ("sites", ("module", "slot", "weight", "shape", "dtype", "evidence", "obstacle")),
}
"""What the lists of each kind of file show, in order."""
_GROUPED_OUT: Final = frozenset({"norm", "weight"})
"""Columns in which members of a group differ."""
_NUMBER: Final = re.compile(r"\d+")


@click.command(short_help="Show what an adapter or a base model holds.")
@click.argument("path", type=click.Path(path_type=Path, readable=False))
@json_option
@adapter_options
@click.option("--targets", "--all", "every", is_flag=True, help="List every target or weight instead of groups.")
@common_options
@click.pass_obj
def command(
    screen: Screen, /, path: Path, scheme: str | None, alpha: float | None, scale: float | None, every: bool
) -> None:
    r"""Show what PATH holds: an adapter's targets, ranks and scales, or the weights of a base that can be adapted.

    Numbers in names are grouped as `*`. Ends with exit code 1 when something is wrong with the file.

    \b
    Examples:
      loraformat inspect adapter/
      loraformat inspect model.onnx --all
      loraformat inspect style.safetensors --json
    """
    import loraformat

    check_stated(alpha, scale)
    shown = loraformat.inspect(path, scheme=scheme, alpha=alpha, scale=scale).as_json()
    if screen.json:
        screen.document(shown)
    else:
        _show(screen, shown, every)
    if any(problem["severity"] == "error" for problem in shown.get("problems", ())):
        raise click.exceptions.Exit(1)


def _show(screen: Screen, shown: Record, every: bool) -> None:
    from loraformat.problems import Problem

    listed, columns = _COLUMNS["adapter" if shown.get("kind") == "adapter" else "base"]
    screen.table(("", ""), _summary(shown, listed))
    rows: Sequence[Record] = shown.get(listed, ())
    if rows:
        screen.line()
    if every or screen.verbose:
        screen.table(_headings(columns), ([_cell(row.get(column)) for column in columns] for row in rows))
    elif rows:
        kept = tuple(column for column in columns if column not in _GROUPED_OUT)
        screen.table((">count", *_headings(kept)), _groups(rows, kept))
    for note in shown.get("notes", ()):
        screen.note(f"note: {note}")
    for problem in shown.get("problems", ()):
        screen.problem(Problem(**{name: text for name, text in problem.items() if name != "title"}))


def _summary(shown: Record, listed: str) -> Iterator[tuple[str, str]]:
    """Yield name and value of everything but the long lists."""
    for name, value in shown.items():
        if name in ("notes", "problems") or value in (None, [], {}, ""):
            continue
        if name == "receipt":
            text = _merged_with(value)
        else:
            text = _count(value) if name == listed or isinstance(value, int) else _cell(value)
        if text:
            yield name.replace("_", " "), text


def _count(value: Any) -> str:
    return f"{value if isinstance(value, int) else len(value):,}"


def _merged_with(receipt: Record) -> str:
    adapters = (f"{adapter['name']} ({_cell(adapter['weight'])})" for adapter in receipt.get("adapters", ()))
    return f"a merge of {', '.join(adapters)}"


def _groups(rows: Sequence[Record], columns: Sequence[str]) -> Iterator[Sequence[object]]:
    """Yield one row for all that differ in the numbers of their names only."""
    groups = Counter(
        (_NUMBER.sub("*", _cell(row.get(columns[0]))), *(_cell(row.get(column)) for column in columns[1:]))
        for row in rows
    )
    for cells, count in groups.items():
        yield count, *cells


def _headings(columns: Sequence[str]) -> list[str]:
    return [f">{column}" if column in ("rank", "scale", "parameters", "norm") else column for column in columns]


def _cell(value: object) -> str:
    """Return a JSON value in few words."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping) and "code" in value:  # a problem
        return f"{value['code']} {value.get('title', '')}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_cell(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        numbers = all(isinstance(item, int) for item in value)
        return f"[{', '.join(map(_cell, value))}]" if numbers else "; ".join(map(_cell, value))
    return "" if value is None else str(value)
