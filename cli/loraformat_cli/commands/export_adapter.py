"""`loraformat export-adapter`."""

from pathlib import Path
from typing import Any, Final

import click

from loraformat_cli.options import (
    adapter_options,
    check_stated,
    common_options,
    force_option,
    hint_options,
    json_option,
    matching_options,
)
from loraformat_cli.params import WeightedAdapter
from loraformat_cli.screen import Screen

_FILE: Final = click.Path(path_type=Path, readable=False)


@click.command(short_help="Write an .onnx_adapter for a model with run-time inputs.")
@click.argument("model", type=_FILE)
@click.argument("adapters", type=WeightedAdapter(), nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.option("-o", "--output", type=_FILE, required=True, metavar="FILE", help="The .onnx_adapter file to make.")
@force_option
@json_option
@adapter_options
@hint_options
@matching_options
@common_options
@click.pass_obj
def command(
    screen: Screen,
    /,
    model: Path,
    adapters: tuple[tuple[Path, float | None], ...],
    output: Path,
    **flags: Any,
) -> None:
    r"""Write adapters as one file that onnxruntime loads for MODEL, which `loraformat export-runtime` has made.

    Several adapters are added up, each with its weight (1 if not given): their ranks add up, and nothing is lost. In a
    model with slots (--batched) each is one of the stack, the first slot 0. The path is all that stdout gets.

    \b
    Examples:
      loraformat export-adapter base.lora.onnx style.safetensors -o style.onnx_adapter
      loraformat export-adapter base.lora.onnx style.safetensors:0.8 subject/:0.5 -o both.onnx_adapter
      loraformat export-adapter batched.onnx a/ b/ c/ -o stack.onnx_adapter
    """
    from loraformat import runtime

    check_stated(flags["alpha"], flags["scale"])
    asked = {name: value for name, value in flags.items() if value is not None}
    pairs = [path if weight is None else (path, weight) for path, weight in adapters]
    done = runtime.export_adapter(model, pairs, output, **asked)
    screen.problems(done.problems)
    for name in done.left_out:
        screen.note(f"left out, as allowed: {name}")
    ranks = sorted(set(done.ranks.values()))
    listed = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
    screen.note(f"{len(done.ranks)} pairs of inputs, {listed}")
    if screen.json:
        screen.document(done.as_json())
    else:
        screen.path(done.output)
