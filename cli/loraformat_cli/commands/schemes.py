"""`loraformat schemes`."""

import click

from loraformat_cli.options import common_options, json_option
from loraformat_cli.screen import Screen


@click.command(short_help="List naming schemes and what each can hold.")
@click.option("--pairs", is_flag=True, help="Print what each scheme has no place for of the others, as Markdown.")
@json_option
@common_options
@click.pass_obj
def command(screen: Screen, /, *, pairs: bool) -> None:
    """List every naming scheme: whether it is written as well, and what it has a place for."""
    import loraformat
    from loraformat.conversion import list_pairs, tabulate_pairs

    if pairs:
        found = list_pairs()
        if screen.json:
            screen.document({"pairs": [each.as_json() for each in found]})
        else:
            screen.line(tabulate_pairs(found))
        return
    listed = loraformat.list_schemes()
    if screen.json:
        screen.document({"schemes": [each.as_json() for each in listed]})
        return
    screen.table(
        ("scheme", "", "kinds", "slots", "scale", "from the base", "what it is"),
        (
            (
                each.name,
                "read, write" if each.writes else "read",
                ", ".join(each.kinds) or "any",
                ", ".join(each.slots),
                each.scale,
                each.needs,
                each.title,
            )
            for each in listed
        ),
    )
