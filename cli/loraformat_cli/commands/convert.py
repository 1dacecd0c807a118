"""`loraformat convert`."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from loraformat_cli.options import adapter_options, check_stated, common_options, force_option, json_option
from loraformat_cli.screen import Screen

if TYPE_CHECKING:
    from loraformat.conversion import Conversion

_FILE: Final = click.Path(path_type=Path, readable=False)
_NUMBER: Final = re.compile(r"\d+")


@click.command(short_help="Write an adapter in another naming scheme.")
@click.argument("adapter", type=_FILE)
@click.option("--to", metavar="SCHEME", required=True, help="The scheme to write; `loraformat schemes` lists them.")
@click.option("-o", "--output", type=_FILE, metavar="PATH", help="The file to make, or the folder for peft.")
@click.option(
    "--base", type=_FILE, metavar="PATH", help="The model, its folder or its config.json, where it is asked for."
)
@click.option("--dry-run", is_flag=True, help="Print the operations and stop; writes nothing.")
@click.option("--allow-rounding", is_flag=True, help="Fold a scale into a tensor that cannot hold the product exactly.")
@click.option("--verify", is_flag=True, help="Read the output and compare the change of every module in float64.")
@force_option
@json_option
@adapter_options
@common_options
@click.pass_obj
def command(
    screen: Screen,
    /,
    adapter: Path,
    to: str,
    output: Path | None,
    dry_run: bool,
    verify: bool,
    force: bool,
    **flags: Any,
) -> None:
    r"""Write ADAPTER in another naming scheme: its numbers are moved, and none is rounded without leave.

    Every tensor is accounted for, or nothing is written. What the adapter does not tell (how flat names are read, how
    many heads there are) is taken from --base. The path of the output is all that stdout gets.

    \b
    Examples:
      loraformat convert style.safetensors --to diffusers -o pytorch_lora_weights.safetensors
      loraformat convert adapter/ --to native -o adapter.safetensors --verify
      loraformat convert style.safetensors --to kohya --dry-run
    """
    import loraformat

    check_stated(flags["alpha"], flags["scale"])
    if dry_run:
        _show_plan(screen, loraformat.plan_conversion(adapter, to, **flags))
        return
    if output is None:
        raise click.UsageError("Say where to write with -o, or --dry-run to see the operations.")
    done = loraformat.convert(adapter, to, output, verify=verify, force=force, **flags)
    _tell(screen, done)
    if screen.json:
        screen.document(done.as_json())
    else:
        screen.path(output)


def _show_plan(screen: Screen, plan: "Conversion") -> None:
    """Print how the output is made, and what stands against it."""
    if screen.json:
        screen.document(plan.as_json())
    else:
        if screen.verbose:
            screen.table(("tensor", "operations", "made of"), _rows(plan))
        else:
            screen.table((">count", "tensor", "operations", "made of"), _groups(plan))
        _tell(screen, plan)
    if any(problem.severity == "error" for problem in plan.problems):
        raise click.exceptions.Exit(1)


def _rows(plan: "Conversion") -> Iterator[tuple[str, str, str]]:
    for step in plan.steps:
        plain = "keep" if step.sources == (step.name,) else "rename" if step.sources else "state"
        yield step.name, "; ".join(step.operations) or plain, ", ".join(step.sources)


def _groups(plan: "Conversion") -> Iterator[Sequence[object]]:
    """Yield one row for all that differ in the numbers of their names only."""
    counted = Counter(
        (_NUMBER.sub("*", name), operations, _NUMBER.sub("*", origin)) for name, operations, origin in _rows(plan)
    )
    for (name, operations, origin), count in counted.items():
        yield count, name, operations, origin


def _tell(screen: Screen, done: "Conversion") -> None:
    """Say on stderr what was detected, what became of every tensor, and what was proven."""
    screen.problems(done.problems)
    screen.note(f"read as {done.origin}: {done.evidence}")
    screen.note(f"tensors: {done.account}; targets: {done.targets}")
    if done.proof is not None:
        screen.note(
            f"compared {done.proof.modules} modules in float64; largest relative difference: {done.proof.relative:.3g}"
        )
