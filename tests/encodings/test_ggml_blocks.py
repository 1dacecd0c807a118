"""ggml's forms of few bits: the laws, for three of them whose numbers are told one by one.

`tests/oracles/test_gguf_models.py` compares all of them with the gguf package.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws.decoded_laws import DecodedLaws, Stored
from loraformat.bases import gguf_model
from loraformat.dtypes import BY_GGML
from loraformat.encodings import CODED as ROOM
from loraformat.encodings import Coder, Coding
from loraformat.encodings._ggml_forms import FORMS
from loraformat.encodings.ggml_blocks import CODED

Array = NDArray[Any]
BY_FORM = {form.name: form for form in BY_GGML.values()}
ROWS = 3


def _q4_0(block: bytes) -> list[float]:
    (scale,) = struct.unpack("<e", block[:2])
    packed = block[2:]
    return [(code - 8) * scale for code in (*(each & 15 for each in packed), *(each >> 4 for each in packed))]


def _q4_k(block: bytes) -> list[float]:
    """Scale and least value of part `j` have 6 bits: of the last four parts, the upper two are in the first bytes."""
    scale, least = struct.unpack("<2e", block[:4])
    small, packed, out = block[4:16], block[16:], []
    for part in range(8):
        if part < 4:
            own = small[part] & 63, small[part + 4] & 63
        else:
            own = (
                small[part + 4] & 15 | small[part - 4] >> 6 << 4,
                small[part + 4] >> 4 | small[part] >> 6 << 4,
            )
        for number in range(32):
            code = packed[part // 2 * 32 + number] >> 4 * (part % 2) & 15
            out.append(scale * own[0] * code - least * own[1])
    return out


def _q6_k(block: bytes) -> list[float]:
    low, high, scales = block[:128], block[128:192], struct.unpack("16b", block[192:208])
    (scale,) = struct.unpack("<e", block[208:])
    out = []
    for place in range(256):
        half, within = divmod(place, 128)
        quarter, number = divmod(within, 32)
        lower = low[half * 64 + number + 32 * (quarter % 2)] >> 4 * (quarter // 2) & 15
        upper = high[half * 32 + number] >> 2 * quarter & 3
        out.append(scale * scales[place // 16] * ((lower | upper << 4) - 32))
    return out


TOLD: Mapping[str, tuple[Callable[[bytes], list[float]], tuple[int, ...]]] = {
    "q4_0": (_q4_0, (0,)),
    "q4_k": (_q4_k, (0, 2)),
    "q6_k": (_q6_k, (208,)),
}
"""Forms with what tells the numbers of a block, and the bytes with a float16."""


def _make(name: str) -> Stored:
    rng, (tell, scales), form = np.random.default_rng(len(name)), TOLD[name], BY_FORM[name]
    blocks = rng.integers(0, 256, (ROWS * 2, form.block_bytes)).astype(np.uint8)
    for block, at in ((block, at) for block in blocks for at in scales):
        block[at : at + 2] = np.frombuffer(np.float16(rng.uniform(0.01, 0.02)).tobytes(), np.uint8)
    values = np.array([tell(block.tobytes()) for block in blocks]).reshape(ROWS, -1)
    return Stored(name, blocks.reshape(ROWS, -1), {}, (1, form.block_elements), values)


class TestGgmlBlocks(DecodedLaws):
    encoding = CODED

    def examples(self) -> Mapping[str, Stored]:
        return {name: _make(name) for name in TOLD}

    def bind(self, stored: Stored) -> Coder:
        coding = Coding(self.encoding.name, stored.values.shape, stored.block, {})
        return self.encoding.bind(coding, BY_FORM[stored.form])

    def widest(self, stored: Stored, row: int, column: int) -> float:
        part = FORMS[stored.form].part
        start = column // part * part
        values = np.unique(stored.values[row, start : start + part].round(9))
        return float(np.diff(values).min())


def test_the_base_names_what_reads_each_form() -> None:
    named = {form for form, encoding in gguf_model._ENCODINGS.items() if encoding == CODED.name}
    assert named == set(FORMS) < set(BY_FORM)
    assert all(ROOM.find(encoding) is not None for encoding in gguf_model._ENCODINGS.values())
