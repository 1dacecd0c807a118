"""`loraformat compose`."""

from pathlib import Path
from typing import Any, Final

import click

from loraformat_cli.making import finish
from loraformat_cli.options import adapter_options, check_stated, common_options, force_option, json_option
from loraformat_cli.params import FORMS, Finite, WeightedAdapter
from loraformat_cli.screen import Screen

_FILE: Final = click.Path(path_type=Path, readable=False)
_METHODS: Final = ("sum", "task-arithmetic", "mean", "slerp", "magnitude-prune", "ties", "dare", "dare-ties")


@click.command(short_help="Make one adapter of several.")
@click.argument("adapters", type=WeightedAdapter(), nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.option("-o", "--output", type=_FILE, metavar="FILE", required=True, help="The .safetensors file to write.")
@force_option
@click.option("--method", type=click.Choice(_METHODS), default="sum", help="How they are put together.  [default: sum]")
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Cut the result to this rank.")
@click.option("--energy", type=Finite(0.0, 1.0), metavar="SHARE", help="Cut to this share of the squared norm.")
@click.option("--max-error", type=Finite(0.0, 1.0), metavar="X", help="Cut to this relative error.")
@click.option("--density", type=Finite(0.0, 1.0), metavar="SHARE", help="What is kept of each change.  [default: 0.5]")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Of methods that drop by chance.  [default: 0]")
@click.option("--allow-different-bases", is_flag=True, default=None, help="Accept bases of different names.")
@click.option(
    "--dtype", type=click.Choice(FORMS), default=FORMS[0], help="Number form of what is cut.  [default: float32]"
)
@json_option
@adapter_options
@common_options
@click.pass_obj
def command(
    screen: Screen,
    /,
    adapters: tuple[tuple[Path, float | None], ...],
    output: Path,
    force: bool,
    method: str,
    **flags: Any,
) -> None:
    r"""Write one adapter that does what the given ones do together, each with its weight (1 if not given).

    By default the result is their sum, exactly: targets, ranks and alphas may differ, weights may be negative, and the
    ranks add up. With --rank, --energy or --max-error it is cut by its singular values. The methods magnitude-prune,
    ties, dare and dare-ties have no exact result, and need one of the three. The path of the file is all that stdout
    gets.

    \b
    Examples:
      loraformat compose style.safetensors:0.7 subject.safetensors:-0.3 -o both.safetensors
      loraformat compose a/ b/ c/ --method ties --density 0.3 --rank 16 -o merged.safetensors
    """
    import loraformat

    check_stated(flags["alpha"], flags["scale"])
    pairs = [path if weight is None else (path, weight) for path, weight in adapters]
    asked = {name: value for name, value in flags.items() if value is not None}
    reductions: list[loraformat.Reduction] = []
    made = loraformat.compose(pairs, method, report=reductions.append, **asked)
    finish(screen, made, output, force=force, reductions=reductions)
