"""Paddle's files against numpy's own pickles, and against pickles that are none of arrays."""

import os
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from laws.container_laws import ContainerLaws, read_all, refuse_bytes, rewrite, same_bits
from loraformat.containers.paddle import CONTAINER


def arrays_of() -> dict[str, NDArray[Any]]:
    dice = np.random.default_rng(0)
    return {
        "model.layers.0.self_attn.q_proj.lora_A": dice.standard_normal((5, 2)).astype(np.float32),
        "model.layers.0.self_attn.q_proj.lora_B": dice.standard_normal((2, 7)).astype(np.float16),
        "norm": dice.standard_normal(3),
    }


def pickled(arrays: dict[str, Any], protocol: int = 4) -> bytes:
    """Return what paddle.save makes of arrays: with a dictionary of its own names beside them."""
    names = {key: f"linear_{index}.w_0" for index, key in enumerate(arrays)}
    return pickle.dumps({**arrays, "StructuredToParameterName@@": names}, protocol)


class TestPaddle(ContainerLaws):
    container = CONTAINER

    def write_example(self, folder: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
        path, arrays = folder / "lora_model_state.pdparams", arrays_of()
        rewrite(path, pickled(arrays))
        return path, arrays


@pytest.mark.parametrize("protocol", [3, 4])
def test_protocols_and_pages(tmp_path: Path, protocol: int) -> None:
    big = {"big": np.arange(60_000, dtype=np.float32).reshape(300, 200), **arrays_of()}
    rewrite(tmp_path / "a.pdparams", pickled(big, protocol))
    found = read_all(CONTAINER.open(tmp_path / "a.pdparams"))
    assert all(same_bits(found[key], each) for key, each in big.items())
    assert set(found) == set(big)


def test_uint16_is_bfloat16_and_fortran_order_is_read(tmp_path: Path) -> None:
    plain = np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16)
    turned = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    rewrite(tmp_path / "a.pdparams", pickled({"a": plain.view(np.uint16), "b": turned}))
    found = read_all(CONTAINER.open(tmp_path / "a.pdparams"))
    assert same_bits(found["a"], plain)
    assert np.array_equal(found["b"], turned)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({"a": Evil()}, "LF901"),
        ({"a": np.array([1, None], dtype=object)}, "LF901"),
        ({"a": np.array(["text"])}, "LF901"),
        ({"a": np.zeros(2, dtype=[("x", "f4")])}, "LF901"),
        ({"a": np.float32(1)}, "LF901"),
        ({"a": np.zeros(2, dtype=">f4")}, "LF112"),
        ({"a": np.zeros(2, dtype=np.complex64)}, "LF106"),
        ({"a": {"b": np.zeros(2)}}, "LF111"),
        ({"a": "text"}, "LF111"),
        ({"a": np.zeros((1, 2)), "\n": np.zeros(1)}, "LF301"),
    ],
)
def test_what_is_no_array_of_numbers(tmp_path: Path, value: Any, code: str) -> None:
    assert refuse_bytes(CONTAINER, tmp_path / "a.pdparams", pickle.dumps(value, 4)).codes == (code,)


def test_more_numbers_than_bytes(tmp_path: Path) -> None:
    data = pickle.dumps({"a": np.zeros((3, 5), np.float32)}, 4)
    lying = data.replace(b"K\x03K\x05\x86", b"K\x7fK\x05\x86")
    assert lying != data
    assert refuse_bytes(CONTAINER, tmp_path / "a.pdparams", lying).codes == ("LF114",)
