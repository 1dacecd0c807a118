"""What a plan says of quantised weights: what goes with the codes, where float numbers are, what becomes of them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from loraformat.bases import BaseModel, DequantisingBase, FloatForm, Weight, WeightFloats, name_companion
from loraformat.dtypes import BlockDtype
from loraformat.encodings import CODED, CodedEncoding, choose_encoding
from loraformat.matching import Match
from loraformat.plan.changes import PlannedChange, PlannedReference
from loraformat.plan.weights import NewForm, PlannedCompanion, PlannedWeight, as_matrix, count_tile_rows
from loraformat.planning.coded_rows import align_rows
from loraformat.problems import Problem
from loraformat.spans import Part

DEQUANTIZE: Final = "dequantize"
_ENOUGH_BITS: Final = 8


def check_codes(changes: Iterable[tuple[Match, Weight, PlannedChange]]) -> Iterator[Problem]:
    """Yield a problem for every change of a weight whose codes are too few to hold a small one, without float ones."""
    for match, weight, change in changes:
        if weight.coding is not None and _find_encoding(weight).is_read_only:
            found = f"{weight.name!r} is stored as {_name_form(weight)}, which is only decoded"
            yield Problem("LF471", match.want.name, found, "--on-quantized dequantize, or the float model")
        elif has_few_bits(weight) and not change.references:
            found = f"{weight.name!r} is stored in codes of {_find_encoding(weight).bits} significant bits"
            yield Problem("LF440", match.want.name, found, "8 bits or more, or its numbers in the base checkpoint")


def has_few_bits(weight: Weight) -> bool:
    """Say whether a weight is quantised so coarsely that decoding, adding and encoding loses what was added."""
    return weight.coding is not None and _find_encoding(weight).bits < _ENOUGH_BITS


def _find_encoding(weight: Weight) -> CodedEncoding:
    encoding = CODED.find(weight.coding.encoding) if weight.coding is not None else None
    assert encoding is not None, "the base names it"
    return encoding


def _name_form(weight: Weight) -> str:
    """Return what people call the codes of a weight."""
    assert weight.coding is not None, "asked before"
    return weight.tensor.dtype.name if isinstance(weight.tensor.dtype, BlockDtype) else weight.coding.encoding


def plan_references(match: Match, found: Sequence[Match]) -> tuple[PlannedReference, ...]:
    """Return where the float numbers of a weight are that is stored in a few bits.

    Args:
        match: the weight in the base.
        found: the same parameter in the base checkpoint.
    """
    apart = match.row_order and any(each.section is not None for each in found)
    if not has_few_bits(match.weight) or apart:
        return ()
    plain = (each for each in found if each.weight.coding is None and each.weight.tensor.dtype.family == "float")
    return tuple(_refer(match, each) for each in plain)


def _refer(match: Match, reference: Match) -> PlannedReference:
    tensor = reference.weight.tensor
    matrix = as_matrix(tensor.shape)
    part = reference.part or Part(matrix, (0, matrix[0], 1), (0, matrix[1], 1))
    return PlannedReference(
        key=reference.weight.key,
        name=reference.weight.name,
        file=tensor.extent.path.name,
        offset=tensor.extent.offset,
        dtype=tensor.dtype.name,
        matrix=part.matrix,
        rows=part.rows,
        columns=part.columns,
        transposed=reference.transposed,
        section=reference.section,
        divisor=match.divisor,
    )


def list_companions(
    weight: Weight, changes: Sequence[PlannedChange], problems: list[Problem], copy: str = "", *, keep_scales: bool
) -> tuple[PlannedCompanion, ...]:
    """Return what goes with the codes of a quantised weight; a warning where scales cannot follow.

    Zero points only change where all numbers are quantised afresh. A copy has its own of what changes.

    Args:
        weight: the base's.
        changes: what is done to it.
        problems: takes the warning.
        copy: the name of a copy of the weight; empty where it changes itself.
        keep_scales: leave scales and zero points.
    """
    coding = weight.coding
    if coding is None:
        return ()
    fixed = coding.fixed or ("" if copy else coding.read_beside)
    if fixed and not keep_scales:
        problems.append(Problem("LF442", weight.name, fixed, "scales of its own", severity="warning"))
    afresh = any(change.references for change in changes) and (copy or not coding.zeros_fixed)
    zeros = coding.companions.get("zero_points")
    follow = afresh and zeros is not None and zeros.dtype.family != "float"  # Those stay where they are, as shifts.
    roles = {"scales", "zero_points"} if follow else {"scales"}
    written = roles if not fixed and not keep_scales else set()
    return tuple(
        PlannedCompanion(
            role,
            each.name,
            each.dtype.name,
            each.dtype.count_bytes(each.elements),
            role in written,
            name_companion(copy, role) if copy and role in written else "",
        )
        for role, each in coding.companions.items()
    )


def make_float(weight: PlannedWeight, base: BaseModel, problems: list[Problem]) -> PlannedWeight:
    """Return the plan of a quantised weight that stands in floats in the output; what speaks against it is kept."""
    found: FloatForm | Problem = Problem(
        "LF619", weight.name, f"a base of the format {base.format!r}", "an ONNX model, or a checkpoint"
    )
    readers = weight.new.readers if weight.new is not None else ()
    if isinstance(base, DequantisingBase):
        found = base.find_float_form(WeightFloats(weight.name, weight.key, readers))
    if isinstance(found, Problem):
        problems.append(found)
        return weight
    encoding = choose_encoding(found.dtype)
    assert encoding is not None, "a form of floats has one"
    new = NewForm(
        found.name,
        found.dtype.name,
        found.shape,
        encoding,
        copied_from=weight.copied_from,
        readers=readers,
        turned=found.turned,
        padding=found.padding,
    )
    return replace(weight, new=new)


def plan_joint_floats(
    base: BaseModel, planned: Sequence[PlannedWeight], problems: list[Problem]
) -> Iterator[PlannedWeight]:
    """Yield the plans of quantised weights that nothing changes, and that stand in floats with those that change."""
    if not isinstance(base, DequantisingBase):
        return
    taken = {weight.key for weight in planned}
    for weight in base.list_joint_floats(taken):
        if isinstance(weight, Problem):
            problems.append(weight)
        elif weight.key not in taken and weight.coding is not None:
            yield make_float(_leave(weight), base, problems)


def _leave(weight: Weight) -> PlannedWeight:
    """Return the plan of a quantised weight that nothing changes."""
    assert weight.coding is not None, "asked before"
    tensor, coding = weight.tensor, weight.coding
    return PlannedWeight(
        key=weight.key,
        name=weight.name,
        file=tensor.span.path.name,
        offset=tensor.span.offset,
        nbytes=tensor.span.length,
        dtype=tensor.dtype.name,
        shape=tensor.shape,
        matrix=coding.matrix,
        encoding=coding.encoding,
        tile_rows=count_tile_rows(coding.matrix, align_rows(coding)),
        changes=(),
        evidence="",
        companions=list_companions(weight, (), [], keep_scales=True),
        block=coding.block,
    )
