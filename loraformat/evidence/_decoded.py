"""Quantised weights beside a torch checkpoint: every number within about half a step of the checkpoint's."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind
from loraformat.bases import Site
from loraformat.dtypes import Dtype
from loraformat.encodings import CODED, Coder, Coding
from loraformat.limits import TILE_BYTES
from loraformat.spans import Part, StoredTensor

Array = NDArray[np.float32]

_STEPS: Final = 0.55
"""Half a step, and what the rounding of scales to float16 adds."""
_MOST_STEPS: Final = 1.5
"""Numbers at the ends of the range: quantisers round the zero point too, and cut off what lies beyond the last code."""
_SHARE: Final = 0.98
_ALIKE: Final = 0.9
"""Calibrated quantisers move numbers by more than a step, but not to another direction."""


def read_decoded(site: Site, slot: SlotKind, columns: Sequence[int]) -> tuple[Array, Array]:
    """Return `(rows, len(columns))` of the canonical matrix `(out, in * kernel)`, decoded, and the step of each number.

    Memory is that of the result and one tile.
    """
    assert site.weight is not None, "chosen so"
    assert site.weight.coding is not None, "chosen so"
    coding, tensor = site.weight.coding, site.weight.tensor
    coder = _bind(coding, tensor.dtype)
    height, width = coding.matrix
    part = site.part or Part(coding.matrix, (0, height, 1), (0, width, 1))
    if site.transposed[slot]:
        lines, chosen = np.arange(*part.rows)[list(columns)], np.arange(*part.columns)
        tiles = [range(row, row + 1) for row in lines.tolist()]
    else:
        chosen = np.arange(*part.columns)[list(columns)]
        step = max(1, TILE_BYTES // (4 * width))
        starts = range(part.rows[0], part.rows[1], step)
        tiles = [range(start, min(start + step, part.rows[1])) for start in starts]
    values, steps = [], []
    for rows in tiles:
        out, apart = _decode(coder, coding, tensor, rows)
        values.append(out[:, chosen])
        steps.append(apart[:, chosen])
    decoded, spread = np.concatenate(values), np.concatenate(steps)
    if site.transposed[slot]:
        return decoded.T, spread.T
    stride = part.rows[2]  # Gate and up of an expert may take turns.
    return decoded[::stride], spread[::stride]


def _bind(coding: Coding, form: Dtype) -> Coder:
    encoding = CODED.find(coding.encoding)
    assert encoding is not None, "the base names it"
    return encoding.bind(coding, form)


def _decode(coder: Coder, coding: Coding, tensor: StoredTensor, rows: range) -> tuple[Array, Array]:
    """Return decoded rows of a matrix of codes, and the step of each number; rows that lie together are read so."""
    (height, width), together = coding.matrix, coding.rows_together
    whole = range(rows.start // together * together, min(-(-rows.stop // together) * together, height))
    row_bytes = tensor.span.length // height
    codes = np.empty((len(whole), row_bytes), np.uint8)
    tensor.file.read_into(codes.reshape(-1), tensor.span.offset + whole.start * row_bytes)
    out = np.empty((len(whole), width), np.float32)
    coder.decode(codes, whole, out)
    own = slice(rows.start - whole.start, rows.stop - whole.start)
    return out[own], np.broadcast_to(coder.steps(whole, out), out.shape)[own]


def is_rounded(decoded: Array, steps: Array, reference: Array) -> bool:
    """Say whether decoded numbers are what rounding the reference to codes gives."""
    if decoded.shape != reference.shape or not reference.any():
        return False
    apart = np.abs(decoded - reference)
    near = apart <= _STEPS * steps + 1e-7
    return bool(near.mean() >= _SHARE and (apart <= _MOST_STEPS * steps + 1e-7).all())


def is_alike(decoded: Array, reference: Array) -> bool:
    """Say whether decoded numbers may come from the reference by some way of quantising it."""
    if decoded.shape != reference.shape:
        return False
    lengths = float(np.linalg.norm(decoded)) * float(np.linalg.norm(reference))
    return not lengths or float(np.vdot(decoded, reference)) / lengths > _ALIKE
