"""The functions of the public face that merge, prove and undo."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, cast

from loraformat.apply import Work, apply_plan, apply_plans
from loraformat.arguments import (
    AdapterArgument,
    AdapterOptions,
    EffortOptions,
    HintOptions,
    MergeOptions,
    PlanOptions,
    StrPath,
    VerifyOptions,
    WorkOptions,
    make_effort,
    read_hints,
    wants_anew,
    weigh_adapters,
)
from loraformat.bases import BaseModel
from loraformat.engine import Effort
from loraformat.errors import refuse
from loraformat.in_place import check_no_journal, merge_in_place
from loraformat.limits import RETAINED_REFUSE, RETAINED_WARN
from loraformat.loading import list_files, open_base
from loraformat.output_forms import Order, require_rewriter
from loraformat.outputs import check_apart
from loraformat.plan import Plan, WeightedAdapter
from loraformat.planning import build_plan, default_output
from loraformat.receipt import Receipt
from loraformat.unmerging import Undone, undo_merge
from loraformat.verification import Verification, find_receipt, verify_merge


def plan_merge(
    base: StrPath,
    adapters: Sequence[AdapterArgument],
    output: StrPath | None = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """Return what `merge` would do with the same arguments; reads no weight of the base and writes nothing."""
    opened = _open(base)
    weighted = weigh_adapters(adapters, options)
    return _plan(opened, weighted, _place(opened, weighted, output, options), options)


def merge(
    base: StrPath,
    adapters: Sequence[AdapterArgument],
    output: StrPath | None = None,
    **options: Unpack[MergeOptions],
) -> Receipt:
    """Merge adapters into a copy of a base model: its numbers change, its structure does not.

    Args:
        base: an ONNX model, a PyTorch checkpoint (`.safetensors`, `.bin`, `.pt`, `.npz`) or a model folder.
        adapters: paths or loaded adapters, each alone or as `(adapter, weight)`; their deltas are summed in float32 and
            rounded once.
        output: the merged model; None names it after base and adapters, beside the base.
        options: `arguments.PlanOptions` and `arguments.WorkOptions` say what there is.

    Returns:
        What was done; `receipt.output` is the path of the merged model.

    Raises:
        LoraformatError: with every problem that was found; the output is what it was before.
    """
    opened = _open(base)
    weighted = weigh_adapters(adapters, options)
    plan = _plan(opened, weighted, _place(opened, weighted, output, options), options)
    _check_apart(plan.output, weighted)
    return apply_plan(plan, opened, weighted, _make_work(options))


def merge_each(
    base: StrPath,
    adapters: Sequence[AdapterArgument],
    folder: StrPath,
    **options: Unpack[MergeOptions],
) -> list[Receipt]:
    """Merge each of several adapters into a copy of its own, reading the base once.

    Args:
        base: as in `merge`.
        adapters: as in `merge`; they must have different names.
        folder: where the merged models go, each named after its adapter; it is made if it is missing.
        options: as in `merge`.

    Raises:
        LoraformatError: nothing of any output remains then.
    """
    opened = _open(base)
    weighted = weigh_adapters(adapters, options)
    suffix = _form_suffix(opened, options)
    names = [f"{item.name}{suffix}" for item in weighted]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise refuse("LF601", str(folder), f"several adapters called {', '.join(twice)}", "a name for each")
    place = Path(folder)
    orders = [
        Order(_plan(opened, [item], place / name, options), [item]) for item, name in zip(weighted, names, strict=True)
    ]
    for order in orders:
        _check_apart(order.plan.output, order.adapters)
    place.mkdir(exist_ok=True)
    return apply_plans(opened, orders, _make_work(options))


def merge_into(base: StrPath, adapters: Sequence[AdapterArgument], **options: Unpack[MergeOptions]) -> Receipt:
    """Merge adapters into the base's own files; a journal takes the model back when the merge fails or is killed.

    Args:
        base: as in `merge`; its files are overwritten.
        adapters: as in `merge`.
        options: as in `merge`; `keep_undo` keeps the overwritten bytes, so that `unmerge` is exact.
    """
    opened = _open(base)
    weighted = weigh_adapters(adapters, options)
    plan = _plan(opened, weighted, opened.path, options)
    keep = options.get("keep_undo", False)
    return merge_in_place(opened, Order(plan, weighted), _make_work(options), keep_undo=keep)


def verify(
    merged: StrPath,
    base: StrPath,
    adapters: Sequence[AdapterArgument],
    **options: Unpack[VerifyOptions],
) -> Verification:
    """Prove that a merged model is its base but for the merged weights, and these what the adapters give.

    Args:
        merged: the merged model.
        base: the base that it was made from.
        adapters: the adapters, in the order of the merge; those without a weight take it from the model's receipt.
        options: `arguments.VerifyOptions` says what there is.

    Raises:
        LoraformatError: a model or an adapter that cannot be read, or that no longer makes a plan.
    """
    opened, proof = _open(base), _open(merged)
    receipt = find_receipt(proof)
    stated = [float(each["weight"]) for each in receipt.get("adapters", [])]
    known = len(stated) == len(adapters)
    pairs = [
        each if isinstance(each, tuple) or not known else (each, weight)
        for each, weight in zip(adapters, stated if known else [1.0] * len(adapters), strict=True)
    ]
    weighted = weigh_adapters(pairs, options)
    hints = read_hints(cast(HintOptions, options))
    plan = build_plan(opened, weighted, proof.path, hints=hints, **receipt.get("options", {}))
    return verify_merge(proof, opened, Order(plan, weighted), _make_effort(options))


def unmerge(
    model: StrPath,
    output: StrPath | None = None,
    *,
    adapters: Sequence[AdapterArgument] = (),
    **options: Unpack[MergeOptions],
) -> Undone:
    """Undo a merge: exactly, from a journal or from what `keep_undo` kept, or by subtracting the adapters.

    Args:
        model: the merged model, or one that a killed merge in place has left half done.
        output: where the restored model goes; None for a model that was merged in place, which is restored in place.
        adapters: what was merged, for a subtraction; used where no bytes were kept.
        options: as in `merge`.

    Raises:
        LoraformatError: LF622 nothing to undo it with.
    """
    opened = open_base(Path(model))
    place = Path(output) if output is not None else None
    undone = undo_merge(opened, place, _make_work(options))
    if undone is not None:
        return undone
    if not adapters:
        raise refuse("LF622", str(model), "no journal, no kept bytes and no adapters", "one of them")
    negated = [replace(item, weight=-item.weight) for item in weigh_adapters(adapters, options)]
    plan = _plan(opened, negated, _place(opened, negated, output, options), options)
    receipt = apply_plan(plan, opened, negated, _make_work(options))
    return Undone(Path(receipt.output), exact=False, restored_bytes=sum(w.nbytes for w in plan.weights))


def _open(base: StrPath) -> BaseModel:
    """Open a base that no killed merge in place has left half done."""
    check_no_journal(Path(base).absolute())
    return open_base(Path(base))


def _plan(
    base: BaseModel, weighted: Sequence[WeightedAdapter], output: Path, options: PlanOptions | MergeOptions
) -> Plan:
    """Plan a merge; what the options do not say is as `build_plan` has it."""
    others = AdapterOptions.__annotations__.keys() | HintOptions.__annotations__.keys() | {"to"}
    own = PlanOptions.__annotations__.keys() - others
    given: dict[str, Any] = {name: value for name, value in options.items() if name in own}
    hints = read_hints(cast(HintOptions, options))
    return build_plan(base, weighted, output, anew=wants_anew(options.get("to")), hints=hints, **given)


def _place(
    base: BaseModel, weighted: Sequence[WeightedAdapter], output: StrPath | None, options: PlanOptions | MergeOptions
) -> Path:
    """Return where the merged model goes."""
    return Path(output) if output is not None else default_output(base.path, _form_suffix(base, options), weighted)


def _form_suffix(base: BaseModel, options: PlanOptions | MergeOptions) -> str:
    """Return the file name ending of the output."""
    return require_rewriter(base).suffix if wants_anew(options.get("to")) else base.suffix


def _check_apart(output: Path, weighted: Sequence[WeightedAdapter]) -> None:
    for item in weighted:
        check_apart(output, [file.path for file in list_files(item.adapter)])


def _make_effort(options: EffortOptions | VerifyOptions | WorkOptions | MergeOptions) -> Effort:
    own = {name: value for name, value in options.items() if name in EffortOptions.__annotations__}
    return make_effort(**cast(EffortOptions, own))


def _make_work(options: WorkOptions | MergeOptions) -> Work:
    return Work(
        _make_effort(options),
        min_retained=options.get("min_retained", RETAINED_REFUSE),
        warn_retained=options.get("warn_retained", RETAINED_WARN),
        force=options.get("force", False),
        durable=options.get("durable", False),
        resume=options.get("resume", False),
        link=options.get("link", False),
        keep_undo=options.get("keep_undo", False),
    )
