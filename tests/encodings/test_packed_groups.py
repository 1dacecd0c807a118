"""compressed-tensors' packed codes with zero points or groups in any order, and MLX's affine codes."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from laws.decoded_laws import DecodedLaws, Stored
from loraformat.encodings.packed_groups import CODED

ROWS, COLUMNS, GROUP = 16, 64, 16


def pack(codes: NDArray[np.int64], bits: int) -> NDArray[np.uint32]:
    per = 32 // bits
    words = np.zeros((len(codes), -(-codes.shape[1] // per)), np.uint32)
    for place in range(per):
        part = codes[:, place::per]
        words[:, : part.shape[1]] |= part.astype(np.uint32) << np.uint32(bits * place)
    return words


def make(bits: int, *, zeros: bool = False, moved: bool = False, firsts: bool = False) -> Stored:
    rng = np.random.default_rng([bits, zeros, moved, firsts])
    codes = rng.integers(0, 1 << bits, (ROWS, COLUMNS))
    scales = rng.uniform(0.01, 0.05, (ROWS, COLUMNS // GROUP)).astype(np.float32)
    order = rng.permutation(COLUMNS) // GROUP if moved else np.arange(COLUMNS) // GROUP
    companions: dict[str, NDArray[np.generic]] = {"scales": scales}
    zero = 0 if firsts else 1 << (bits - 1)
    shift = np.full(scales.shape, float(zero))
    if zeros:
        shift = rng.integers(0, 1 << bits, scales.shape).astype(np.float64)
        companions["zero_points"] = np.ascontiguousarray(pack(shift.astype(np.int64).T, bits).T).view(np.int32)
    if moved:
        companions["order"] = order.astype(np.int32)
    values = (codes - shift[:, order]) * scales.astype(np.float64)[:, order]
    if firsts:
        companions["firsts"] = rng.standard_normal(scales.shape).astype(np.float32)
        values = codes * scales.astype(np.float64)[:, order] + companions["firsts"].astype(np.float64)[:, order]
    stored = pack(codes, bits).view(np.uint8).reshape(ROWS, -1)
    return Stored(f"uint{bits}", stored, companions, (1, GROUP), values, zero)


class TestPackedGroups(DecodedLaws):
    encoding = CODED

    def examples(self) -> Mapping[str, Stored]:
        return {
            "2 bits": make(2),
            "4 bits, zeros": make(4, zeros=True),
            "8 bits, zeros": make(8, zeros=True),
            "4 bits, moved": make(4, moved=True),
            "4 bits, zeros, moved": make(4, zeros=True, moved=True),
            "4 bits of MLX": make(4, firsts=True),
        }

    def widest(self, stored: Stored, row: int, column: int) -> float:
        order = stored.companions.get("order", np.arange(COLUMNS) // GROUP)
        return float(stored.companions["scales"][row, order[column]])
