"""bitsandbytes' codes of 4 bits, by the definition of its QuantState."""

import json
from collections.abc import Mapping

import numpy as np

from laws.decoded_laws import DecodedLaws, Stored
from loraformat.encodings.bnb4 import CODED

ROWS, COLUMNS, SIZE = 6, 40, 32
"""Blocks of the flattened weight that begin within rows."""
TABLE = np.sort(np.random.default_rng(1).standard_normal(16)).astype(np.float32)


def make(*, nested: bool) -> Stored:
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 16, (ROWS, COLUMNS))
    packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).astype(np.uint8)
    blocks = -(-ROWS * COLUMNS // SIZE)
    companions = {"table": TABLE}
    if nested:
        inner, outer = rng.integers(0, 256, blocks).astype(np.uint8), rng.uniform(1, 2, 3).astype(np.float32)
        table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        state = json.dumps({"nested_blocksize": 3, "nested_offset": 2.5}).encode()
        companions |= {"scales": inner, "nested_scales": outer, "nested_table": table}
        companions["state"] = np.frombuffer(state, np.uint8)
        scales = table.astype(np.float64)[inner] * outer[np.arange(blocks) // 3] + 2.5
    else:
        companions["scales"] = rng.uniform(0.5, 2, blocks).astype(np.float32)
        scales = companions["scales"].astype(np.float64)
    spread = scales[np.arange(ROWS * COLUMNS) // SIZE].reshape(ROWS, COLUMNS)
    return Stored("uint4", packed, companions, (1, SIZE), TABLE.astype(np.float64)[codes] * spread)


class TestBnb4(DecodedLaws):
    encoding = CODED

    def examples(self) -> Mapping[str, Stored]:
        return {"plain": make(nested=False), "nested": make(nested=True)}

    def widest(self, stored: Stored, row: int, column: int) -> float:
        # The block's scale, from a number of it and the table.
        block = (row * COLUMNS + column) // SIZE
        values = stored.values.reshape(-1)[block * SIZE : (block + 1) * SIZE]
        codes = np.stack([stored.codes >> 4, stored.codes & 15], -1).reshape(-1)[block * SIZE : (block + 1) * SIZE]
        scale = np.median(values / TABLE.astype(np.float64)[codes])
        return float(np.diff(TABLE).max() * scale)
