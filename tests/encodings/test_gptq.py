"""GPTQ's words, packed by hand; `tests/oracles/test_quantised_checkpoints.py` has AutoGPTQ's own."""

from collections.abc import Mapping

import numpy as np

from laws.decoded_laws import DecodedLaws, Stored
from loraformat.encodings.gptq import CODED

IN, OUT, GROUP = 64, 32, 32


def make(bits: int, *, moved: bool = False, first: bool = True) -> Stored:
    rng, per = np.random.default_rng(bits), 32 // bits
    codes = rng.integers(0, 1 << bits, (IN, OUT))
    zeros = rng.integers(1, 1 << bits, (IN // GROUP, OUT))
    scales = rng.uniform(0.01, 0.05, zeros.shape).astype(np.float16)
    words, packed = np.zeros((IN // per, OUT), np.uint32), np.zeros((len(zeros), OUT // per), np.uint32)
    for place in range(per):
        words |= codes[place::per].astype(np.uint32) << np.uint32(bits * place)
        packed |= (zeros[:, place::per] - first).astype(np.uint32) << np.uint32(bits * place)
    order = rng.permutation(IN) // GROUP if moved else np.arange(IN) // GROUP
    companions = {"scales": scales, "zero_points": packed.view(np.int32)}
    if moved:
        companions["order"] = order.astype(np.int32)
    values = (codes - zeros[order]) * scales.astype(np.float64)[order]
    stored = words.view(np.uint8).reshape(IN, -1)
    return Stored(f"uint{bits}", stored, companions, (GROUP, 1), values, int(first), per)


class TestGptq(DecodedLaws):
    encoding = CODED

    def examples(self) -> Mapping[str, Stored]:
        kinds = {f"{bits} bits": make(bits) for bits in (2, 4, 8)}
        return kinds | {"moved": make(4, moved=True), "second version": make(4, first=False)}

    def widest(self, stored: Stored, row: int, column: int) -> float:
        order = stored.companions.get("order", np.arange(IN) // GROUP)
        return float(stored.companions["scales"][order[row], column])
