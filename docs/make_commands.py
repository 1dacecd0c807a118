"""Write `commands.md`, the page of all commands and options, from what the commands declare.

Run as `PYTHONPATH=.:cli python docs/make_commands.py`.
"""

import re
from collections.abc import Collection, Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Final

import click

from loraformat_cli.group import root

PAGE: Final = Path(__file__).with_name("commands.md")
_HEAD: Final = """# Commands and options

Written by `python docs/make_commands.py` from what the commands declare; `loraformat COMMAND --help` says the same.
Every option has an environment variable: `LORAFORMAT_MERGE_JOBS` is `merge --jobs`. Exit codes: 0 done, 1 findings,
2 wrong usage, 3 unreadable or invalid input, 4 refused for safety, 5 the output could not be written, 70 a bug in
loraformat, 130 and 143 stopped by a signal.
"""
_TABLE: Final = ("| option | |", "|---|---|")


def render() -> str:
    """Return the page."""
    context = click.Context(root)
    named = [(name, root.get_command(context, name)) for name in root.list_commands(context)]
    commands = {name: command for name, command in named if command is not None}
    shared = frozenset.intersection(*(frozenset(_rows(command)) for command in commands.values()))
    common = [row for row in _rows(next(iter(commands.values()))) if row in shared]
    lines = [_HEAD, "Every command has:\n", *_TABLE, *common, ""]
    return "\n".join((*lines, *(line for each in commands.items() for line in _describe(*each, shared))))


def _describe(name: str, command: click.Command, shared: Collection[str]) -> Iterator[str]:
    arguments = [each for each in command.params if isinstance(each, click.Argument)]
    yield f"## {name}\n"
    yield f"    loraformat {' '.join([name, '[OPTIONS]', *map(_show_argument, arguments)])}\n"
    text = cleandoc(command.help or "").split("\b")[0].strip()
    yield text + "\n"
    own = [row for row in _rows(command) if row not in shared]
    yield from (*_TABLE, *own, "") if own else ()


def _rows(command: click.Command) -> list[str]:
    options = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]
    return [f"| `{', '.join(_list_names(each))}`{_show_value(each)} | {_tidy(each.help or '')} |" for each in options]


def _list_names(option: click.Option) -> list[str]:
    return [*option.opts, *option.secondary_opts]


def _show_argument(argument: click.Argument) -> str:
    name = argument.metavar or str(argument.name).upper()
    shown = name if argument.required else f"[{name}]"
    return f"{shown}..." if argument.nargs == -1 and not shown.endswith("...") else shown


def _show_value(option: click.Option) -> str:
    if option.is_flag:
        return ""
    choices = option.type.choices if isinstance(option.type, click.Choice) else ()
    return f" `{option.metavar or ' '.join(map(str, choices)) or option.type.name.upper()}`"


def _tidy(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|").strip()


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
