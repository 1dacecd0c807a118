"""`loraformat demo`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraformat_cli.options import common_options, json_option
from loraformat_cli.screen import Screen

if TYPE_CHECKING:
    from loraformat.demo import DemoReport


@click.command(short_help="Build a small model and an adapter, merge them, and check the result.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path, readable=False),
    metavar="DIR",
    help="Keep the files here: a new or an empty folder.",
)
@json_option
@common_options
@click.pass_obj
def command(screen: Screen, /, keep: Path | None) -> None:
    """Build a small ONNX model and an adapter, merge them, and run the result in onnxruntime.

    The reference is a second graph with the adapter's branches beside each weight, which owes nothing to the
    merge. Ends with exit code 1 if the merged model and the reference differ by more than rounding explains.
    """
    try:
        import onnxruntime  # noqa: F401  # asked for here, so that its absence is told from a fault of ours
    except ImportError as error:
        raise click.UsageError(
            f"The demo runs its models in onnxruntime, which cannot be imported ({error}). "
            "Install it: pip install 'loraformat[cpu]'",
            click.get_current_context(),
        ) from error
    from loraformat.demo import run_demo

    if keep is not None:
        report = run_demo(keep)
    else:
        from tempfile import TemporaryDirectory

        with TemporaryDirectory(prefix="loraformat-demo-") as folder:
            report = run_demo(Path(folder))
    if screen.json:
        screen.document(report.as_json())
    else:
        _show(screen, report, keep)
    if not report.passed:
        screen.error_line(f"the demo failed: {'; '.join(report.failures)}")
        raise click.exceptions.Exit(1)


def _show(screen: Screen, report: "DemoReport", keep: Path | None) -> None:
    same = "the same" if report.nodes_identical else "CHANGED"
    rows = [
        ("base model", f"{report.base_bytes:,} bytes, {report.tensors} tensors, {report.nodes} nodes"),
        ("adapter", f"rank {report.rank}, {report.targets} targets"),
        ("weights rewritten", f"{report.rewritten} of {report.tensors} tensors"),
        ("bytes that differ", f"{report.differing_bytes:,} of {report.tensor_bytes:,} bytes of tensors"),
        ("graph", f"{report.nodes} nodes before, {report.merged_nodes} after: {same}"),
        (
            "largest difference",
            f"{report.difference:.2e}  merged model, against the base with explicit adapter branches",
        ),
        ("allowed difference", f"{report.tolerance:.2e}  for rounding, outputs being up to {report.output_scale:.3g}"),
        ("effect of the adapter", f"{report.effect:.2e}  base without it, against the same reference"),
        ("latency, base", f"{report.base_ms:.3f} ms  median of {report.runs} alternating runs"),
        ("latency, merged", f"{report.merged_ms:.3f} ms"),
        ("latency, base again", f"{report.base_again_ms:.3f} ms  the noise of this machine"),
    ]
    if report.passed:
        rows.append(("passed", "the merged model computes what the base with the adapter beside it does"))
    if keep is not None:
        rows.append(("files", str(keep)))
    screen.table(("", ""), rows)
