"""`loraformat stamp`."""

from pathlib import Path
from typing import Any, Final

import click

from loraformat_cli.options import adapter_options, check_stated, common_options, force_option, json_option
from loraformat_cli.screen import Screen

_FILE: Final = click.Path(path_type=Path, readable=False)


@click.command(short_help="Bind an adapter to its base by fingerprints.")
@click.argument("adapter", type=_FILE)
@click.option("--base", type=_FILE, metavar="FILE", required=True, help="The model that the adapter was trained on.")
@click.option("-o", "--output", type=_FILE, metavar="FILE", required=True, help="The .safetensors file to write.")
@force_option
@json_option
@adapter_options
@click.option("--strip-prefix", metavar="PREFIX", help="Remove this from the front of target names to find them.")
@common_options
@click.pass_obj
def command(screen: Screen, /, adapter: Path, base: Path, output: Path, force: bool, **flags: Any) -> None:
    r"""Write ADAPTER as one loraformat file with a fingerprint of its base at every target.

    A fingerprint is sixteen numbers of the base weight. With them, merge and validate tell a wrong base from the right
    one, and find weights whose names an exporter threw away. The path of the file is all that stdout gets.

    \b
    Example:
      loraformat stamp adapter/ --base model.safetensors -o adapter.safetensors
    """
    import loraformat

    check_stated(flags["alpha"], flags["scale"])
    stamped = loraformat.stamp(adapter, base, **flags)
    written = loraformat.save(stamped, output, force=force)
    screen.note(f"targets bound to {base}: {len(stamped.targets)}")
    if screen.json:
        screen.document({"output": str(written), "base": str(base), "targets": len(stamped.targets)})
    else:
        screen.path(written)
