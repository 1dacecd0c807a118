"""Codes of 8 bits: the laws, the oracle DequantizeLinear, and what quantisers leave."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator

from laws.coded_laws import CodedLaws, held
from loraformat.dtypes import BY_NAME
from loraformat.encodings import Coding
from loraformat.encodings.affine8 import CODED


class TestAffine8(CodedLaws):
    encoding = CODED
    forms = ("int8", "uint8")

    def store(self, codes: NDArray[Any], form: str) -> NDArray[Any]:
        return np.asarray(codes.astype(form).view(np.uint8))

    def bounds(self, form: str) -> tuple[int, int]:
        return (-128, 127) if form == "int8" else (0, 255)

    def store_zeros(self, zeros: NDArray[Any], form: str) -> NDArray[Any]:
        return np.asarray(zeros.astype(form))


@pytest.mark.parametrize("form", ["int8", "uint8"])
@pytest.mark.parametrize(("axis", "block"), [(0, (1, 20)), (1, (12, 1))])
def test_decoding_is_dequantize_linear_to_the_bit(form: str, axis: int, block: tuple[int, int]) -> None:
    rng = np.random.default_rng(6)
    codes = rng.integers(*((-128, 128) if form == "int8" else (0, 256)), (12, 20)).astype(form)
    scales = rng.uniform(1e-4, 1e-2, codes.shape[axis]).astype(np.float32)
    zeros = rng.integers(0, 100, codes.shape[axis]).astype(form)
    node = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=axis)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in (("q", codes), ("s", scales), ("z", zeros))
    ]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", 1, codes.shape)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    (expected,) = ReferenceEvaluator(model).run(None, {"q": codes, "s": scales, "z": zeros})
    coding = Coding("affine8", (12, 20), block, {"scales": held("s", scales), "zero_points": held("z", zeros)})
    out = np.empty((12, 20), np.float32)
    CODED.bind(coding, BY_NAME[form]).decode(codes.view(np.uint8), range(12), out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(("form", "least", "most"), [("int8", -64, 64), ("uint8", 0, 127)])
def test_a_quantiser_that_left_out_a_bit_goes_on_leaving_it_out(form: str, least: int, most: int) -> None:
    rng = np.random.default_rng(7)
    codes = rng.integers(least, most + 1, (12, 20)).astype(form)
    zero = 0 if form == "int8" else 60
    coding = Coding("affine8", (12, 20), (12, 20), {"scales": held("s", np.array([[0.01]], np.float32))}, zero)
    coder = CODED.bind(coding, BY_NAME[form])
    values = np.empty((12, 20), np.float32)
    coder.decode(codes.view(np.uint8), range(12), values)
    delta = rng.standard_normal((12, 20)).astype(np.float32)
    fit = coder.start_fit()
    fit.see(codes.view(np.uint8), range(12), values + delta, delta)
    out = np.empty((12, 20), np.uint8)
    fit.finish().encode(values + delta, range(12), out)
    assert out.view(form).min() >= least
    assert out.view(form).max() <= most


def test_scales_below_zero_use_the_one_code_more() -> None:
    """MatMulNBits' quantiser gives the largest number of a block the code 0, whatever its sign."""
    values = np.linspace(-0.9, 1.0, 16, dtype=np.float32).reshape(1, 16)
    scale = np.float32(-1 / 128)
    codes = np.clip(np.rint(values / scale) + 128, 0, 255).astype(np.uint8)
    coding = Coding("affine8", (1, 16), (1, 16), {"scales": held("s", np.array([[scale]]))}, 128)
    coder = CODED.bind(coding, BY_NAME["uint8"])
    fit = coder.start_fit()
    fit.see(codes, range(1), 2 * values, values)
    np.testing.assert_allclose(np.asarray(fit.finish().tensors()["scales"]), [[2 * scale]])


def test_scales_of_16_bits_stay_so() -> None:
    coding = Coding("affine8", (2, 4), (1, 4), {"scales": held("s", np.full((2, 1), 0.01, np.float16))})
    coder = CODED.bind(coding, BY_NAME["int8"])
    fit = coder.start_fit()
    codes, delta = np.full((2, 4), 100, np.uint8), np.full((2, 4), 0.5, np.float32)
    fit.see(codes, range(2), delta * 3, delta)
    found = fit.finish().tensors()["scales"]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, np.full((2, 1), np.float16(1.5 / 127)))
