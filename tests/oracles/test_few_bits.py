"""Merges into graphs of 4 bits with the checkpoint's float numbers, beside the merged float model quantised afresh."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

import loraformat
from loraformat.errors import LoraformatError

pytestmark = pytest.mark.oracle
quantization = pytest.importorskip("onnxruntime.quantization")
pytest.importorskip("onnx_ir", reason="MatMulNBitsQuantizer needs onnx_ir")

from quantised import QDQ, Case, compute, nbits  # noqa: E402

MADE: dict[str, Callable[[Path, Path], None]] = {
    "symmetric": nbits(4, block_size=32, is_symmetric=True),
    "asymmetric": nbits(4, block_size=16, is_symmetric=False),
    "one block": nbits(4, block_size=128, is_symmetric=True),
    "QDQ symmetric": nbits(4, block_size=32, is_symmetric=True, quant_format=QDQ),
    "QDQ asymmetric": nbits(4, block_size=16, is_symmetric=False, quant_format=QDQ),
}
TOUCHED = ("fc1", "fc2")
"""The quantiser leaves fc3, a Gemm, in floats."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("few-bits"), share=0.02)


def quantise(case: Case, name: str, source: Path) -> Path:
    target = case.folder / f"{name.replace(' ', '-')}-{source.name}"
    if not target.exists():
        MADE[name](source, target)
    return target


def tensors(path: Path) -> dict[str, NDArray[Any]]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("name", MADE)
def test_codes_are_those_of_the_quantiser_that_saw_the_merged_weights(case: Case, tmp_path: Path, name: str) -> None:
    base, merged = quantise(case, name, case.float_base), tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, [case.adapter], merged, base_checkpoint=case.checkpoint)
    assert len(receipt.weights) == 3
    found, afresh = tensors(merged), tensors(quantise(case, name, case.float_merged))
    assert found.keys() == afresh.keys()
    assert any("Q4" in each for each in found)
    for each, values in found.items():
        if "Q4" in each or "zero" in each:
            np.testing.assert_array_equal(values, afresh[each])
        else:
            np.testing.assert_allclose(values, afresh[each], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", MADE)
def test_the_change_is_there(case: Case, tmp_path: Path, name: str) -> None:
    base, merged = quantise(case, name, case.float_base), tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, [case.adapter], merged, base_checkpoint=case.checkpoint)
    assert all(0.75 < weight.retained < 1.25 for weight in receipt.weights)  # Of 7000 numbers; the noise is six times.
    exact = compute(case.float_merged, case.x)
    own = np.linalg.norm(compute(merged, case.x) - exact)
    usual = np.linalg.norm(compute(quantise(case, name, case.float_merged), case.x) - exact)
    assert abs(own - usual) < 1e-3 * usual


@pytest.mark.parametrize("name", ["symmetric", "QDQ asymmetric"])
def test_it_is_proven_with_the_checkpoint_and_only_with_it(case: Case, tmp_path: Path, name: str) -> None:
    base, merged = quantise(case, name, case.float_base), tmp_path / "merged.onnx"
    loraformat.merge(base, [case.adapter], merged, base_checkpoint=case.checkpoint)
    assert loraformat.verify(merged, base, [case.adapter], base_checkpoint=case.checkpoint).holds
    with pytest.raises(LoraformatError) as caught:
        loraformat.verify(merged, base, [case.adapter])
    assert set(caught.value.codes) == {"LF440"}
    data = bytearray(merged.read_bytes())
    codes = next(each for each in onnx.load(merged).graph.initializer if "Q4" in each.name)
    data[data.index(codes.raw_data) + 50] ^= 1
    merged.write_bytes(data)
    assert not loraformat.verify(merged, base, [case.adapter], base_checkpoint=case.checkpoint).holds


@pytest.mark.parametrize("name", ["symmetric", "asymmetric"])
def test_kept_scales_are_kept(case: Case, tmp_path: Path, name: str) -> None:
    base, merged = quantise(case, name, case.float_base), tmp_path / "merged.onnx"
    loraformat.merge(base, [case.adapter], merged, base_checkpoint=case.checkpoint, keep_scales=True, min_retained=0)
    before, after = tensors(base), tensors(merged)
    for each in before:
        assert (before[each].tobytes() == after[each].tobytes()) == ("Q4" not in each and "fc3.weight" not in each)


def shift(path: Path, target: Path, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Path:
    """Write a model with other codes."""
    model = onnx.load(path)
    for each in model.graph.initializer:
        if each.name.endswith("_Q4"):
            codes = numpy_helper.to_array(each)
            each.raw_data = np.ascontiguousarray(change(codes)).tobytes()
    onnx.save(model, target)
    return target


def test_other_numbers_are_refused(case: Case, tmp_path: Path) -> None:
    base = shift(quantise(case, "symmetric", case.float_base), tmp_path / "other.onnx", lambda codes: codes[::-1])
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(base, [case.adapter], tmp_path / "merged.onnx", base_checkpoint=case.checkpoint)
    assert caught.value.codes == ("LF615",)
    assert not (tmp_path / "merged.onnx").exists()


def test_multiplied_columns_are_refused(case: Case, tmp_path: Path) -> None:
    """As AWQ does: columns times s, the layer before divided by it."""
    factors = np.linspace(0.6, 1.8, 72)
    source = case.make({"fc1": case.base["fc1"] * factors}, "scaled.onnx")
    MADE["symmetric"](source, tmp_path / "awq.onnx")
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(
            tmp_path / "awq.onnx",
            [case.adapter],
            tmp_path / "merged.onnx",
            base_checkpoint=case.checkpoint,
            any_rounding=True,
        )
    assert caught.value.codes == ("LF616",)


def test_codes_of_another_rounding_need_acceptance(case: Case, tmp_path: Path) -> None:
    """As GPTQ leaves them: near the numbers, not nearest."""
    rng = np.random.default_rng(5)

    def nudge(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        low, high = ((codes >> s & 15).astype(np.int8) + rng.integers(-1, 2, codes.shape) for s in (0, 4))
        return (np.clip(low, 0, 15) | np.clip(high, 0, 15) << 4).astype(np.uint8)

    base = shift(quantise(case, "one block", case.float_base), tmp_path / "gptq.onnx", nudge)
    options = {"base_checkpoint": case.checkpoint}
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(base, [case.adapter], tmp_path / "merged.onnx", **options)
    assert caught.value.codes == ("LF617",)
    loraformat.merge(base, [case.adapter], tmp_path / "merged.onnx", **options, any_rounding=True)
    assert loraformat.verify(tmp_path / "merged.onnx", base, [case.adapter], **options).holds


def test_what_an_earlier_merge_has_added_is_not_lost(case: Case, tmp_path: Path) -> None:
    base, options = quantise(case, "symmetric", case.float_base), {"base_checkpoint": case.checkpoint}
    adapter = case.adapt("two", *TOUCHED)
    loraformat.merge(base, [adapter], tmp_path / "once.onnx", **options)
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(tmp_path / "once.onnx", [adapter], tmp_path / "twice.onnx", **options)
    assert caught.value.codes == ("LF618",)
    with pytest.raises(LoraformatError) as caught:
        loraformat.unmerge(tmp_path / "once.onnx", tmp_path / "back.onnx", adapters=[adapter], **options)
    assert set(caught.value.codes) == {"LF440"}
