"""Other forms that onnxruntime's quantisers give: 16 bits, 4 bits, its own DequantizeLinear, a few of their algorithms.

What codes stand for is asked of onnxruntime: each operator of the quantised model, alone, on the identity matrix.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import loraformat
from loraformat.errors import LoraformatError

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),  # What HQQ does.
]
quantization = pytest.importorskip("onnxruntime.quantization")
pytest.importorskip("onnx_ir", reason="MatMulNBitsQuantizer needs onnx_ir")

from onnxruntime.quantization import matmul_nbits_quantizer as few_bits  # noqa: E402
from quantised import INT8, QDQ, SHAPES, Case, nbits, static  # noqa: E402
from test_dequantised_onnx import read_weight  # noqa: E402

Forms = quantization.QuantType
CONTRIBUTED = {"UseQDQContribOps": True}


def by(config: Callable[[], Any], **options: Any) -> Callable[[Path, Path], None]:
    """Return what quantises MatMuls by an algorithm."""

    def quantise(source: Path, target: Path) -> None:
        made = few_bits.MatMulNBitsQuantizer(onnx.load(source), algo_config=config(), **options)
        made.process()
        made.model.save_model_to_file(str(target))

    return quantise


WIDE = {
    "int16": static(quant_format=QDQ, weight_type=Forms.QInt16, activation_type=Forms.QInt16),
    "uint16 per channel": static(
        quant_format=QDQ, weight_type=Forms.QUInt16, activation_type=Forms.QUInt16, per_channel=True
    ),
    "int8 beside 16 bits": static(quant_format=QDQ, weight_type=INT8, activation_type=Forms.QUInt16),
    "onnxruntime's own": static(quant_format=QDQ, weight_type=INT8, extra_options=CONTRIBUTED),
    "pairs of their own": static(quant_format=QDQ, weight_type=INT8, extra_options={"DedicatedQDQPair": True}),
    "symmetric activations": static(quant_format=QDQ, weight_type=INT8, extra_options={"ActivationSymmetric": True}),
    "floats for biases": static(quant_format=QDQ, weight_type=INT8, extra_options={"QuantizeBias": False}),
}
FEW = {
    "int4": static(quant_format=QDQ, weight_type=Forms.QInt4),
    "uint4 per channel": static(quant_format=QDQ, weight_type=Forms.QUInt4, per_channel=True),
    "int4 beside 16 bits": static(quant_format=QDQ, weight_type=Forms.QInt4, activation_type=Forms.QUInt16),
    "HQQ": by(lambda: few_bits.HQQWeightOnlyQuantConfig(block_size=16)),
    "RTN": by(few_bits.RTNWeightOnlyQuantConfig, block_size=32, is_symmetric=True),
    "2 bits": nbits(2, block_size=32, is_symmetric=False),
    "4 bits of channels": by(
        lambda: few_bits.DefaultWeightOnlyQuantConfig(is_symmetric=True, channel_wised_quantize=True, quant_format=QDQ)
    ),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("quantisers"), share=0.05)


def quantise(case: Case, name: str) -> Path:
    target = case.folder / f"{name.replace(' ', '-')}.onnx"
    if not target.exists():
        (WIDE | FEW)[name](case.float_base, target)
    return target


@pytest.mark.parametrize("name", WIDE)
def test_codes_of_8_bits_and_more_are_merged_in_place(case: Case, tmp_path: Path, name: str) -> None:
    """Also where products of int8 saturate on this processor: they are run without that."""
    base, merged = quantise(case, name), tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, [case.adapter], merged, accept_ranges=True)
    assert all(weight.retained > 0.97 for weight in receipt.weights)
    for module in ("fc1", "fc2"):  # The Gemm's bias counts in steps of its scales, which therefore stay.
        before, after = read_weight(base, module), read_weight(merged, module)
        error = np.linalg.norm(after - before - case.delta[module]) / np.linalg.norm(case.delta[module])
        usual = np.linalg.norm(before - case.base[module]) / np.linalg.norm(case.delta[module])
        assert error <= 1.25 * usual + 1e-6
        assert usual < (0.01 if "16" in name and "int8" not in name else 0.25)
    found = loraformat.verify(merged, base, [case.adapter], run=True)
    assert found.holds, found.problems
    assert abs(found.runs[0].kept - 1) < 0.06


@pytest.mark.parametrize("name", FEW)
def test_codes_of_few_bits_need_the_checkpoint_or_become_floats(case: Case, tmp_path: Path, name: str) -> None:
    base, merged = quantise(case, name), tmp_path / "merged.onnx"
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(base, [case.adapter], merged, accept_ranges=True)
    assert set(caught.value.codes) == {"LF440"}
    options = {"base_checkpoint": case.checkpoint}
    receipt = loraformat.merge(base, [case.adapter], merged, accept_ranges=True, **options)
    assert all(0.85 < weight.retained < 1.15 for weight in receipt.weights)
    for module in SHAPES:
        noise = np.linalg.norm(read_weight(base, module) - case.base[module])
        error = np.linalg.norm(read_weight(merged, module) - case.base[module] - case.delta[module])
        assert error <= 1.15 * noise + 1e-5
    assert loraformat.verify(merged, base, [case.adapter], run=True, **options).holds
    loraformat.merge(base, [case.adapter], merged, accept_ranges=True, on_quantized="dequantize", force=True)
    for module in SHAPES:
        wanted = read_weight(base, module) + case.delta[module]
        np.testing.assert_allclose(read_weight(merged, module), wanted, atol=1e-6)
    assert loraformat.verify(merged, base, [case.adapter], run=True).holds


def test_a_weight_that_is_quantised_when_the_model_is_loaded_is_refused(case: Case, tmp_path: Path) -> None:
    """Its scales would be those of the base."""
    make = static(quant_format=QDQ, weight_type=INT8, extra_options={"AddQDQPairToWeight": True})
    make(case.float_base, tmp_path / "base.onnx")
    with pytest.raises(LoraformatError, match="behind QuantizeLinear") as caught:
        loraformat.merge(tmp_path / "base.onnx", [case.adapter], tmp_path / "merged.onnx", accept_ranges=True)
    assert set(caught.value.codes) == {"LF403"}


def test_codes_laid_out_for_cuda_are_refused(case: Case, tmp_path: Path) -> None:
    """As `matmulnbits_weights_prepacked` of onnxruntime-genai's builder leaves them, in the shape of others."""
    nbits(8, block_size=32, is_symmetric=True)(case.float_base, tmp_path / "base.onnx")
    model = onnx.load(tmp_path / "base.onnx")
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            node.attribute.append(onnx.helper.make_attribute("weight_prepacked", 1))
    onnx.save(model, tmp_path / "base.onnx")
    for options in ({}, {"base_checkpoint": case.checkpoint}, {"on_quantized": "dequantize"}):
        with pytest.raises(LoraformatError, match="weight_prepacked is 1") as caught:
            loraformat.merge(tmp_path / "base.onnx", [case.adapter], tmp_path / "merged.onnx", **options)
        assert set(caught.value.codes) == {"LF403"}
