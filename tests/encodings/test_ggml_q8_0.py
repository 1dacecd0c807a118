"""ggml's Q8_0, by the definition of its quantiser in float64 and whole numbers."""

import numpy as np
import pytest
from numpy.typing import NDArray

from loraformat.dtypes import BY_GGML
from loraformat.encodings import CODED, Coder, Coding
from loraformat.encodings.ggml_q8_0 import CODED as ENCODING

ROWS, COLUMNS = 6, 96
FORM = BY_GGML[8]


@pytest.fixture
def coder() -> Coder:
    return ENCODING.bind(Coding("ggml_q8_0", (ROWS, COLUMNS), (1, 32), {}), FORM)


def quantise(values: NDArray[np.float32]) -> bytes:
    """Return blocks one by one, as `quantize_row_q8_0_ref` of ggml-quants.c makes them."""
    data = b""
    for block in values.reshape(-1, 32):
        scale = np.float32(np.abs(block).max()) / np.float32(127)
        inverse = np.float32(1) / scale if scale else np.float32(0)
        steps = [float(number * inverse) for number in block]
        codes = [int(np.copysign(np.floor(abs(step) + 0.5), step)) for step in steps]
        data += np.float16(scale).tobytes() + np.array(codes, np.int8).tobytes()
    return data


def make() -> NDArray[np.float32]:
    values = np.random.default_rng(5).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    values[2, 32:64] = 0
    return values


def test_its_room_finds_it() -> None:
    assert CODED.find("ggml_q8_0") is ENCODING


def test_blocks_are_those_of_the_quantiser(coder: Coder) -> None:
    out = np.zeros((ROWS, COLUMNS // 32 * 34), np.uint8)
    for rows in (range(4), range(4, ROWS)):
        coder.encode(make()[rows.start : rows.stop], rows, out[rows.start : rows.stop])
    assert out.tobytes() == quantise(make())
    assert len(out.tobytes()) == FORM.count_bytes(ROWS * COLUMNS)


def test_values_are_codes_times_scales_and_encode_to_themselves(coder: Coder) -> None:
    stored = np.frombuffer(quantise(make()), np.uint8).reshape(ROWS, -1)
    found = np.empty((ROWS, COLUMNS), np.float32)
    coder.decode(stored, range(ROWS), found)
    blocks = stored.reshape(-1, 34)
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float64)
    wanted = (blocks[:, 2:].view(np.int8) * scales).reshape(ROWS, COLUMNS)
    np.testing.assert_array_equal(found, wanted)
    assert np.abs(found - make()).max() <= np.abs(make()).max() / 127 * 0.51
    again = np.zeros_like(stored)
    coder.encode(found, range(ROWS), again)
    assert again.tobytes() == stored.tobytes()
    np.testing.assert_allclose(coder.steps(range(ROWS), found)[:, ::32], scales.reshape(ROWS, -1), rtol=1e-6)
