"""`loraformat scale`."""

from pathlib import Path
from typing import Any, Final

import click

from loraformat_cli.making import finish
from loraformat_cli.options import adapter_options, check_stated, common_options, force_option, json_option
from loraformat_cli.params import Finite, NamedNumber
from loraformat_cli.screen import Screen

_FILE: Final = click.Path(path_type=Path, readable=False)


@click.command(short_help="Strengthen or weaken an adapter.", context_settings={"ignore_unknown_options": True})
@click.argument("adapter", type=_FILE)
@click.argument("factor", type=Finite())
@click.option("-o", "--output", type=_FILE, metavar="FILE", required=True, help="The .safetensors file to write.")
@force_option
@click.option(
    "--target",
    "targets",
    type=NamedNumber(),
    multiple=True,
    metavar="GLOB=X",
    help="A factor for these targets instead; repeatable, the last that matches counts.",
)
@json_option
@adapter_options
@common_options
@click.pass_obj
def command(
    screen: Screen,
    /,
    adapter: Path,
    factor: float,
    output: Path,
    force: bool,
    targets: tuple[tuple[str, float], ...],
    **flags: Any,
) -> None:
    r"""Write ADAPTER with FACTOR times its effect; alphas and multipliers change, tensors do not.

    FACTOR may be negative: the result undoes what the adapter does. The path of the file is all that stdout gets.

    \b
    Examples:
      loraformat scale style.safetensors 0.5 -o weaker.safetensors
      loraformat scale style/ 1 --target "*.mlp.*=0.2" -o weaker.safetensors
    """
    import loraformat

    check_stated(flags["alpha"], flags["scale"])
    finish(screen, loraformat.scale(adapter, factor, dict(targets), **flags), output, force=force)
