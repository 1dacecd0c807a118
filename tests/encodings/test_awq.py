"""AWQ's words, packed by hand; `tests/oracles/test_quantised_checkpoints.py` has AutoAWQ's own decoding."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from laws.decoded_laws import DecodedLaws, Stored
from loraformat.encodings.awq import CODED

IN, OUT, GROUP = 12, 32, 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs is in each place of a word (AutoAWQ, `awq/modules/linear/gemm.py`)."""


def pack(codes: NDArray[np.int64]) -> NDArray[np.int32]:
    words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for place, own in enumerate(ORDER):
        words |= codes[:, own::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


class TestAwq(DecodedLaws):
    encoding = CODED

    def examples(self) -> Mapping[str, Stored]:
        rng = np.random.default_rng(3)
        codes, zeros = rng.integers(0, 16, (IN, OUT)), rng.integers(0, 16, (IN // GROUP, OUT))
        scales = rng.uniform(0.01, 0.05, zeros.shape).astype(np.float16)
        groups = np.arange(IN) // GROUP
        values = (codes - zeros[groups]) * scales.astype(np.float64)[groups]
        companions = {"scales": scales, "zero_points": pack(zeros)}
        return {"4 bits": Stored("uint4", pack(codes).view(np.uint8), companions, (GROUP, 1), values)}

    def widest(self, stored: Stored, row: int, column: int) -> float:
        return float(stored.companions["scales"][row // GROUP, column])
