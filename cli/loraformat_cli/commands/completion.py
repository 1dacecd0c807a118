"""`loraformat completion`."""

from typing import Final

import click

from loraformat_cli.options import common_options
from loraformat_cli.screen import Screen

_SHELLS: Final = ("bash", "zsh", "fish")


@click.command(short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(_SHELLS))
@common_options
@click.pass_obj
def command(screen: Screen, /, shell: str) -> None:
    r"""Print the script that makes SHELL complete the commands and options of loraformat.

    \b
    bash:  eval "$(loraformat completion bash)"   in ~/.bashrc
    zsh:   eval "$(loraformat completion zsh)"    in ~/.zshrc
    fish:  loraformat completion fish > ~/.config/fish/completions/loraformat.fish
    """
    from click.shell_completion import get_completion_class

    from loraformat_cli.group import root

    complete = get_completion_class(shell)
    if complete is None:
        raise click.UsageError(f"this version of click cannot complete for {shell}", click.get_current_context())
    screen.line(complete(root, {}, "loraformat", "_LORAFORMAT_COMPLETE").source())
