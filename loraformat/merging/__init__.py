"""The functions of the public face that merge, prove and undo."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Unpack

from loraformat.apply import apply_order, apply_plans
from loraformat.apply.side_receipt import find_receipt
from loraformat.arguments import (
    AdapterArgument,
    AdapterArguments,
    MergeOptions,
    ResolveOptions,
    StrPath,
    VerifyOptions,
    check_options,
    list_adapters,
    read_effort,
    read_hints,
    require_adapters,
    weigh_adapters,
)
from loraformat.errors import error_for, refuse
from loraformat.kinds import Nature
from loraformat.loading import open_base
from loraformat.merging.calibrating import MINMAX, check_measured
from loraformat.merging.orders import (
    check_place,
    choose_output,
    form_suffix,
    make_order,
    open_sound,
    open_with,
    read_work,
)
from loraformat.output_forms import Order
from loraformat.outputs import output_errors
from loraformat.plan import Plan, WeightedAdapter
from loraformat.planning import build_plan
from loraformat.receipt import Receipt, Statement, check_whole, read_statement

if TYPE_CHECKING:
    from loraformat.merging.unmerging import Undone
    from loraformat.resolving import Resolved
    from loraformat.verification import Verification

_RESOLVING: Final = ("allow_unmatched", "strip_prefix", "ignore_fingerprints", "graphs")


def plan_merge(
    base: StrPath,
    adapters: AdapterArguments,
    output: StrPath | None = None,
    **options: Unpack[MergeOptions],
) -> Plan:
    """Return what `merge` would do with the same arguments; reads no weight of the base and writes nothing."""
    check_options("plan_merge", options, MergeOptions)
    opened, weighted = open_with(base, adapters, options)
    require_adapters(weighted, opened)
    if options.get("calibration") is not None:  # It takes a merge to measure ranges.
        options = {**options, "calibration": None, "calibration_method": None, "accept_ranges": True}
    order = make_order(opened, weighted, choose_output(opened, weighted, output, options), options)
    check_place(order, opened, options)
    return order.plan


def merge(
    base: StrPath,
    adapters: AdapterArguments,
    output: StrPath | None = None,
    **options: Unpack[MergeOptions],
) -> Receipt:
    """Merge adapters into a copy of a base model: its numbers change, its structure does not.

    Args:
        base: an ONNX model, a PyTorch checkpoint (`.safetensors`, `.bin`, `.pt`, `.npz`) or a model folder.
        adapters: paths or loaded adapters, each alone or as `(adapter, weight)`; their deltas are summed in float32 and
            rounded once. One alone need not be in a list.
        output: the merged model; None names it after base and adapters, beside the base.
        options: `arguments.PlanOptions` and `arguments.WorkOptions` say what there is.

    Returns:
        What was done; `receipt.output` is the path of the merged model.

    Raises:
        LoraformatError: with every problem that was found; the output is what it was before.
    """
    check_options("merge", options, MergeOptions)
    opened, weighted = open_with(base, adapters, options)
    require_adapters(weighted, opened)
    order = make_order(opened, weighted, choose_output(opened, weighted, output, options), options)
    check_place(order, opened, options)
    return apply_order(opened, order, read_work(options))


def merge_each(
    base: StrPath,
    adapters: AdapterArguments,
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
    check_options("merge_each", options, MergeOptions)
    opened, weighted = open_with(base, adapters, options)
    require_adapters(weighted, opened)
    suffix = form_suffix(opened, options)
    names = [f"{item.name}{suffix}" for item in weighted]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise refuse("LF601", str(folder), f"several adapters called {', '.join(twice)}", "a name for each")
    place = Path(folder)
    orders = [make_order(opened, [item], place / name, options) for item, name in zip(weighted, names, strict=True)]
    for order in orders:
        check_place(order, opened, options)
    with _make_folder(place):
        return apply_plans(opened, orders, read_work(options))


@contextmanager
def _make_folder(folder: Path) -> Iterator[None]:
    """Make a folder if it is missing; it goes again on failure if nothing is in it."""
    existed = folder.is_dir()
    with output_errors(folder):
        folder.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if not existed:
            with suppress(OSError):
                folder.rmdir()
        raise


def merge_into(base: StrPath, adapters: AdapterArguments, **options: Unpack[MergeOptions]) -> Receipt:
    """Merge adapters into the base's own files; a journal takes the model back when the merge fails or is killed.

    Args:
        base: as in `merge`; its files are overwritten.
        adapters: as in `merge`.
        options: as in `merge`; `keep_undo` keeps the overwritten bytes, so that `unmerge` is exact.
    """
    from loraformat.apply.in_place import merge_in_place  # here, as below: a plain merge needs none of it

    check_options("merge_into", options, MergeOptions)
    opened, weighted = open_with(base, adapters, options)
    require_adapters(weighted, opened)
    return merge_in_place(opened, make_order(opened, weighted, opened.path, options), read_work(options))


def resolve_targets(base: StrPath, adapter: AdapterArgument, **options: Unpack[ResolveOptions]) -> "Resolved":
    """Say which weight of a base each target of an adapter is, and how that is known; nothing is merged.

    Args:
        base: as in `merge`.
        adapter: path or loaded adapter.
        options: `arguments.ResolveOptions` says what there is.

    Returns:
        The targets with their weights, and problems of those without; what does not resolve is returned, never raised.
    """
    from loraformat.resolving import resolve_one

    check_options("resolve_targets", options, ResolveOptions)
    opened, (item,) = open_with(base, [adapter], options)
    given: dict[str, Any] = {name: options[name] for name in _RESOLVING if name in options}
    return resolve_one(opened, item, read_hints(options), given)


def verify(
    merged: StrPath,
    base: StrPath,
    adapters: AdapterArguments,
    **options: Unpack[VerifyOptions],
) -> "Verification":
    """Prove that a merged model is its base but for the merged weights, and these what the adapters give.

    Args:
        merged: the merged model.
        base: the base that it was made from.
        adapters: the adapters, in the order of the merge; those without a weight take it from the model's receipt.
        options: `arguments.VerifyOptions` says what there is.

    Raises:
        LoraformatError: a model or an adapter that cannot be read, or that no longer makes a plan.
    """
    from loraformat.verification import add_runs, verify_merge

    check_options("verify", options, VerifyOptions)
    proof = open_sound(merged)
    record = find_receipt(proof)
    statement = read_statement(record, proof.path) if record is not None else None
    opened, weighted = open_with(base, _take_weights(adapters, statement), options)
    hints = read_hints(options)
    plan = build_plan(opened, weighted, proof.path, hints=hints, **(statement.options if statement else {}))
    order = Order(plan, weighted, hints.checkpoint)
    found = verify_merge(proof, opened, order, read_effort(options))
    if (data := options.get("calibration")) is not None:
        method = str(plan.options.get("calibration_method", MINMAX))
        problems = check_measured(proof, plan, Path(data), method)
        found = replace(found, problems=(*found.problems, *problems))
    return add_runs(found, proof, opened, order, options.get("sizes", {})) if options.get("run") else found


def _take_weights(adapters: AdapterArguments, statement: Statement | None) -> list[AdapterArgument]:
    """Return adapters, those without a weight with the one that the receipt has at their place."""
    listed = list_adapters(adapters)
    if statement is None or len(statement.adapters) != len(listed):
        return listed
    weights = (weight for *_, weight in statement.adapters)
    return [each if isinstance(each, tuple) else (each, weight) for each, weight in zip(listed, weights, strict=True)]


def unmerge(
    model: StrPath,
    output: StrPath | None = None,
    *,
    adapters: AdapterArguments = (),
    **options: Unpack[MergeOptions],
) -> "Undone":
    """Undo a merge: exactly, from a journal or from what `keep_undo` kept, or by subtracting the adapters.

    Args:
        model: the merged model, or one that a killed merge in place has left half done.
        output: where the restored model goes, with the receipt that the base had, if any; None for a model that was
            merged in place, which is restored in place.
        adapters: what was merged, for a subtraction; used where no bytes were kept.
        options: as in `merge`.

    Raises:
        LoraformatError: LF622 nothing to undo it with.
    """
    from loraformat.merging.unmerging import Undone, take_back, undo_merge

    check_options("unmerge", options, MergeOptions)
    place = Path(output) if output is not None else None
    undone = take_back(Path(model).absolute(), place)
    if undone is not None:
        return undone
    opened = open_base(Path(model))
    undone = undo_merge(opened, place, read_work(options))
    if undone is not None:
        return undone
    if not adapters:
        raise refuse("LF622", str(model), "no journal, no kept bytes and no adapters", "one of them")
    record = find_receipt(opened)
    statement = read_statement(record, opened.path) if record is not None else None
    weighted = weigh_adapters(_take_weights(adapters, statement), options, opened)
    if statement is not None:
        _check_stated(statement, weighted, opened.path)
    negated = [replace(item, weight=-item.weight) for item in weighted]
    # Fingerprints, and a checkpoint, are of the base's numbers, which the model no longer has.
    given: MergeOptions = {**options, "ignore_fingerprints": True, "base_checkpoint": None}
    order = make_order(opened, negated, choose_output(opened, negated, output, options), given)
    for weight in order.plan.weights:
        if any(change.nature is not Nature.ADDITIVE for change in weight.changes):
            raise refuse("LF622", weight.name, "values that were put in place of the base's", "what was added to them")
    check_place(order, opened, options)
    receipt = apply_order(opened, order, read_work(options))
    return Undone(Path(receipt.output), exact=False, restored_bytes=sum(w.nbytes for w in order.plan.weights))


def _check_stated(statement: Statement, weighted: Sequence[WeightedAdapter], model: Path) -> None:
    """Refuse to subtract what the model's last merge has not added, or may not have (LF803)."""
    if broken := check_whole(statement, model):
        raise error_for(broken)
    stated = {(sha256, weight) for _, sha256, weight in statement.adapters}
    for item in weighted:
        if (item.adapter.sha256, item.weight) not in stated:
            found = f"{item.name} ({item.adapter.sha256:.12}...) with weight {item.weight:g}"
            names = ", ".join(
                f"{name} ({sha256:.12}...) with {weight:g}" for name, sha256, weight in statement.adapters
            )
            raise refuse("LF803", f"{model}: receipt: adapters", found, names)
