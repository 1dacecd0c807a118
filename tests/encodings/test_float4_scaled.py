"""MXFP4 and NVFP4, their numbers by ml_dtypes."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from laws.decoded_laws import DecodedLaws, Stored
from loraformat.encodings.float4_scaled import CODED

ROWS, COLUMNS = 5, 64


def make(kind: str) -> Stored:
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 16, (ROWS, COLUMNS)).astype(np.uint8)
    numbers = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    size = 32 if kind == "mxfp4" else 16
    if kind == "mxfp4":
        scales = rng.integers(120, 134, (ROWS, COLUMNS // size)).astype(np.uint8)
        held, factor = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64), 1.0
        companions = {"scales": scales}
    else:
        scales = rng.uniform(1, 400, (ROWS, COLUMNS // size)).astype(ml_dtypes.float8_e4m3fn)
        inner, held = np.array([0.37], np.float32), scales.astype(np.float64)
        factor = 1 / float(inner[0]) if kind == "divided" else float(inner[0])
        companions = {"scales": scales, "global_divisor" if kind == "divided" else "global_factor": inner}
    values = numbers * np.repeat(held * factor, size, axis=1)
    return Stored("uint4", packed, companions, (1, size), values)


class TestFloat4(DecodedLaws):
    encoding = CODED

    def examples(self) -> Mapping[str, Stored]:
        return {kind: make(kind) for kind in ("mxfp4", "divided", "multiplied")}

    def widest(self, stored: Stored, row: int, column: int) -> float:
        size = stored.block[1]
        start = column // size * size
        largest = np.abs(stored.values[row, start : start + size]).max()
        assert largest > 0
        scales = stored.companions["scales"][row : row + 1, column // size : column // size + 1]
        held = scales.view(ml_dtypes.float8_e8m0fnu) if scales.dtype == np.uint8 else scales
        factor = stored.companions.get("global_factor", [1.0])[0] / stored.companions.get("global_divisor", [1.0])[0]
        return float(held.astype(np.float64)[0, 0] * factor * 2)
