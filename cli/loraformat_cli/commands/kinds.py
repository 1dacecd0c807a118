"""`loraformat kinds`."""

import click

from loraformat_cli.options import common_options, json_option
from loraformat_cli.screen import Screen


@click.command(short_help="List the adapter kinds that can be merged.")
@json_option
@common_options
@click.pass_obj
def command(screen: Screen, /) -> None:
    """List the adapter kinds that can be merged: what becomes of a weight W, how it composes, and where it stands.

    What is added composes in any number; of functions of the base and replacements a weight takes one.
    """
    from loraformat.kinds import KINDS

    kinds = [kind for _, kind in KINDS]
    if screen.json:
        screen.document(
            {
                "kinds": [
                    {
                        "name": kind.name,
                        "nature": kind.nature.value,
                        "formula": kind.formula,
                        "source": kind.source,
                        "slots": sorted({slot.value for roles in kind.role_sets for slot in roles.slots}),
                    }
                    for kind in kinds
                ]
            }
        )
        return
    screen.table(
        ("kind", "nature", "merged weight", "source"),
        ((kind.name, kind.nature.value, kind.formula, kind.source) for kind in kinds),
    )
