"""`loraformat extract`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from loraformat_cli.options import common_options, force_option, json_option
from loraformat_cli.params import Finite
from loraformat_cli.screen import Screen

if TYPE_CHECKING:
    from loraformat.algebra.extraction import Extraction

_FILE: Final = click.Path(path_type=Path, readable=False)


@click.command(short_help="Make an adapter of a full fine-tune.")
@click.argument("tuned", type=_FILE)
@click.option("--base", type=_FILE, metavar="MODEL", required=True, help="The model that TUNED was trained from.")
@click.option("-o", "--output", type=_FILE, metavar="FILE", required=True, help="The .safetensors file to write.")
@force_option
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="At most this rank for each weight.")
@click.option(
    "--energy", type=Finite(1e-9, 1.0), metavar="SHARE", help="The fewest with this share of the squared norm."
)
@click.option("--max-error", type=Finite(0.0, 0.999999), metavar="X", help="The fewest within this relative error.")
@click.option("--targets", multiple=True, metavar="GLOB", help="Parameters to take, as '*.q_proj.weight'; repeatable.")
@click.option("--replace", multiple=True, metavar="GLOB", help="Parameters to take whole; repeatable.")
@click.option("--allow-missing", multiple=True, metavar="GLOB", help="Parameters that TUNED may lack; repeatable.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Number form of the factors.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Of the randomised search.")
@json_option
@common_options
@click.pass_obj
def command(screen: Screen, /, tuned: Path, output: Path, force: bool, **flags: Any) -> None:
    r"""Write the adapter that makes the base what TUNED is.

    Without --rank, --energy or --max-error nothing is lost: differences of low rank become factors, whatever else
    changed is taken whole. The path of the file is all that stdout gets.

    \b
    Examples:
      loraformat extract tuned/ --base base/ -o exact.safetensors
      loraformat extract tuned/ --base base/ --rank 32 --dtype bfloat16 -o small.safetensors
    """
    import loraformat

    if flags["energy"] is not None and flags["max_error"] is not None:
        raise click.UsageError("Give --energy or --max-error, not both.", click.get_current_context())
    with screen.progress("extracting") as progress:
        extraction = loraformat.extract(tuned, progress=progress, **flags)
    written = loraformat.save(extraction.adapter, output, force=force)
    screen.problems(extraction.problems)
    _show(screen, extraction)
    if screen.json:
        screen.document({"output": str(written), **extraction.as_json()})
    else:
        screen.path(written)


def _show(screen: Screen, extraction: "Extraction") -> None:
    """Say what became of the parameters, on stderr; of each one when verbose."""
    if screen.verbose:
        rows = (
            (each.name, each.outcome.value, each.rank or "", _number(each.norm), _number(each.error), each.why)
            for each in extraction.parameters
        )
        screen.table(("parameter", "outcome", ">rank", ">norm", ">error", "why"), rows, to="stderr")
    counted = ", ".join(f"{count} {what}" for what, count in extraction.count().items() if count)
    screen.note(f"parameters: {counted}")
    screen.note(f"left out by the factors: {extraction.error:.3g} of the norm of what they hold")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
