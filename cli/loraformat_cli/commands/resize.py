"""`loraformat resize`."""

from pathlib import Path
from typing import Any, Final

import click

from loraformat_cli.making import finish
from loraformat_cli.options import adapter_options, check_stated, common_options, force_option, json_option
from loraformat_cli.params import FORMS, Finite, NamedNumber
from loraformat_cli.screen import Screen

_FILE: Final = click.Path(path_type=Path, readable=False)
_SHARE: Final = Finite(0.0, 1.0)


@click.command(short_help="Cut the ranks of an adapter.")
@click.argument("adapter", type=_FILE)
@click.option("-o", "--output", type=_FILE, metavar="FILE", required=True, help="The .safetensors file to write.")
@force_option
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="At most this rank.")
@click.option("--energy", type=_SHARE, metavar="SHARE", help="The fewest with this share of the squared norm.")
@click.option("--max-error", type=_SHARE, metavar="X", help="The fewest within this relative error.")
@click.option("--sv-ratio", type=Finite(1.0), metavar="X", help="Singular values above the largest divided by X.")
@click.option("--sv-fro", type=_SHARE, metavar="SHARE", help="The fewest with this share of the norm.")
@click.option("--sv-cumulative", type=_SHARE, metavar="SHARE", help="The fewest with this share of their sum.")
@click.option(
    "--target",
    "ranks",
    type=NamedNumber(whole=True),
    multiple=True,
    metavar="GLOB=N",
    help="A rank for these targets instead of --rank; repeatable, the last that matches counts.",
)
@click.option("--device", type=click.Choice(["cpu"]), expose_value=False, help="Where to compute; numpy has the CPU.")
@click.option(
    "--dtype", type=click.Choice(FORMS), default=FORMS[0], help="Number form of what is cut.  [default: float32]"
)
@json_option
@adapter_options
@common_options
@click.pass_obj
def command(
    screen: Screen, /, adapter: Path, output: Path, force: bool, ranks: tuple[tuple[str, int], ...], **flags: Any
) -> None:
    r"""Write ADAPTER with each change in the best form of a lower rank, by its singular values.

    --rank may stand beside one of the rules. Targets that lose nothing stay as they are. The path of the file is all
    that stdout gets.

    \b
    Examples:
      loraformat resize style.safetensors --rank 8 -o smaller.safetensors
      loraformat resize style.safetensors --energy 0.99 --rank 32 --target "*.mlp.*=4" -o smaller.safetensors
    """
    import loraformat

    check_stated(flags["alpha"], flags["scale"])
    reductions: list[loraformat.Reduction] = []
    made = loraformat.resize(adapter, ranks=dict(ranks), report=reductions.append, **flags)
    finish(screen, made, output, force=force, reductions=reductions)
