"""`loraformat unmerge`."""

from pathlib import Path
from typing import Any, Final

import click

from loraformat_cli.options import (
    adapter_options,
    check_stated,
    common_options,
    force_option,
    graphs_option,
    json_option,
)
from loraformat_cli.params import WeightedAdapter
from loraformat_cli.screen import Screen

_FILE: Final = click.Path(path_type=Path, readable=False)


@click.command(short_help="Undo a merge.")
@click.argument("model", type=_FILE)
@click.option("-o", "--output", type=_FILE, metavar="PATH", help="Where the restored model goes.")
@click.option(
    "--adapter",
    "adapters",
    type=WeightedAdapter(),
    multiple=True,
    metavar="ADAPTER[:WEIGHT]",
    help="What was merged, to be subtracted where no bytes were kept.  Repeatable.",
)
@force_option
@json_option
@adapter_options
@graphs_option
@common_options
@click.pass_obj
def command(
    screen: Screen,
    /,
    model: Path,
    output: Path | None,
    adapters: tuple[tuple[Path, float | None], ...],
    **flags: Any,
) -> None:
    r"""Undo a merge, exactly where its bytes were kept.

    A model that a killed `merge --in-place` has left half done is rolled back from its journal. Where the merge was
    made with --keep-undo, the overwritten bytes are put back: into a copy with -o, and without it in place, if the
    merge was in place. Otherwise the adapters that you name are subtracted, which is not exact, and is said to be.

    \b
    Examples:
      loraformat unmerge merged.safetensors -o base-again.safetensors
      loraformat unmerge merged.onnx --adapter adapter/ -o nearly-base.onnx
    """
    import loraformat

    check_stated(flags["alpha"], flags["scale"])
    asked = {name: value for name, value in flags.items() if value is not None}
    pairs = [path if weight is None else (path, weight) for path, weight in adapters]
    undone = loraformat.unmerge(model, output, adapters=pairs, **asked)
    if undone.problem is not None:
        screen.problem(undone.problem)
    if screen.json:
        screen.document(undone.as_json())
    else:
        screen.path(str(undone.output))
