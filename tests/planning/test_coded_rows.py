"""Rows of a quantised weight by themselves are the same rows of the whole."""

from pathlib import Path

import numpy as np
import pytest

from loraformat.dtypes import BY_NAME
from loraformat.encodings import CODED, Coding
from loraformat.planning.coded_rows import can_cut, cut_coding, locate_rows
from loraformat.spans import HeldTensor, InputFile, Span, StoredTensor

ROWS, COLUMNS = 24, 40


def store(folder: Path, name: str, data: bytes, form: str, elements: int) -> StoredTensor:
    path = folder / name
    path.write_bytes(b"\x55" * 7 + data)
    file = InputFile(path)
    return StoredTensor(name, BY_NAME[form], (elements,), Span(file.path, 7, len(data)), file)


def code(folder: Path, block: tuple[int, int], padded: bool) -> Coding:
    """Return a coding of 4 bits with zero points, padded row by row to whole bytes or at the end."""
    rng = np.random.default_rng(block)
    down, across = -(-ROWS // block[0]), -(-COLUMNS // block[1])
    scales, zeros = rng.uniform(1, 2, (down, across)).astype(np.float32), rng.integers(0, 16, (down, across))
    if padded and across % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)))
    flat = zeros.reshape(-1)
    flat = np.pad(flat, (0, flat.size % 2)).astype(np.uint8)
    packed = (flat[0::2] | flat[1::2] << 4).tobytes()
    companions = {
        "scales": store(folder, f"s{down}-{across}", scales.tobytes(), "float32", scales.size),
        "zero_points": store(folder, f"z{down}-{across}-{padded}", packed, "uint8", len(packed)),
    }
    return Coding("affine4", (ROWS, COLUMNS), block, companions)


@pytest.mark.parametrize("block", [(1, 8), (1, 20), (4, 1), (2, 16), (1, 40), (8, 40)])
@pytest.mark.parametrize("padded", [True, False])
def test_they_decode_alike(tmp_path: Path, block: tuple[int, int], padded: bool) -> None:
    coding, form = code(tmp_path, block, padded), BY_NAME["uint8"]
    encoding = CODED.find("affine4")
    assert encoding is not None
    flattened = not padded and (-(-COLUMNS // block[1])) % 2 == 1
    assert can_cut(coding, 8) == (not flattened)
    if flattened:
        return
    stored = np.random.default_rng(1).integers(0, 256, (ROWS, COLUMNS // 2)).astype(np.uint8)
    whole = np.empty((ROWS, COLUMNS), np.float32)
    coder = encoding.bind(coding, form)
    coder.decode(stored, range(ROWS), whole)
    for start in range(0, ROWS, 8):
        rows = range(start, start + 8)
        part = encoding.bind(cut_coding(coding, rows), form)
        out = np.empty((8, COLUMNS), np.float32)
        part.decode(stored[start : start + 8], range(8), out)
        np.testing.assert_array_equal(out, whole[start : start + 8])
        for role, values in part.tensors().items():
            before = locate_rows(coding, role, rows)
            every = np.ascontiguousarray(coder.tensors()[role]).reshape(-1).view(np.uint8)
            here = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            np.testing.assert_array_equal(every[before : before + here.size], here)


@pytest.mark.parametrize(("block", "tile_rows"), [((ROWS, 1), 8), ((ROWS, COLUMNS), 8), ((4, 1), 6), ((1, 8), ROWS)])
def test_scales_of_other_rows_keep_a_weight_whole(tmp_path: Path, block: tuple[int, int], tile_rows: int) -> None:
    assert not can_cut(code(tmp_path, block, True), tile_rows)


def test_numbers_held_by_the_graph_are_cut_too() -> None:
    held = HeldTensor("s", BY_NAME["float32"], np.arange(48, dtype=np.float32))
    coding = Coding("affine8", (ROWS, COLUMNS), (1, 20), {"scales": held})
    assert can_cut(coding, 8)
    found = cut_coding(coding, range(8, 16)).companions["scales"].read()
    np.testing.assert_array_equal(found.reshape(-1), np.arange(16, 32))
