"""`loraformat verify`."""

from pathlib import Path
from typing import Any, Final

import click

from loraformat_cli.options import (
    adapter_options,
    check_stated,
    common_options,
    effort_options,
    hint_options,
    json_option,
)
from loraformat_cli.params import NamedNumber, WeightedAdapter
from loraformat_cli.screen import Screen

_FILE: Final = click.Path(path_type=Path, readable=False)


@click.command(short_help="Prove what a merged model is.")
@click.argument("merged", type=_FILE)
@click.option("--base", type=_FILE, required=True, metavar="PATH", help="The base that it was made from.")
@click.option(
    "--adapter",
    "adapters",
    type=WeightedAdapter(),
    multiple=True,
    required=True,
    metavar="ADAPTER[:WEIGHT]",
    help="An adapter, in the order of the merge; without a weight it takes the receipt's.  Repeatable.",
)
@click.option("--run", is_flag=True, help="Run both ONNX models with onnxruntime and compare their outputs too.")
@click.option(
    "--size",
    "sizes",
    type=NamedNumber(whole=True),
    multiple=True,
    metavar="NAME=N",
    help="With --run: a dimension's size.",
)
@click.option(
    "--calibration", type=_FILE, metavar="PATH", help="Measure activation ranges once more, on the merge's data."
)
@json_option
@adapter_options
@hint_options
@effort_options
@common_options
@click.pass_obj
def command(
    screen: Screen, /, merged: Path, base: Path, adapters: tuple[tuple[Path, float | None], ...], **flags: Any
) -> None:
    r"""Prove that a merged model is its base but for the merged weights.

    Every byte outside the merged weights is compared with the base's, every merged weight is computed once more, and
    the receipt is compared with base and adapters. What differs is named; the exit code is then 1.

    \b
    Examples:
      loraformat verify merged.onnx --base base.onnx --adapter adapter/
      loraformat verify merged/ --base Llama-3.2-1B/ --adapter style.safetensors:0.8 --adapter subject.safetensors:0.5
    """
    import loraformat

    check_stated(flags["alpha"], flags["scale"])
    flags["sizes"] = {name: int(size) for name, size in flags["sizes"]}
    asked = {name: value for name, value in flags.items() if value is not None}
    pairs = [path if weight is None else (path, weight) for path, weight in adapters]
    with screen.progress("verifying") as progress:
        found = loraformat.verify(merged, base, pairs, progress=progress, **asked)
    for problem in found.problems:
        screen.problem(problem)
    if screen.json:
        screen.document(found.as_json())
    elif found.holds:
        for run in found.runs:
            screen.note(f"output {run.output}: {run.kept:.4%} of the change, off by {run.difference:.3g} of the output")
        screen.note(f"{found.weights} weights computed once more, {found.compared_bytes} bytes equal: it holds")
    if not found.holds:
        raise click.exceptions.Exit(1)
