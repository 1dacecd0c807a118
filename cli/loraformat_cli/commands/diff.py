"""`loraformat diff`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from loraformat_cli.options import adapter_options, check_stated, common_options, json_option
from loraformat_cli.screen import Screen

if TYPE_CHECKING:
    from loraformat.algebra.difference import Difference

_FILE: Final = click.Path(path_type=Path, readable=False)


@click.command(short_help="Compare two adapters, or two models.")
@click.argument("first", type=_FILE)
@click.argument("second", type=_FILE)
@json_option
@adapter_options
@common_options
@click.pass_obj
def command(screen: Screen, /, first: Path, second: Path, **flags: Any) -> None:
    r"""Show how SECOND differs from FIRST: two adapters by what they do, or two models weight by weight.

    For each target: the norms of both changes, that of their difference relative to the first, and how much of the
    smaller of their singular subspaces lies in the other, on the side of the outputs and of the inputs. Of models only
    the weights that differ are listed. Ends with exit code 1 when they differ.

    \b
    Examples:
      loraformat diff style.safetensors smaller.safetensors
      loraformat diff base/ merged/
    """
    import loraformat

    check_stated(flags["alpha"], flags["scale"])
    found = loraformat.diff(first, second, **flags)
    if screen.json:
        screen.document(found.as_json())
    else:
        _show(screen, found)
    if not found.is_same:
        raise click.exceptions.Exit(1)


def _show(screen: Screen, found: "Difference") -> None:
    shown = [item for item in found.shared if item.difference or screen.verbose]
    if shown:
        headings = ("name", ">first", ">second", ">relative difference", ">outputs alike", ">inputs alike")
        rows = (
            (item.name, *map(_number, (item.first, item.second, item.relative, item.outputs, item.inputs)))
            for item in shown
        )
        screen.table(headings, rows)
    for title, names in (("only in the first", found.only_first), ("only in the second", found.only_second)):
        for name in names:
            screen.line(f"{title}: {name}")
    screen.problems(found.incomparable)
    same = sum(not item.difference for item in found.shared)
    screen.note(f"{same} of {len(found.shared)} that both have are the same; relative difference {found.relative:.3g}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
