"""Proof after the fact: a merged model is its base, but for the merged weights, and these are what the adapters give.

The output is described and computed once more, and every byte is compared instead of written.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loraformat.bases import BaseModel
from loraformat.engine import Assignment, Effort, carry_out, index_tensors, locate_weight
from loraformat.images import Copy, FileImage
from loraformat.output_forms import Order, describe_output, list_touched
from loraformat.plan import Plan
from loraformat.problems import Problem
from loraformat.side_receipt import read_side_receipt
from loraformat.sinks import CompareSink, Difference
from loraformat.spans import InputFile

_LISTED: Final = 8


@dataclass(frozen=True, slots=True)
class Verification:
    """What comparing a merged model with its base and adapters has found.

    Attributes:
        merged: the merged model.
        weights: number of merged weights that were computed once more.
        compared_bytes: bytes that were compared.
        problems: what differs, and where; none for a model that is proven.
    """

    merged: Path
    weights: int
    compared_bytes: int
    problems: tuple[Problem, ...]

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
        }


def verify_merge(merged: BaseModel, base: BaseModel, order: Order, effort: Effort) -> Verification:
    """Compare a merged model with what its base and its adapters give.

    Args:
        merged: the opened merged model.
        base: the opened base.
        order: the plan, made for the merged model's path with the receipt's options, and the adapters.
        effort: how much of the machine to take.
    """
    beside = read_side_receipt(merged.path)
    receipt = find_receipt(merged)
    problems = list(check_receipt(receipt, order.plan))
    own = {file.path for file in merged.files}
    if beside is not None and merged.parent_receipt is None:
        images = _describe_patched(merged, base)
    else:
        room = int(receipt.get("room_bytes", 0))
        images = describe_output(order, base, room, lambda path: path.absolute() not in own)
    sinks = [_open_sink(image) for image in images]
    problems += _list_missing(images, sinks)
    present = [(image, sink) for image, sink in zip(images, sinks, strict=True) if sink is not None]
    if len(present) == len(images):
        assignment = Assignment(order.plan, base, order.adapters, images, sinks)
        carry_out([assignment], effort)
        for image, sink in present:
            problems += _judge(image, sink, order.plan, base)
    compared = sum(image.size_bytes for image, _ in present)
    return Verification(order.plan.output, sum(bool(w.changes) for w in order.plan.weights), compared, tuple(problems))


def find_receipt(merged: BaseModel) -> Mapping[str, Any]:
    """Return the receipt that a merged model carries, or that stands beside one merged in place; empty for none."""
    return merged.parent_receipt or read_side_receipt(merged.path) or {}


def _describe_patched(merged: BaseModel, base: BaseModel) -> list[FileImage]:
    """Return the files of a model that was merged in place: those of its base, under its own names."""
    if merged.path.is_dir():
        names = {file.path: merged.path / os.path.relpath(file.path, base.path) for file in base.files}
    else:
        names = {file.path: merged.path.parent / file.path.name for file in base.files}
        names[base.path] = merged.path
    return [FileImage(names[file.path], [Copy(file, 0, file.size_bytes)]) for file in base.files]


def check_receipt(receipt: Mapping[str, Any], plan: Plan) -> Iterator[Problem]:
    """Yield what of a receipt is not as its plan, made again, has it."""
    where = f"{plan.output}: receipt"
    if not receipt:
        yield Problem("LF803", where, "no receipt", "the receipt of a merge")
        return
    stated = [(str(each.get("sha256")), each.get("weight")) for each in receipt.get("adapters", [])]
    found = [(adapter.sha256, adapter.weight) for adapter in plan.adapters]
    if stated != found:
        yield Problem("LF803", f"{where}: adapters", _list_adapters(found), _list_adapters(stated))
    if receipt.get("base", {}).get("structure_sha256") != plan.base["structure_sha256"]:
        yield Problem("LF803", f"{where}: base", "a base of another structure", "the base that the receipt names")
    elif stated == found and receipt["base"].get("name") == plan.base["name"] and receipt["plan_sha256"] != plan.sha256:
        yield Problem("LF803", f"{where}: plan_sha256", plan.sha256, str(receipt.get("plan_sha256")))


def _list_adapters(adapters: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(f"{sha256[:12]}... with weight {weight}" for sha256, weight in adapters) or "none"


def _open_sink(image: FileImage) -> CompareSink | None:
    return CompareSink(InputFile(image.path)) if image.path.is_file() else None


def _list_missing(images: Sequence[FileImage], sinks: Sequence[CompareSink | None]) -> list[Problem]:
    missing = [image.path for image, sink in zip(images, sinks, strict=True) if sink is None]
    return [Problem("LF804", str(path), "no such file", "a file of the merged model") for path in missing]


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
        tensors = index_tensors(base)
        self._found: list[tuple[int, int, str, str]] = []
        for weight in plan.weights:
            try:
                _, offset = locate_weight([image], weight, tensors.get(weight.key))
            except ValueError:
                continue
            length = weight.nbytes if weight.new is None else -1
            self._found.append((offset, length, "LF802", weight.name))
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
