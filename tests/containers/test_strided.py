"""Tensors that are no run of bytes, read in parts, against numpy's own indexing."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loraformat.containers._strided import StridedTensor
from loraformat.dtypes import BY_NAME
from loraformat.spans import InputFile, Span


def lay(path: Path, order: tuple[int, ...], shape: tuple[int, ...]) -> tuple[StridedTensor, np.ndarray]:
    """Write numbers whose axes lie in memory in `order`, behind four foreign bytes."""
    whole = np.arange(np.prod(shape), dtype=np.int16).reshape([shape[axis] for axis in order])
    path.write_bytes(b"\xff" * 4 + whole.tobytes())
    array = whole.transpose(np.argsort(order))
    strides = tuple(stride // 2 for stride in array.strides)
    file = InputFile(path)
    extent = Span(file.path, 4, whole.nbytes)
    return StridedTensor("w", BY_NAME["int16"], shape, strides, extent, file), array


@given(data=st.data(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_part_is_what_numpy_cuts_out(data: st.DataObject, shape: list[int], tmp_path: Path) -> None:
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    tensor, array = lay(tmp_path / "bytes", order, tuple(shape))
    matrix = np.ascontiguousarray(array).reshape(shape[0], -1)
    cuts = []
    for size in matrix.shape:
        start = data.draw(st.integers(0, size))
        cuts.append(range(start, data.draw(st.integers(start, size)), data.draw(st.integers(1, 3))))
    rows, columns = cuts
    np.testing.assert_array_equal(tensor.read_part(rows, columns), matrix[np.ix_(rows, columns)])
    np.testing.assert_array_equal(tensor.read_bytes(), matrix.reshape(-1).view(np.uint8))


def test_equality_reads_numbers_not_strides(tmp_path: Path) -> None:
    one, _ = lay(tmp_path / "a", (1, 0), (3, 5))
    other, _ = lay(tmp_path / "b", (1, 0), (3, 5))
    third, _ = lay(tmp_path / "c", (0, 1), (3, 5))
    assert one.equals(other)
    assert not one.equals(third)
