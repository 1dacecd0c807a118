"""`loraformat export-runtime`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from loraformat_cli.options import (
    adapter_options,
    check_stated,
    common_options,
    hint_options,
    json_option,
    matching_options,
    ranges_option,
)
from loraformat_cli.screen import Screen

if TYPE_CHECKING:
    from loraformat.runtime.export import RuntimeExport

_FILE: Final = click.Path(path_type=Path, readable=False)


@click.command(short_help="Write an ONNX model that takes adapters as inputs.")
@click.argument("base", type=_FILE)
@click.option(
    "--targets-of",
    type=_FILE,
    multiple=True,
    required=True,
    metavar="ADAPTER",
    help="An adapter for whose targets there are to be inputs; repeatable.",
)
@click.option("-o", "--output", type=_FILE, required=True, metavar="FILE", help="Where to write the model.")
@click.option(
    "--adapters-out",
    type=_FILE,
    metavar="FOLDER",
    help="Write each of the adapters for the model too, as NAME.onnx_adapter in this folder.",
)
@click.option(
    "--batched",
    type=click.IntRange(min=1),
    metavar="N",
    help="N slots for adapters, and an input that says which one each row of a batch has.",
)
@ranges_option
@click.option(
    "--external-data",
    type=click.Choice(["copy", "share"]),
    help="share: a small model beside the base, which refers to the base's data.",
)
@click.option("--force", is_flag=True, help="Replace outputs that exist.")
@click.option("--durable", is_flag=True, help="Wait for the disk before the output appears; a power cut loses nothing.")
@json_option
@adapter_options
@hint_options
@matching_options
@common_options
@click.pass_obj
def command(
    screen: Screen,
    /,
    base: Path,
    targets_of: tuple[Path, ...],
    output: Path,
    adapters_out: Path | None,
    **flags: Any,
) -> None:
    r"""Write an ONNX model that runs as BASE does, and with an adapter where a run is given one.

    For every target it has two inputs of no numbers by default. Adapters for it are files that onnxruntime loads
    (LoraAdapter, RunOptions.add_active_adapter) or onnxruntime-genai: --adapters-out writes them here, `loraformat
    export-adapter` later. The paths of what was written are all that stdout gets, the model's first.

    \b
    Examples:
      loraformat export-runtime base.onnx --targets-of style.safetensors -o base.lora.onnx --adapters-out adapters/
      loraformat export-runtime base.onnx --targets-of a/ --targets-of b/ -o both.onnx --external-data share
      loraformat export-runtime base.onnx --targets-of a/ --batched 8 -o batched.onnx
    """
    from loraformat import runtime

    check_stated(flags["alpha"], flags["scale"])
    asked = {name: value for name, value in flags.items() if value is not None}
    done = runtime.export_runtime(base, list(targets_of), output, adapters_out=adapters_out, **asked)
    _tell(screen, done)
    if screen.json:
        screen.document(done.as_json())
        return
    for path in (done.output, *(written.output for written in done.adapters)):
        screen.path(path)


def _tell(screen: Screen, done: "RuntimeExport") -> None:
    """Say on stderr what was added, and what was left out."""
    screen.problems(done.problems)
    if screen.verbose:
        screen.table(
            ("inputs", "form", "number form", ">in", ">out"),
            ((each.name, each.form, each.dtype.name, each.width, each.out) for each in done.inputs.layouts),
            to="stderr",
        )
    for name in done.left_out:
        screen.note(f"left out, as allowed: {name}")
    slots = f", {done.inputs.batched} slots" if done.inputs.batched else ""
    screen.note(f"{len(done.inputs.layouts)} pairs of inputs{slots}")
