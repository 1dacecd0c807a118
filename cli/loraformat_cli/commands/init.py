"""`loraformat init`."""

from pathlib import Path
from typing import Any, Final

import click

from loraformat_cli.options import common_options, force_option, json_option
from loraformat_cli.params import Finite
from loraformat_cli.screen import Screen

_FILE: Final = click.Path(path_type=Path, readable=False)


@click.command(short_help="Make a new adapter to start training from.")
@click.argument("base", type=_FILE)
@click.option("-o", "--output", type=_FILE, metavar="FILE", required=True, help="The .safetensors file to write.")
@force_option
@click.option("--rank", type=click.IntRange(min=1), required=True, metavar="N", help="Rank of every target.")
@click.option("--targets", multiple=True, required=True, metavar="GLOB", help="Modules, as '*.q_proj'; repeatable.")
@click.option(
    "--method",
    type=click.Choice(["gaussian", "kaiming", "svd", "covariance", "pissa"]),
    default="gaussian",
    show_default=True,
    help="How A and B are chosen; pissa changes the base.",
)
@click.option("--stats", type=_FILE, metavar="NPZ", help="Activations by target, for covariance.")
@click.option("--alpha", type=Finite(), metavar="X", help="lora_alpha.  [default: the rank, a scale of 1]")
@click.option("--smoothness", type=Finite(0.0), default=0.0, metavar="X", help="Penalty on rough components.")
@click.option(
    "--sparsity", type=Finite(0.0, 0.999), default=0.0, metavar="SHARE", help="Threshold of sparse components."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Of the random numbers.")
@json_option
@common_options
@click.pass_obj
def command(screen: Screen, /, base: Path, output: Path, force: bool, **flags: Any) -> None:
    r"""Write a new adapter for the weights of BASE whose modules match.

    B is zero, so that nothing changes before training, but for pissa: train from the base without the new adapter
    (loraformat merge BASE NEW:-1). The path of the file is all that stdout gets.

    \b
    Examples:
      loraformat init model/ --rank 8 --targets "*.q_proj" --targets "*.v_proj" -o new.safetensors
      loraformat init model/ --rank 16 --targets "*.mlp.*" --method covariance --stats seen.npz -o new.safetensors
    """
    import loraformat

    _check(flags)
    made = loraformat.init(base, **flags)
    written = loraformat.save(made.adapter, output, force=force)
    screen.problems(made.problems)
    changes = "changes the base" if made.method.changes_base else "leaves the base as it is"
    screen.note(f"{len(made.adapter.targets)} targets, {made.adapter.parameters:,} numbers; {made.method} {changes}")
    if screen.json:
        screen.document({"output": str(written), **made.as_json()})
    else:
        screen.path(written)


def _check(flags: dict[str, Any]) -> None:
    """Refuse words that do not go together."""
    context = click.get_current_context()
    if flags["alpha"] == 0:
        raise click.UsageError("--alpha 0 would make an adapter that never does anything.", context)
    if flags["smoothness"] and flags["sparsity"]:
        raise click.UsageError("Give --smoothness or --sparsity, not both.", context)
    if (flags["method"] == "covariance") != (flags["stats"] is not None):
        raise click.UsageError("--method covariance and --stats belong together.", context)
    if flags["method"] != "covariance" and (flags["smoothness"] or flags["sparsity"]):
        raise click.UsageError("--smoothness and --sparsity are of --method covariance.", context)
