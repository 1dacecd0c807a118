"""`loraformat resolve`."""

from pathlib import Path
from typing import Any, Final

import click

from loraformat_cli.options import (
    adapter_options,
    check_stated,
    common_options,
    graphs_option,
    hint_options,
    json_option,
    matching_options,
)
from loraformat_cli.screen import Screen

_FILE: Final = click.Path(path_type=Path, readable=False)


@click.command(short_help="Say which weight each target is.")
@click.argument("base", type=_FILE)
@click.argument("adapter", type=_FILE)
@json_option
@adapter_options
@hint_options
@matching_options
@graphs_option
@common_options
@click.pass_obj
def command(screen: Screen, /, base: Path, adapter: Path, **flags: Any) -> None:
    r"""Say which weight of BASE each target of ADAPTER is, and how that is known. Nothing is merged.

    What --json prints is what --map reads, of this command and of `merge`: edit it where a target is not found.

    \b
    Examples:
      loraformat resolve model.onnx adapter/
      loraformat resolve optimised.onnx adapter/ --base-checkpoint ./Llama-3.2-1B
      loraformat resolve model.onnx adapter/ --json > map.json
    """
    import loraformat

    check_stated(flags["alpha"], flags["scale"])
    asked = {name: value for name, value in flags.items() if value is not None}
    found = loraformat.resolve_targets(base, adapter, **asked)
    for problem in found.problems:
        screen.problem(problem)
    if screen.json:
        screen.document(found.as_json())
    else:
        screen.table(
            ("target", "weight", "strategy", "evidence", "verified by"),
            ((_name(t), _place(t), t.strategy, t.evidence, ", ".join(t.verified) or "-") for t in found.targets),
        )
        screen.note(f"{len(found.targets)} weights found")
    if not found.is_whole:
        raise click.exceptions.Exit(1)


def _name(target: Any) -> str:
    section = "" if target.section is None else f" rows {target.section[0]} to {target.section[1]}"
    return f"{target.target}{'' if target.parameter == 'weight' else f'.{target.parameter}'}{section}"


def _place(target: Any) -> str:
    rows = "" if target.rows is None else f" rows {target.rows[0]} to {target.rows[1]}"
    rows += f" by {target.rows[2]}" if target.rows is not None and len(target.rows) > 2 else ""
    return f"{target.weight}{rows}{', rows scaled or moved' if target.folded else ''}"
