"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from loraformat.limits import DEFAULT_MEMORY_BYTES
from loraformat_cli.params import ByteSize, Finite
from loraformat_cli.screen import COLOUR_MODES, Screen

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def _onto_screen(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Set the screen's attribute of this name; an option that is not given leaves it as it is."""
    if value:
        setattr(ctx.ensure_object(Screen), str(param.name), value)


_SCREEN: dict[str, Any] = {"callback": _onto_screen, "expose_value": False, "is_eager": True}


def common_options(function: Decorated) -> Decorated:
    r"""Add -q, -v and --color, which stand before the command or after it.

    The `\b` of a raw docstring becomes the character by which click knows a paragraph that is not to be wrapped.
    """
    function.__doc__ = (function.__doc__ or "").replace("\\b\n", "\b\n")
    modes = click.Choice(COLOUR_MODES)
    for add in (
        click.option(
            "--color", "color", type=modes, help="Colours; auto heeds NO_COLOR, FORCE_COLOR and TERM.", **_SCREEN
        ),
        click.option("-v", "--verbose", is_flag=True, help="Say more.", **_SCREEN),
        click.option("-q", "--quiet", is_flag=True, help="Print results and errors only.", **_SCREEN),
    ):
        function = add(function)
    return function


def json_option(function: Decorated) -> Decorated:
    """Add --json."""
    return click.option("--json", is_flag=True, help="Print exactly one JSON object on stdout.", **_SCREEN)(function)


def adapter_options(function: Decorated) -> Decorated:
    """Add what a user may have to say about an adapter that does not say it itself."""
    for add in (
        click.option("--scale", type=Finite(), metavar="X", help="The adapter's multiplier, where it states none."),
        click.option(
            "--alpha", type=Finite(), metavar="X", help="lora_alpha of the training run, where it is not stated."
        ),
        click.option("--scheme", metavar="NAME", help="Naming scheme of the adapter, where it cannot be told."),
    ):
        function = add(function)
    return function


def hint_options(function: Decorated) -> Decorated:
    """Add what targets may be found by, besides names."""
    path = click.Path(path_type=Path, readable=False)
    for add in (
        click.option(
            "--base-checkpoint",
            type=path,
            metavar="PATH",
            help="The torch checkpoint that an ONNX base was exported from: finds weights by their numbers, verifies "
            "those found by names, and tells what was folded into them.",
        ),
        click.option(
            "--resolve",
            type=click.Choice(["structure"]),
            help="Find layers by what they do in the graph too, where no name is left: a single stack only.",
        ),
        click.option(
            "--map", type=path, metavar="FILE", help="Which weight a target is, as `loraformat resolve --json` has it."
        ),
    ):
        function = add(function)
    return function


def matching_options(function: Decorated) -> Decorated:
    """Add what decides which targets must find a weight, and by which name."""
    for add in (
        click.option(
            "--ignore-fingerprints",
            is_flag=True,
            default=None,
            help="Accept weights that do not match their target's fingerprint.",
        ),
        click.option(
            "--strip-prefix", metavar="PREFIX", help="Remove this from the front of the adapters' target names."
        ),
        click.option(
            "--allow-unmatched",
            multiple=True,
            metavar="GLOB",
            help="Targets that may be left out, where there is no place for them; repeatable.",
        ),
    ):
        function = add(function)
    return function


def graphs_option(function: Decorated) -> Decorated:
    """Add --graphs."""
    told = "Of a folder of several models, the files that are meant, or folders of them; repeatable.  [default: all]"
    add = click.option(
        "--graphs", multiple=True, metavar="GLOB", callback=lambda _, __, given: given or None, help=told
    )
    return add(function)


def ranges_option(function: Decorated) -> Decorated:
    """Add --accept-ranges."""
    told = "Accept activation ranges that a quantised model has of its base."
    return click.option("--accept-ranges", is_flag=True, default=None, help=told)(function)


def effort_options(function: Decorated) -> Decorated:
    """Add how much of the machine to take."""
    for add in (
        click.option(
            "--max-memory",
            "max_memory_bytes",
            type=ByteSize(),
            metavar="SIZE",
            help=f"Memory for the work in flight, as 256MiB or 2GB.  [default: {DEFAULT_MEMORY_BYTES >> 20}MiB]",
        ),
        click.option(
            "-j", "--jobs", type=click.IntRange(min=1), metavar="N", help="Threads.  [default: by the machine]"
        ),
    ):
        function = add(function)
    return function


def force_option(function: Decorated) -> Decorated:
    """Add --force."""
    return click.option("--force", is_flag=True, help="Replace the output if it exists.")(function)


def check_stated(alpha: float | None, scale: float | None) -> None:
    """Refuse --alpha beside --scale."""
    if alpha is not None and scale is not None:
        raise click.UsageError("Give --alpha or --scale, not both.", click.get_current_context())
