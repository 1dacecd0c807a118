"""Proof after the fact: a merged model is its base, but for the merged weights, and these are what the adapters give.

The output is described and computed once more, and every byte is compared instead of written.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from loraformat.apply.side_receipt import find_receipt, name_side_receipt
from loraformat.bases import BaseModel, CopyingBase, RunnableBase, ViewedBase, Weight
from loraformat.dtypes import BY_NAME
from loraformat.engine import Effort, carry_out
from loraformat.engine.jobs import Assignment
from loraformat.engine.locating import index_tensors, locate_weight
from loraformat.engine.sinks import CompareSink, Difference
from loraformat.engine.tile_sums import TileSums
from loraformat.errors import refuse
from loraformat.images import Copy, FileImage
from loraformat.output_forms import (
    Order,
    add_biases,
    add_copies,
    describe_output,
    index_weights,
    list_touched,
    require_shared,
)
from loraformat.plan import Plan
from loraformat.plan.weights import PlannedWeight
from loraformat.problems import Problem, count_problems
from loraformat.receipt import check_whole, read_statement
from loraformat.spans import InputFile, StoredTensor
from loraformat.verification.receipts import check_receipt
from loraformat.verification.running import RunResult, compare_runs, list_changes

_LISTED: Final = 8


@dataclass(frozen=True, slots=True)
class Verification:
    """What comparing a merged model with its base and adapters has found.

    Attributes:
        merged: the merged model.
        weights: number of merged weights that were computed once more.
        compared_bytes: bytes that were compared.
        problems: what differs, and where; none for a model that is proven.
        runs: what outputs were compared, where the models were run.
    """

    merged: Path
    weights: int
    compared_bytes: int
    problems: tuple[Problem, ...]
    runs: tuple[RunResult, ...] = ()

    def __repr__(self) -> str:
        """Say what it is in one line."""
        word, said = "holds" if self.holds else "does not hold", count_problems(self.problems)
        return f"<Verification of {str(self.merged)!r}: {word}; {self.weights} weights computed once more; {said}>"

    @property
    def holds(self) -> bool:
        """Whether the model is what its receipt says."""
        return not any(problem.severity == "error" for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        return {
            "merged": str(self.merged),
            "holds": self.holds,
            "weights": self.weights,
            "compared_bytes": self.compared_bytes,
            "problems": [dict(problem.as_json()) for problem in self.problems],
        } | ({"runs": [run.as_json() for run in self.runs]} if self.runs else {})


def verify_merge(merged: BaseModel, base: BaseModel, order: Order, effort: Effort) -> Verification:
    """Compare a merged model with what its base and its adapters give.

    Args:
        merged: the opened merged model.
        base: the opened base.
        order: the plan, made for the merged model's path with the receipt's options, and the adapters.
        effort: how much of the machine to take.

    Raises:
        LoraformatError: LF803 a receipt that is none; what reading the files raises.
    """
    record = find_receipt(merged)
    statement = read_statement(record, merged.path) if record is not None else None
    images = _describe(merged, base, order, statement.room_bytes if statement else 0)
    sinks = [_open_sink(image) for image in images]
    shared = {file.identity for file in base.files} if order.plan.is_sharing else set()
    problems = [*_list_missing(images, sinks), *_list_added(merged, images, shared)]
    present = [(image, sink) for image, sink in zip(images, sinks, strict=True) if sink is not None]
    sums: Sequence[TileSums] = ()
    if len(present) == len(images):
        assignment = Assignment(order.plan, base, order.adapters, images, sinks, checkpoint=order.checkpoint)
        (sums,) = carry_out([assignment], effort)
        for image, sink in present:
            problems += _judge(image, sink, order.plan, base)
    found = [*check_receipt(statement, order.plan, sums)] or check_whole(statement, merged.path)
    problems = [*found, *problems]
    compared = sum(image.size_bytes for image, _ in present)
    return Verification(order.plan.output, sum(bool(w.changes) for w in order.plan.weights), compared, tuple(problems))


def add_runs(
    found: Verification, merged: BaseModel, base: BaseModel, order: Order, sizes: Mapping[str, int]
) -> Verification:
    """Return the verification with what onnxruntime computes from both models; `sizes` are of symbolic dimensions.

    Raises:
        RefusedError: LF446 no ONNX model, no onnxruntime, or a model that it cannot run.
    """
    changes = list_changes(order, base)
    runs: list[RunResult] = []
    problems: list[Problem] = []
    for mark, graph, path in _list_graphs(order.plan, base, merged):
        own = [replace(each, tensor=each.tensor.removeprefix(mark)) for each in changes if each.tensor.startswith(mark)]
        if own or not mark:
            results, odd = compare_runs(graph, path, own, sizes)
            runs += [replace(each, output=f"{mark}{each.output}") for each in results]
            problems += [replace(each, where=f"{mark}{each.where}") for each in odd]
    return replace(found, runs=tuple(runs), problems=(*found.problems, *problems))


def _list_graphs(plan: Plan, base: BaseModel, merged: BaseModel) -> list[tuple[str, RunnableBase, Path]]:
    """Return each graph of a base with what a plan adds: the mark of its names, itself, its merged file."""
    copied = add_biases(plan, add_copies(plan, base) if isinstance(base, CopyingBase) else base)
    if isinstance(copied, ViewedBase) and isinstance(merged, ViewedBase):
        return [(f"{name}:", graph, merged.locate_graph(name)) for name, graph in copied.list_runnable().items()]
    if isinstance(copied, RunnableBase):
        return [("", copied, merged.path)]
    raise refuse("LF446", base.path, f"a base of the format {base.format!r}", "an ONNX model")


def _describe(merged: BaseModel, base: BaseModel, order: Order, room_bytes: int) -> list[FileImage]:
    """Return the files that the merged model should have: with a receipt in them, or beside them."""
    own = {file.path for file in merged.files}
    images = describe_output(order, base, room_bytes, lambda path: path.absolute() not in own)
    beside = name_side_receipt(merged.path)
    if order.plan.is_sharing:
        return [*_describe_shared(merged, base), *images]
    in_place = beside.is_file() and beside.absolute() not in {image.path.absolute() for image in images}
    return _describe_patched(merged, base) if in_place else images


def _describe_shared(merged: BaseModel, base: BaseModel) -> list[FileImage]:
    """Return the data files that a model shares with its base, as the base has them; the very same need no look."""
    folder, same = merged.path.absolute().parent, {file.identity for file in merged.files}
    apart = {name: file for name, file in require_shared(base).list_shared().items() if file.identity not in same}
    return [FileImage(folder / name, [Copy(file, 0, file.size_bytes)], is_kept=True) for name, file in apart.items()]


def _describe_patched(merged: BaseModel, base: BaseModel) -> list[FileImage]:
    """Return the files of a model of one file, or an ONNX model, that was merged in place: those of its base."""
    folder = merged.path.absolute().parent
    names = {file.path: folder / os.path.relpath(file.path, base.path.absolute().parent) for file in base.files}
    names[base.path.absolute()] = merged.path.absolute()
    return [FileImage(names[file.path], [Copy(file, 0, file.size_bytes)]) for file in base.files]


def _open_sink(image: FileImage) -> CompareSink | None:
    return CompareSink(InputFile(image.path)) if image.path.is_file() else None


def _list_missing(images: Sequence[FileImage], sinks: Sequence[CompareSink | None]) -> list[Problem]:
    missing = [image.path for image, sink in zip(images, sinks, strict=True) if sink is None]
    return [Problem("LF804", str(path), "no such file", "a file of the merged model") for path in missing]


def _list_added(merged: BaseModel, images: Sequence[FileImage], shared: Set[tuple[int, int]]) -> list[Problem]:
    expected = {image.path.absolute() for image in images}
    added = [file.path for file in merged.files if file.path not in expected and file.identity not in shared]
    return [Problem("LF804", str(path), "a file that the merge does not write", "no such file") for path in added]


def _judge(image: FileImage, sink: CompareSink, plan: Plan, base: BaseModel) -> list[Problem]:
    """Return a problem for each tensor, or other place, in which a file differs."""
    checksums = {} if plan.rewritten else base.compute_checksums(image, sink.file.descriptor, list_touched(plan, base))
    wrong = [at for at, expected in checksums.items() if sink.file.read(at, len(expected)) != expected]
    problems = [Problem("LF801", f"{image.path} at byte {at}", "a wrong checksum", "a true one") for at in wrong]
    fields = sorted(checksums)
    regions = _Regions(image, plan, base)
    differing: dict[tuple[str, str], Difference] = {}
    for difference in sorted(sink.differences, key=lambda each: each.offset):
        if not _lies_in(difference.offset, fields):
            differing.setdefault(regions.name(difference.offset), difference)
    for (code, name), difference in list(differing.items())[:_LISTED]:
        where = f"{image.path.name}: {name}"
        problems.append(Problem(code, where, f"other bytes, the first at {difference.offset}", _EXPECTED[code]))
    if len(differing) > _LISTED:
        found = f"{len(differing) - _LISTED} more places"
        problems.append(Problem("LF801", image.path.name, found, _EXPECTED["LF801"]))
    return problems


_EXPECTED: Final = {"LF801": "the base's bytes", "LF802": "what base and adapters give"}


def _lies_in(offset: int, fields: Sequence[int]) -> bool:
    """Say whether an offset lies in the checksum (4 bytes) that starts at one of `fields`."""
    index = bisect_right(fields, offset) - 1
    return index >= 0 and offset < fields[index] + 4


class _Regions:
    """Which tensor, or what else, lies at an offset of an output file."""

    def __init__(self, image: FileImage, plan: Plan, base: BaseModel) -> None:
        tensors, weights = index_tensors(base), index_weights(base)
        self._found: list[tuple[int, int, str, str]] = []
        for weight in plan.weights:
            for name, length, offset in _list_written(image, weight, weights, tensors):
                self._found.append((offset, length, "LF802", name))
        touched = {name for *_, name in self._found}
        for tensor in base.list_tensors():
            place = image.locate(tensor.span) if tensor.is_contiguous else None
            if place is not None and tensor.name not in touched:
                self._found.append((place, tensor.span.length, "LF801", tensor.name))
        self._found.sort()

    def name(self, offset: int) -> tuple[str, str]:
        """Return the reason code and the name of what lies at `offset`."""
        index = bisect_right(self._found, (offset, float("inf"), "", "")) - 1
        if index >= 0:
            start, length, code, name = self._found[index]
            if length < 0 or offset < start + length:
                return code, name
        return "LF801", "outside the tensors"


def _list_written(
    image: FileImage, weight: PlannedWeight, weights: Mapping[str, Weight], tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, int, int]]:
    """Yield what of a merged weight lies in a file: its name, bytes, and where; scales and zero points too."""
    with suppress(ValueError):
        yield weight.name, _measure(weight), locate_weight([image], weight, tensors.get(weight.key))[1]
    for each in weight.companions if not weight.is_dequantised else ():
        held = weights[weight.key].coding
        tensor = held.companions.get(each.role) if held is not None else None
        place = image.locate_fresh(each.copy_name) if each.copy_name else None
        if not weight.is_copy and each.is_written and isinstance(tensor, StoredTensor):
            place = image.locate(tensor.span)
        if place is not None:
            yield each.copy_name or each.name, each.nbytes, place


def _measure(weight: PlannedWeight) -> int:
    """Return the bytes of a weight in the output; -1 where nothing else can follow it."""
    if weight.new is not None and (weight.is_dequantised or weight.is_added):
        return BY_NAME[weight.new.dtype].count_bytes(math.prod(weight.new.shape))
    return weight.nbytes if weight.new is None or weight.is_copy else -1
