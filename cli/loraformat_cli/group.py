"""The click group: finds its commands by listing the package folder, and imports a command when it is needed."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, cast

import click

from loraformat_cli import commands
from loraformat_cli.ending import ending
from loraformat_cli.options import common_options
from loraformat_cli.screen import Screen

_CONTEXT = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "LORAFORMAT", "max_content_width": 100}


class LazyGroup(click.Group):
    """A group whose commands are the modules of `loraformat_cli.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, importing none."""
        modules = (module.name for module in iter_modules(commands.__path__))
        return sorted(name.replace("_", "-") for name in modules if not name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command, importing its module, or None."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = import_module(f"{commands.__name__}.{cmd_name.replace('-', '_')}")
        return cast(click.Command, module.command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first word names; of a misspelt one, say which it may be."""
        name, known = args[0], self.list_commands(ctx)
        if name not in known and not name.startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches

            near = get_close_matches(name, known)
            ctx.fail(
                f"No such command {name!r}; " + (f"near: {', '.join(near)}." if near else "see loraformat --help.")
            )
        return super().resolve_command(ctx, args)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse the words; --help prints here."""
        with _reader_may_leave():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _reader_may_leave():
            return super().invoke(ctx)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, report what went wrong, and exit with the code that stands for it."""
        words = list(sys.argv[1:] if args is None else args)
        screen = Screen(json="--json" in words)
        run = super().main
        sys.exit(
            ending(lambda: run(words, prog_name, complete_var, standalone_mode=False, obj=screen, **extra), screen)
        )


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """End well when nobody reads on, as in `loraformat explain | head -1`; click itself would end with 1."""
    try:
        yield
    except BrokenPipeError:
        raise click.exceptions.Exit(0) from None


@click.group(cls=LazyGroup, context_settings=_CONTEXT)
@common_options
@click.version_option(package_name="loraformat", message="%(prog)s %(version)s", allow_from_autoenv=False)
def root() -> None:
    r"""Merge LoRA adapters into ONNX models and PyTorch checkpoints, without torch.

    \b
    To begin with:
      loraformat demo                                     see a merge, on a small model that it makes
      loraformat inspect FILE                             what an adapter or a model holds
      loraformat merge model.onnx adapter/ --dry-run      what a merge would change
      loraformat merge model.onnx adapter/ -o merged.onnx
      loraformat validate adapters/                       what is wrong with adapters

    Results go to stdout, everything else to stderr. Every option has an environment variable:
    LORAFORMAT_MERGE_JOBS is `merge --jobs`.

    \b
    Exit codes:
      0  done                        4  refused for safety
      1  findings: it does not fit   5  the output could not be written
      2  wrong usage                 70  a bug in loraformat
      3  unreadable or invalid input 130, 143  stopped by a signal
    """
