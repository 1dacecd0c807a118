"""Quantised weights of an ONNX graph whose codes are no whole numbers: floats of 8 bits, and MatMulBnb4's tables."""

from collections.abc import Mapping
from typing import Final

import numpy as np

from loraformat.bases._onnx.scopes import Visit
from loraformat.bases._onnx.uses import read_attribute
from loraformat.dtypes import BY_NAME
from loraformat.spans import HeldTensor, StoredTensor

FLOATS: Final = frozenset({"float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"})

_NF4: Final = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4: Final = tuple(sign * n / 12 for sign in (1, -1) for n in (0, 0.0625, 8, 12, 4, 6, 2, 3))
"""Values of the codes of MatMulBnb4 (bitsandbytes' `get_4bit_type`)."""


def find_bnb4(holder: Visit, stored: StoredTensor, scales: int) -> tuple[str, tuple[int, int], tuple[int, int]] | None:
    """Return encoding, matrix and block of MatMulBnb4's codes, whose blocks are of the flattened weight."""
    n, k, size = (int(read_attribute(holder.node, name, 0)) for name in ("N", "K", "block_size"))
    if min(n, k, size) <= 0 or k % 2 or stored.span.length * 2 != n * k or scales != -(-n * k // size):
        return None
    return "bnb4", (n, k), (1, size)


def make_table(holder: Visit) -> HeldTensor:
    """Return the values of the codes, which the operator knows by a number."""
    kind = int(read_attribute(holder.node, "quant_type", 1))
    values = np.array(_NF4 if kind == 1 else _FP4, np.float32)
    return HeldTensor("", BY_NAME["float32"], values)


def is_shifted(companions: Mapping[str, StoredTensor | HeldTensor]) -> bool:
    """Say whether zero points beside floats are other than 0."""
    zeros = companions.get("zero_points")
    return zeros is not None and bool(np.any(zeros.read().astype(np.float32) != 0))
