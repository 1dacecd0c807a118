"""Operations of conversion: each against numpy, each undone by its undoing, and none reading before it must."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from builders import MemoryFactor
from loraformat.derived import DerivedFactor, NewFactor, derive, find_origins, list_steps
from loraformat.operations import BlockDiagonal, Concatenate, Pad, Reshape, Scale, Take, Transpose
from loraformat.row_orders import Permute, SwapHalves

FORMS = (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float64, np.int8)


def numbers(shape: tuple[int, ...], form: Any = np.float32) -> NDArray[Any]:
    """Return arbitrary bits of a form, NaNs with payloads among them."""
    size = int(np.prod(shape)) * np.dtype(form).itemsize
    return np.random.default_rng(size).integers(0, 256, size, np.uint8).view(form).reshape(shape)


def stored(shape: tuple[int, ...], form: Any = np.float32) -> MemoryFactor:
    return MemoryFactor("t", numbers(shape, form))


def bits(array: NDArray[Any]) -> tuple[object, ...]:
    return array.dtype, array.shape, array.tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_moves_do_not_look_at_the_numbers(form: Any) -> None:
    source = stored((6, 4), form)
    whole = source.array
    made = {
        Transpose(): whole.T,
        Reshape((3, 8)): whole.reshape(3, 8),
        Take(1, 4): whole[1:4],
        Take(1, 3, axis=1): whole[:, 1:3],
        SwapHalves(): np.concatenate([whole[3:], whole[:3]]),
        Permute((3, 2), (1, 0)): whole[[0, 2, 4, 1, 3, 5]],
        Pad(1, 2): np.concatenate([np.zeros((1, 4), form), whole, np.zeros((2, 4), form)]),
    }
    for operation, expected in made.items():
        factor = derive(operation, source)
        assert bits(factor.read()) == bits(np.ascontiguousarray(expected)), str(operation)
        assert (factor.shape, factor.dtype) == (expected.shape, source.dtype)


def test_parts_together() -> None:
    one, two = stored((2, 3)), stored((4, 3))
    assert bits(derive(Concatenate(), one, two).read()) == bits(np.concatenate([one.array, two.array]))
    block = derive(BlockDiagonal(), one, two)
    expected = np.zeros((6, 6), np.float32)
    expected[:2, :3], expected[2:, 3:] = one.array, two.array
    assert bits(block.read()) == bits(expected)


def test_a_block_without_columns_is_rows_of_zeros() -> None:
    """What stands for a part that was not trained."""
    none = NewFactor("zeros", np.zeros((4, 0), np.float32))
    made = derive(BlockDiagonal(), stored((2, 3)), none).read()
    assert made.shape == (6, 3)
    assert not made[2:].any()


def test_interleaving_is_that_of_rotary_embeddings() -> None:
    """transformers' permutation for Llama: view(heads, 2, half).transpose(1, 2)."""
    heads, half = 3, 2
    rows = np.arange(heads * 2 * half, dtype=np.float32)[:, None] * [1, 2]
    made = Permute((heads, 2, half), (0, 2, 1)).apply([rows])
    expected = rows.reshape(heads, 2, half, 2).swapaxes(1, 2).reshape(-1, 2)
    np.testing.assert_array_equal(made, expected)
    assert list(made[:4, 0]) == [0, 2, 1, 3]


@st.composite
def permutations(draw: st.DrawFn) -> tuple[Permute, int]:
    blocks = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    order = tuple(draw(st.permutations(range(len(blocks)))))
    return Permute(blocks, order), int(np.prod(blocks))


@given(permutations())
def test_a_permutation_is_undone(case: tuple[Permute, int]) -> None:
    operation, rows = case
    array = np.arange(rows * 2).reshape(rows, 2)
    np.testing.assert_array_equal(operation.undo().apply([operation.apply([array])]), array)


@given(st.permutations(range(4)))
def test_a_transposition_is_undone(axes: list[int]) -> None:
    operation = Transpose(tuple(axes))
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(operation.undo().apply([operation.apply([array])]), array)


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 1))
def test_padding_is_undone(before: int, after: int, axis: int) -> None:
    array = np.arange(6).reshape(2, 3)
    operation = Pad(before, after, axis)
    np.testing.assert_array_equal(operation.undo(array.shape).apply([operation.apply([array])]), array)


def test_scaling_rounds_once() -> None:
    """0.1 has no float32, and its product with 3 in float64 rounded once is not that of float32 alone."""
    source = MemoryFactor("t", np.array([0.1, 1e-30], ml_dtypes.bfloat16))
    wide = derive(Scale(1 / 3, "float32"), source)
    exact = source.array.astype(np.float64) / 3
    np.testing.assert_array_equal(wide.read(), exact.astype(np.float32))
    assert wide.dtype.name == "float32"
    assert derive(Scale(2.0, "bfloat16"), source).read().dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [
        (Transpose(), [(2, 3, 4)]),
        (Reshape((5,)), [(2, 3)]),
        (Take(1, 4), [(3, 2)]),
        (Take(2, 1), [(3, 2)]),
        (Take(0, 1, axis=2), [(3, 2)]),
        (Concatenate(), [(2, 3), (2, 4)]),
        (BlockDiagonal(), [(2, 3, 1), (2, 4)]),
        (BlockDiagonal(), [(2,), (3,)]),
        (Permute((2, 2), (1, 0)), [(5, 2)]),
        (SwapHalves(), [(3, 2)]),
        (Pad(-1, 0), [(3, 2)]),
    ],
)
def test_sources_that_do_not_fit(operation: Any, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"."):
        derive(operation, *map(stored, shapes))


def test_sources_of_several_forms_are_not_joined() -> None:
    with pytest.raises(ValueError, match="bfloat16, float32"):
        derive(Concatenate(), stored((2, 3)), stored((2, 3), ml_dtypes.bfloat16))


def test_nothing_is_read_before_it_is_asked_for() -> None:
    sealed = MemoryFactor("t", np.ones((6, 4), np.float32), sealed=True)
    factor = derive(Concatenate(), derive(Take(0, 2), derive(SwapHalves(), sealed)), sealed)
    assert (factor.shape, factor.name) == ((8, 4), "t")
    assert list(find_origins(factor)) == [sealed, sealed]
    assert list_steps(factor) == ["swap halves of rows", "rows 0:2", "concatenate rows"]
    assert isinstance(factor, DerivedFactor)
    with pytest.raises(AssertionError, match="was read"):
        factor.read()


def test_every_operation_says_what_it_does() -> None:
    words = [
        *(Transpose(), Transpose((1, 0, 2)), Reshape((2, 3)), Take(0, 2), Take(0, 2, axis=1), Take(0, 2, axis=3)),
        *(Concatenate(), BlockDiagonal(), Pad(0, 3), Permute((2, 3), (1, 0)), SwapHalves(1), Scale(0.5, "float32")),
    ]
    assert list(map(str, words)) == [
        "transpose",
        "transpose to axes [1, 0, 2]",
        "reshape to [2, 3]",
        "rows 0:2",
        "columns 0:2",
        "axis 3 0:2",
        "concatenate rows",
        "block-diagonal",
        "pad rows with 0 zeros before and 3 after",
        "permute rows [2, 3] to [1, 0]",
        "swap halves of columns",
        "scale by 0.5 as float32",
    ]
