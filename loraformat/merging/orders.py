"""From the arguments of a merge to its order: the plan and what it is made from, where it goes, how it is done."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from loraformat.apply import Work
from loraformat.apply.accounting import check_untouched
from loraformat.apply.in_place import check_no_journal
from loraformat.arguments import (
    AdapterArguments,
    AdapterOptions,
    HintOptions,
    MergeOptions,
    PlanOptions,
    StrPath,
    WorkOptions,
    check_sharing,
    read_effort,
    read_hints,
    wants_anew,
    weigh_adapters,
)
from loraformat.bases import BaseModel
from loraformat.engine import Effort
from loraformat.errors import refuse
from loraformat.evidence import Hints
from loraformat.limits import RETAINED_REFUSE, RETAINED_WARN
from loraformat.loading import list_files, open_base
from loraformat.merging.calibrating import MINMAX, describe_data, make_room, measure_merged
from loraformat.output_forms import Order, require_rewriter, require_shared
from loraformat.outputs import check_apart, check_ending
from loraformat.plan import SHARE, WeightedAdapter
from loraformat.planning import build_plan, default_output
from loraformat.planning.layers import arrange_layers

_USUAL: Final = {"external_data": "copy", "on_quantized": "requantize", "calibration_method": MINMAX}
"""Names of what is done where nothing is asked for."""


def open_sound(base: StrPath) -> BaseModel:
    """Open a base that no killed merge in place has left half done."""
    check_no_journal(Path(base).absolute())
    return open_base(Path(base))


def open_with(
    base: StrPath, adapters: AdapterArguments, options: AdapterOptions
) -> tuple[BaseModel, Sequence[WeightedAdapter]]:
    """Open a base, with its layers as the adapters count them, and the adapters."""
    opened = open_sound(base)
    return arrange_layers(opened, weigh_adapters(adapters, options, opened))


def make_order(base: BaseModel, weighted: Sequence[WeightedAdapter], output: Path, options: MergeOptions) -> Order:
    """Plan a merge; what the options do not say is as `build_plan` has it."""
    others = AdapterOptions.__annotations__.keys() | HintOptions.__annotations__.keys() | {"to"}
    own = PlanOptions.__annotations__.keys() - others
    given: dict[str, Any] = {name: value for name, value in options.items() if name in own}
    hints = read_hints(options)
    given = {name: value for name, value in given.items() if _USUAL.get(name) != value}
    data = given.pop("calibration", None)
    if data is None and given.get("calibration_method") is not None:
        raise refuse("LF628", "--calibration-method", "no data to measure ranges on", "--calibration too")
    if data is not None:
        given |= _calibrate(base, weighted, output, Path(data), (hints, given, read_effort(options)))
    plan = build_plan(base, weighted, output, anew=wants_anew(options.get("to")), hints=hints, **given)
    check_sharing(plan, base, options)
    check_untouched(plan, base)
    return Order(plan, weighted, hints.checkpoint)


def _calibrate(
    base: BaseModel,
    weighted: Sequence[WeightedAdapter],
    output: Path,
    data: Path,
    manner: tuple[Hints, Mapping[str, Any], Effort],
) -> dict[str, Any]:
    """Merge once aside, and return what `build_plan` is to be told of the ranges that the merged model has."""
    hints, given, effort = manner
    stated = {name: value for name, value in given.items() if name not in ("external_data", "accept_ranges")}
    with make_room(output) as room:
        aside = Path(room) / f"merged{base.suffix}"
        plan = build_plan(base, weighted, aside, hints=hints, accept_ranges=True, **stated)
        order, quiet = Order(plan, weighted, hints.checkpoint), replace(effort, progress=None)
        ranges = measure_merged(base, order, data, quiet, given.get("calibration_method") or MINMAX)
    return {"ranges": ranges, "calibration": describe_data(data)}


def choose_output(
    base: BaseModel, weighted: Sequence[WeightedAdapter], output: StrPath | None, options: MergeOptions
) -> Path:
    """Return where the merged model goes."""
    if output is not None:
        return Path(output)
    suffix = form_suffix(base, options)
    if suffix == base.suffix or wants_anew(options.get("to")):
        return default_output(base.path, suffix, weighted)
    return base.path / ("-".join(item.name for item in weighted) + suffix)


def form_suffix(base: BaseModel, options: MergeOptions) -> str:
    """Return the file name ending of the output."""
    if options.get("external_data") == SHARE:
        return require_shared(base).sharing_form.suffix
    return require_rewriter(base).suffix if wants_anew(options.get("to")) else base.suffix


def check_place(order: Order, base: BaseModel, options: MergeOptions) -> None:
    """Refuse an output that is a file which the merge reads (LF602), or whose name says another format (LF837)."""
    for item in order.adapters:
        check_apart(order.plan.output, [file.path for file in list_files(item.adapter)])
    if order.checkpoint is not None:
        check_apart(order.plan.output, [file.path for file in order.checkpoint.files])
    check_ending(order.plan.output, form_suffix(base, options), f"a base of the format {base.format!r}")


def read_work(options: WorkOptions) -> Work:
    """Return how options want the output written, and what they demand of it."""
    return Work(
        read_effort(options),
        min_retained=options.get("min_retained", RETAINED_REFUSE),
        warn_retained=options.get("warn_retained", RETAINED_WARN),
        force=options.get("force", False),
        durable=options.get("durable", False),
        resume=options.get("resume", False),
        link=options.get("link", False),
        keep_undo=options.get("keep_undo", False),
    )
