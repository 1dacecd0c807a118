"""Experts of a mixture that are packed into one tensor `(experts, out, in)` or `(experts, in, out)`.

Each expert is offered as a site of its own, on a part of the tensor, under the name that it has in checkpoints that
store experts apart: `<experts>.3.down_proj`. Which way round an expert's matrix lies is a fact about the family;
without one, both readings are offered, of which a matrix that is not square fits one.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from loraformat.adapter import SlotKind
from loraformat.limits import MAX_EXPERTS
from loraformat.spans import Part, StoredTensor

Orientation = Mapping[SlotKind, bool]

_AS_STORED: Final[Orientation] = {SlotKind.LINEAR: False, SlotKind.PARAMETER: False}
_TURNED: Final[Orientation] = {SlotKind.LINEAR: True, SlotKind.PARAMETER: False}

_TURNED_FAMILIES: Final = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
"""`model_type`s whose experts are `(experts, in, out)` (`is_transposed` of transformers' experts)."""

_INTERLEAVED_FAMILIES: Final = frozenset({"gpt_oss", "openai_privacy_filter"})
"""`model_type`s in whose `gate_up_proj` gate and up take turns (`is_concatenated=False`)."""

_GATE_UP: Final = "gate_up_proj"
_MEMBERS: Final = ("gate_proj", "up_proj")


def list_experts(
    tensor: StoredTensor, module: str, parameter: str, model_type: object, *, is_coded: bool = False
) -> Iterator[tuple[str, Part, Orientation]]:
    """Yield the modules in a tensor of packed experts: name, the part that it is, and how that lies.

    Args:
        tensor: of three dimensions, the first of them the experts.
        module: that of the experts.
        parameter: which of its parameters the tensor is.
        model_type: that of `config.json`, None where there is none.
        is_coded: whether they are quantised: then each is `(out, in)`, whatever the family.
    """
    experts, rows, columns = tensor.shape
    if experts > MAX_EXPERTS:
        return
    for expert in range(experts):
        whole = (expert * rows, (expert + 1) * rows, 1)
        part = Part((experts * rows, columns), whole, (0, columns, 1))
        for orientation in [_AS_STORED] if is_coded else _orient(rows, columns, model_type):
            yield f"{module}.{expert}.{parameter}", part, orientation
            if parameter == _GATE_UP and isinstance(model_type, str):
                for name, half in zip(_MEMBERS, _halve(part, orientation, model_type), strict=True):
                    yield f"{module}.{expert}.{name}", half, orientation


def _orient(rows: int, columns: int, model_type: object) -> list[Orientation]:
    """Return how a matrix may lie: as the family has it, and the other way too where a target's shape will tell."""
    known = _TURNED if model_type in _TURNED_FAMILIES else _AS_STORED
    if rows == columns and isinstance(model_type, str):
        return [known]
    return [_AS_STORED, _TURNED]


def _halve(part: Part, orientation: Orientation, model_type: str) -> tuple[Part, Part]:
    """Return the parts of gate and up: the first and the second half of the outputs, or every other one."""
    along_columns = orientation[SlotKind.LINEAR]
    start, stop, _ = part.columns if along_columns else part.rows
    middle = (start + stop) // 2
    lines = ((start, middle, 1), (middle, stop, 1))
    if model_type in _INTERLEAVED_FAMILIES:
        lines = ((start, stop, 2), (start + 1, stop, 2))
    first, second = (
        Part(part.matrix, part.rows, line) if along_columns else Part(part.matrix, line, part.columns) for line in lines
    )
    return first, second
