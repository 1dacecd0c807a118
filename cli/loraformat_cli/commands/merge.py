"""`loraformat merge`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from loraformat.limits import RETAINED_REFUSE, RETAINED_WARN
from loraformat_cli.options import (
    adapter_options,
    check_stated,
    common_options,
    effort_options,
    force_option,
    graphs_option,
    hint_options,
    json_option,
    matching_options,
    ranges_option,
)
from loraformat_cli.params import Finite, WeightedAdapter
from loraformat_cli.screen import Screen

if TYPE_CHECKING:
    from loraformat.receipt import Receipt

_FILE: Final = click.Path(path_type=Path, readable=False)
_ONLY_MERGING: Final = frozenset(
    {"min_retained", "warn_retained", "force", "durable", "jobs", "max_memory_bytes", "resume", "link", "keep_undo"}
)
"""Flags that a plan has no use for."""


@click.command(short_help="Merge adapters into a base model.")
@click.argument("base", type=_FILE)
@click.argument("adapters", type=WeightedAdapter(), nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.option(
    "-o",
    "--output",
    type=click.Path(readable=False),
    metavar="PATH",
    help="Where to write; beside the base if not given.",
)
@force_option
@click.option("--durable", is_flag=True, help="Wait for the disk before the output appears; a power cut loses nothing.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; reads no weights, writes nothing.")
@json_option
@adapter_options
@hint_options
@matching_options
@graphs_option
@click.option(
    "--min-retained",
    type=Finite(0.0, 1.0),
    metavar="SHARE",
    help=f"Refuse when less of a change survives rounding.  [default: {RETAINED_REFUSE}]",
)
@click.option(
    "--warn-retained",
    type=Finite(0.0, 1.0),
    metavar="SHARE",
    help=f"Warn when less of a change survives rounding.  [default: {RETAINED_WARN}]",
)
@click.option("--allow-zero", is_flag=True, help="Accept adapters that change nothing.")
@click.option("--untie", is_flag=True, default=None, help="Let tied tables part where adapters change them apart.")
@click.option("--new-biases", is_flag=True, default=None, help="Give biases to modules that have none.")
@click.option("--keep-scales", is_flag=True, default=None, help="Leave the scales of quantised weights as they are.")
@ranges_option
@click.option(
    "--calibration",
    type=_FILE,
    metavar="PATH",
    help="Measure activation ranges anew, on an array of samples for each input of the graph; of a folder, on one such "
    "file for each graph.",
)
@click.option(
    "--calibration-method",
    type=click.Choice(["minmax", "entropy", "percentile"]),
    help="Which of onnxruntime's calibrators measures them: the extremes unless told otherwise.",
)
@click.option(
    "--any-rounding",
    is_flag=True,
    default=None,
    help="With --base-checkpoint: round weights of 4 bits to the nearest codes, though theirs were found otherwise.",
)
@click.option(
    "--on-quantized",
    type=click.Choice(["requantize", "dequantize"]),
    help="What becomes of quantised weights that change: codes again, or floats, with other operators for them.",
)
@click.option(
    "--external-data",
    type=click.Choice(["copy", "share"]),
    help="share: a small model beside an ONNX base, which refers to the base's data for what does not change.",
)
@click.option(
    "--dtype", metavar="FORM", help="Number form of the output, such as bfloat16; else each tensor keeps its own."
)
@click.option("--to", type=click.Choice(["safetensors"]), help="Write the output anew in this format.")
@click.option(
    "--resume",
    is_flag=True,
    default=None,
    help="Take up a killed run of the same merge, and leave something to take up.",
)
@click.option("--link", is_flag=True, default=None, help="Hard links of a folder's untouched files, not copies.")
@click.option("--each", is_flag=True, help="A model for each adapter, in the folder -o; the base is read once.")
@click.option("--in-place", is_flag=True, help="Rewrite the base's own files; a journal takes them back after a kill.")
@click.option(
    "--keep-undo", is_flag=True, default=None, help="Keep the overwritten bytes beside the output, for `unmerge`."
)
@effort_options
@common_options
@click.pass_obj
def command(
    screen: Screen,
    /,
    base: Path,
    adapters: tuple[tuple[Path, float | None], ...],
    output: str | None,
    dry_run: bool,
    each: bool,
    in_place: bool,
    **flags: Any,
) -> None:
    r"""Merge adapters into a base model, each with its weight (1 if not given).

    BASE is an ONNX model, a checkpoint file, a model folder or a whole pipeline of diffusers, ADAPTER a file or a
    folder. What names an existing path is a path, colons and all; otherwise the number after the last colon is the
    weight. The path of the merged model is all that stdout gets.

    \b
    Examples:
      loraformat merge model.onnx adapter/ -o merged.onnx
      loraformat merge model.safetensors style.safetensors:0.8 subject.safetensors:0.5
      loraformat merge model.onnx adapter/ --dry-run
      loraformat merge ./Llama-3.2-1B ./adapter -o ./merged
      loraformat merge ./stable-diffusion-v1-5 style.safetensors -o merged/
      loraformat merge model.safetensors --each adapters/*.safetensors -o merged/
    """
    import loraformat

    check_stated(flags["alpha"], flags["scale"])
    place = _read_output(output, base, each=each)
    _check_manner(place, dry_run=dry_run, each=each, in_place=in_place)
    asked = {name: value for name, value in flags.items() if value is not None}
    pairs = [path if weight is None else (path, weight) for path, weight in adapters]
    if dry_run:
        planning = {name: value for name, value in asked.items() if name not in _ONLY_MERGING}
        _show_plan(screen, loraformat.plan_merge(base, pairs, base if in_place else place, **planning))
        return
    with screen.progress("merging") as progress:
        if each and place is not None:
            receipts = loraformat.merge_each(base, pairs, place, progress=progress, **asked)
        elif in_place:
            receipts = [loraformat.merge_into(base, pairs, progress=progress, **asked)]
        else:
            receipts = [loraformat.merge(base, pairs, place, progress=progress, **asked)]
    if each and screen.json:
        screen.document({"receipts": [receipt.as_json() for receipt in receipts]})
        return
    for receipt in receipts:
        _show_receipt(screen, receipt)


def _read_output(output: str | None, base: Path, *, each: bool) -> Path | None:
    """Return the path of -o; what ends as a folder's name does is none of a file, though the system would take it."""
    if output is None:
        return None
    if output.endswith(os.sep) and base.is_file() and not each:
        told = f"{output!r} is a folder's name, and a merge into a file makes a file: -o {output}{base.name}"
        raise click.UsageError(told, click.get_current_context())
    return Path(output)


def _check_manner(output: Path | None, *, dry_run: bool, each: bool, in_place: bool) -> None:
    """Refuse options that do not go together."""
    context = click.get_current_context()
    if each and (in_place or dry_run or output is None):
        raise click.UsageError("--each needs -o FOLDER, and goes with neither --in-place nor --dry-run.", context)
    if in_place and output is not None:
        raise click.UsageError("--in-place rewrites the base: leave out -o.", context)


def _show_plan(screen: Screen, plan: Any) -> None:
    for problem in plan.problems:
        screen.problem(problem)
    if screen.json:
        screen.document(plan.as_json())
        return
    screen.table(
        ("target", "weight", ">rank", ">scale", "kind", "form", "evidence"),
        (
            (_listed(w.targets), w.name, _listed(w.ranks), _numbers(w.scales), _listed(w.kinds), _form(w), w.evidence)
            for w in plan.weights
            if w.changes
        ),
    )
    for target in plan.unmatched:
        screen.note(f"left out, as allowed: {target}")
    changed = sum(bool(w.changes) for w in plan.weights)
    if changed < len(plan.weights):
        screen.note(f"{len(plan.weights) - changed} more tensors would change their form")
    screen.note(f"{changed} weights would be rewritten, into {plan.output} ({plan.format})")


def _show_receipt(screen: Screen, receipt: "Receipt") -> None:
    """Print the path, or the receipt, on stdout; what a person wants to know on stderr."""
    for problem in receipt.problems:
        screen.problem(problem)
    screen.table(
        ("adapter", ">weight", ">targets"),
        ((a.name, f"{a.weight:g}", a.targets) for a in receipt.adapters),
        to="stderr",
    )
    if screen.verbose:
        screen.table(
            ("target", "rewritten", ">scale", ">retained", ">change"),
            (
                (_listed(w.targets), w.name, _numbers(w.scales), f"{w.retained:.3%}", f"{w.relative:.3g}")
                for w in receipt.weights
            ),
            to="stderr",
        )
    least = min(receipt.weights, key=lambda weight: weight.retained, default=None)
    survived = f"; smallest share that survived rounding: {least.retained:.3%} ({least.name})" if least else ""
    screen.note(f"{len(receipt.weights)} weights rewritten{survived}")
    if screen.json:
        screen.document(receipt.as_json())
    else:
        screen.path(receipt.output)


def _listed(values: Sequence[object]) -> str:
    """Return the values without repetition, in order."""
    return ", ".join(dict.fromkeys(map(str, values)))


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _form(weight: Any) -> str:
    return f"{weight.dtype} [{', '.join(map(str, weight.shape))}]"
