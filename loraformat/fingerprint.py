"""A few sampled numbers of a base weight: they tell the wrong base from the right one (spec/SPEC.md, section 7).

Positions follow from the target's name, so that nobody can choose them, and a weight is known again in either
orientation, after a cast to float16 or bfloat16, and under any name.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from loraformat.spans import Span, StoredTensor

SAMPLES: Final = 16
DISTINCT: Final = 8
"""Fewer distinct samples do not single out a weight: a constant matches any other of the same value."""
_DOMAIN: Final = "loraformat-fingerprint-1"
_RELATIVE: Final = 2.0**-8
_ABSOLUTE: Final = 2.0**-12


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Sampled numbers of one base weight.

    Attributes:
        shape: canonical shape of the weight, `(out, in, *kernel)`.
        samples: 16 numbers as float32, at the positions that `positions` gives.
    """

    shape: tuple[int, ...]
    samples: tuple[float, ...]

    @property
    def is_telling(self) -> bool:
        """Whether it has enough distinct samples to find a weight by."""
        return len(set(self.samples)) >= DISTINCT

    def matches(self, samples: Sequence[float]) -> bool:
        """Say whether another weight's samples at the same positions are these, a cast to 16 bits apart."""
        slack = _ABSOLUTE * max(map(abs, self.samples))
        return all(abs(s - v) <= _RELATIVE * abs(s) + slack for s, v in zip(self.samples, samples, strict=True))


def positions(target: str, shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return the sampled rows and columns of the canonical matrix `(out, in * kernel)` of a target."""
    rows, columns = shape[0], math.prod(shape[1:])
    places = []
    for index in range(SAMPLES):
        digest = hashlib.sha256(f"{_DOMAIN}\n{target}\n{index}".encode()).digest()
        row, column = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")
        places.append((row % rows, column % columns))
    return places


def sample_weight(target: str, shape: Sequence[int], tensor: StoredTensor, *, transposed: bool) -> tuple[float, ...]:
    """Read the samples of a stored weight, sixteen numbers and nothing more.

    Args:
        target: name of the target.
        shape: canonical shape `(out, in, *kernel)`.
        tensor: the stored weight, of a floating-point form.
        transposed: whether the stored matrix is the transpose of the canonical one.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    samples = []
    for row, column in positions(target, shape):
        index = column * rows + row if transposed else row * columns + column
        samples.append(read_number(tensor, index))
    return tuple(samples)


def read_number(tensor: StoredTensor, index: int) -> float:
    """Read one number of a stored tensor, as float32; `index` counts elements in C order."""
    form = tensor.dtype.numpy()
    span = Span(tensor.span.path, tensor.span.offset + index * form.itemsize, form.itemsize)
    one = StoredTensor(tensor.name, tensor.dtype, (1,), span, tensor.file)
    with np.errstate(over="ignore"):
        return float(one.read().astype(np.float32)[0])
