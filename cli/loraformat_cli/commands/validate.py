"""`loraformat validate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import click

from loraformat.reports import list_formats
from loraformat_cli.options import check_stated, common_options, json_option
from loraformat_cli.params import Finite
from loraformat_cli.screen import Screen

if TYPE_CHECKING:
    from loraformat.problems import Severity
    from loraformat.validation import Verdict

_FILE: Final = click.Path(path_type=Path, readable=False)
_STANDARD_OUTPUT: Final = Path("-")


@click.command(short_help="Check adapters, for people and for CI.")
@click.argument("paths", type=_FILE, nargs=-1, required=True, metavar="PATH...")
@click.option("--base", type=_FILE, metavar="FILE", help="A model that the adapters should fit.")
@click.option("--format", "form", type=click.Choice(list_formats()), help="What to print.  [default: text]")
@json_option
@click.option(
    "--fail-on",
    type=click.Choice(("warning", "error")),
    default="error",
    show_default=True,
    help="The least severity that ends with exit code 1.",
)
@click.option("--alpha", type=Finite(), metavar="X", help="lora_alpha of the training run, where it is not stated.")
@click.option("--scale", type=Finite(), metavar="X", help="The adapters' multiplier, where they state none.")
@click.option("-o", "--output", type=_FILE, metavar="FILE", help="Write the report here; - is stdout.")
@click.option("--force", is_flag=True, help="Replace the report if it exists.")
@common_options
@click.pass_obj
def command(
    screen: Screen,
    /,
    paths: tuple[Path, ...],
    base: Path | None,
    form: str | None,
    fail_on: str,
    alpha: float | None,
    scale: float | None,
    output: Path | None,
    force: bool,
) -> None:
    r"""Check adapters without merging them: what a reader or a merge would refuse, and what is odd.

    PATH is a file, a PEFT folder, a folder that is searched for both, or an adapter_config.json alone. Everything that
    is wrong is said at once. The report is all that stdout gets. Ends with exit code 1 when something as grave as
    --fail-on was found.

    \b
    Examples:
      loraformat validate adapters/
      loraformat validate adapter/ --base model.onnx --fail-on warning
      loraformat validate adapters/ --format sarif -o loraformat.sarif
    """
    import loraformat
    from loraformat.reports import Setting, summarise, write_report

    check_stated(alpha, scale)
    form = _choose_format(screen, form)
    verdicts = loraformat.validate(paths, base=base, alpha=alpha, scale=scale)
    severity = cast("Severity", fail_on)
    report = write_report(form, verdicts, Setting(Path.cwd(), severity))
    if output is None or output == _STANDARD_OUTPUT:
        click.echo(report, nl=False)
    else:
        _write(report, output, verdicts, force=force)
    if not screen.json:
        screen.note(summarise(verdicts))
    if any(verdict.reaches(severity) for verdict in verdicts):
        raise click.exceptions.Exit(1)


def _choose_format(screen: Screen, form: str | None) -> str:
    """Return the format; with JSON, errors are told in JSON too."""
    if screen.json and form not in (None, "json"):
        raise click.UsageError(f"Give --json or --format {form}, not both.", click.get_current_context())
    screen.json = screen.json or form == "json"
    return "json" if screen.json else form or "text"


def _write(report: str, output: Path, verdicts: "Sequence[Verdict]", *, force: bool) -> None:
    """Write the report whole or not at all, and never over what was checked."""
    from loraformat.files import write_at
    from loraformat.outputs import PendingOutput, check_output, output_errors

    check_output(output, [verdict.file or verdict.path for verdict in verdicts], force=force)
    with PendingOutput([output], force=force) as pending:
        with output_errors(output):
            write_at(pending.descriptors[0], report.encode("utf-8", "backslashreplace"), 0)
        pending.commit()
