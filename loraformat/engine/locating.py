"""Where the weights of a plan lie in its output files, and what of these files is copied."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from loraformat.bases import BaseModel, Weight
from loraformat.images import Copy, FileImage, Literal
from loraformat.limits import COPY_CHUNK_BYTES
from loraformat.output_forms import list_written
from loraformat.plan import Plan
from loraformat.plan.weights import PlannedWeight
from loraformat.spans import Span, StoredTensor


def index_tensors(base: BaseModel) -> Mapping[str, StoredTensor]:
    """Return the tensors of a base by the keys of its weights, which in a state dict are their names."""
    named = {tensor.name: tensor for tensor in base.list_tensors()} if base.rewriter is not None else {}
    return named | {site.weight.key: site.weight.tensor for site in base.sites if site.weight is not None}


def locate_weight(images: Sequence[FileImage], weight: PlannedWeight, tensor: StoredTensor | None) -> tuple[int, int]:
    """Return which image holds the merged weight, and where."""
    for index, image in enumerate(images):
        offset = None
        if weight.new is not None:
            offset = image.locate_fresh(weight.new.name)
        elif tensor is not None:
            offset = image.locate(tensor.span)
        if offset is not None:
            return index, offset
    raise ValueError(f"{weight.name} is in no output file")


def locate_span(images: Sequence[FileImage], span: Span) -> tuple[int, int]:
    """Return which image holds a span of the base, and where."""
    for index, image in enumerate(images):
        offset = image.locate(span)
        if offset is not None:
            return index, offset
    raise ValueError(f"{span} is in no output file")


def locate_coded(images: Sequence[FileImage], weight: PlannedWeight, source: Weight) -> Mapping[str, tuple[int, int]]:
    """Return which images hold what is written of a quantised weight, and where: under no role the codes."""
    if not weight.is_copy:
        return {role: locate_span(images, each.span) for role, each in list_written(weight, source).items()}
    names = {"": weight.name} | {each.role: each.copy_name for each in weight.companions if each.copy_name}
    return {role: _locate_fresh(images, name) for role, name in names.items()}


def _locate_fresh(images: Sequence[FileImage], name: str) -> tuple[int, int]:
    for index, image in enumerate(images):
        offset = image.locate_fresh(name)
        if offset is not None:
            return index, offset
    raise ValueError(f"{name} is in no output file")


def list_copies(
    images: Sequence[FileImage], plan: Plan, tensors: Mapping[str, StoredTensor], weights: Mapping[str, Weight]
) -> Iterator[tuple[int, Copy | Literal, int]]:
    """Yield what is to be copied: image, piece, and its offset there; touched spans are left out."""
    touched = [
        (*locate_weight(images, weight, tensors.get(weight.key)), weight.nbytes)
        for weight in plan.weights
        if weight.new is None
    ]
    touched += [
        (*locate_span(images, tensor.span), tensor.span.length)
        for weight in plan.weights
        if weight.is_coded and weight.new is None
        for role, tensor in list_written(weight, weights[weight.key]).items()
        if role
    ]
    touched.sort()
    for index, image in enumerate(images):
        holes = [(offset, offset + length) for where, offset, length in touched if where == index]
        for offset, piece in image.placed():
            if isinstance(piece, Literal):
                yield index, piece, offset
            elif isinstance(piece, Copy):
                yield from ((index, part, start) for start, part in _cut(offset, piece, holes))


def _cut(offset: int, piece: Copy, holes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Copy]]:
    """Yield the parts of `piece`, which lands at `offset`, outside `holes` and at most a chunk long."""
    position, end = offset, offset + piece.length
    for start, stop in [*(hole for hole in holes if offset <= hole[0] < end), (end, end)]:
        while position < start:
            length = min(COPY_CHUNK_BYTES, start - position)
            yield position, replace(piece, offset=piece.offset + position - offset, length=length)
            position += length
        position = max(position, stop)
