"""Merges into graphs that onnxruntime's own quantisers made, beside the merged float model quantised by them.

The graphs are read back with onnx alone; what is compared is DequantizeLinear's definition in float64, and outputs of
onnxruntime. Weights lie on 7 bits where the processor would saturate otherwise.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest

import loraformat

pytestmark = pytest.mark.oracle
pytest.importorskip("onnxruntime.quantization")

from quantised import FLOATS_BETWEEN, RANGES, SHAPES, Case, compute, decode, nbits, quantise  # noqa: E402


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("quantised"))


@pytest.mark.parametrize("path", [*FLOATS_BETWEEN, *RANGES])
def test_weights_are_those_of_a_quantiser_that_saw_the_merged_ones(case: Case, tmp_path: Path, path: str) -> None:
    base = quantise(case, path, case.float_base)
    merged = tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, [case.adapter], merged, accept_ranges=True)
    assert all(weight.retained > 0.97 for weight in receipt.weights)
    assert sum(f.stat().st_size for f in [merged]) - base.stat().st_size < 8192  # The receipt.
    start, found = decode(base), decode(merged)
    afresh = decode(quantise(case, path, case.float_merged))
    for name in SHAPES:
        wanted = start[name] + case.delta[name]
        error = np.linalg.norm(found[name] - wanted) / np.linalg.norm(case.delta[name])
        usual = np.linalg.norm(afresh[name] - case.merged[name]) / np.linalg.norm(case.delta[name])
        assert error <= 1.25 * usual + 1e-6, (name, error, usual)


@pytest.mark.parametrize("path", FLOATS_BETWEEN)
def test_outputs_change_as_those_of_the_float_model(case: Case, tmp_path: Path, path: str) -> None:
    base, merged = quantise(case, path, case.float_base), tmp_path / "merged.onnx"
    loraformat.merge(base, [case.adapter], merged)
    change = (compute(case.float_merged, case.x) - compute(case.float_base, case.x)).astype(np.float64)
    found = (compute(merged, case.x) - compute(base, case.x)).astype(np.float64)
    afresh = compute(quantise(case, path, case.float_merged), case.x)
    assert abs(np.vdot(found, change) / np.vdot(change, change) - 1) < 0.06
    own = np.linalg.norm(compute(merged, case.x) - compute(case.float_merged, case.x))
    usual = np.linalg.norm(afresh - compute(case.float_merged, case.x))
    assert own <= 2 * usual + 1e-6  # Twice rounded, once by the quantiser and once by the merge.


@pytest.mark.parametrize("path", [*FLOATS_BETWEEN, *RANGES])
def test_it_is_proven_byte_by_byte(case: Case, tmp_path: Path, path: str) -> None:
    base, merged = quantise(case, path, case.float_base), tmp_path / "merged.onnx"
    loraformat.merge(base, [case.adapter], merged, accept_ranges=True)
    assert loraformat.verify(merged, base, [case.adapter]).holds
    data = bytearray(merged.read_bytes())
    codes = next(
        t for t in onnx.load(merged).graph.initializer if t.name.startswith("onnx::MatMul_1") and len(t.dims) > 1
    )
    place = data.index(codes.raw_data) + 100
    data[place] ^= 1
    merged.write_bytes(data)
    assert not loraformat.verify(merged, base, [case.adapter]).holds


@pytest.mark.parametrize("path", ["dynamic int8 per channel", "MatMulNBits 8"])
def test_any_number_of_workers_gives_the_same_bytes(case: Case, tmp_path: Path, path: str) -> None:
    base = quantise(case, path, case.float_base)
    for jobs in (1, 3):
        loraformat.merge(base, [case.adapter], tmp_path / "m.onnx", jobs=jobs)
        (tmp_path / "m.onnx").rename(tmp_path / f"{jobs}.onnx")
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "3.onnx").read_bytes()


@pytest.mark.parametrize("path", ["dynamic int8", "MatMulNBits 8"])
def test_kept_scales_are_kept(case: Case, tmp_path: Path, path: str) -> None:
    base, merged = quantise(case, path, case.float_base), tmp_path / "merged.onnx"
    loraformat.merge(base, [case.adapter], merged, keep_scales=True)
    one, other = onnx.load(base).graph.initializer, onnx.load(merged).graph.initializer
    for before, after in zip(one, other, strict=True):
        assert (before == after) == (len(before.dims) < 2 or "scales" in before.name), before.name


@pytest.mark.parametrize("path", RANGES)
def test_measured_ranges_are_refused_until_accepted(case: Case, tmp_path: Path, path: str) -> None:
    base = quantise(case, path, case.float_base)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [case.adapter], tmp_path / "merged.onnx")
    assert caught.value.codes == ("LF441",)
    receipt = loraformat.merge(base, [case.adapter], tmp_path / "merged.onnx", accept_ranges=True)
    assert {p.code for p in receipt.problems} == {"LF441", "LF442"}  # The Gemm's bias counts in steps of its scales.
    (kept,) = [p for p in receipt.problems if p.code == "LF442"]
    assert kept.where == "fc3.weight_quantized"


@pytest.mark.parametrize("path", [*FLOATS_BETWEEN, *RANGES])
def test_run_it_gives_the_base_and_the_change_apart(case: Case, tmp_path: Path, path: str) -> None:
    base, merged = quantise(case, path, case.float_base), tmp_path / "merged.onnx"
    loraformat.merge(base, [case.adapter], merged, accept_ranges=True)
    found = loraformat.verify(merged, base, [case.adapter], run=True)
    assert found.holds
    (run,) = found.runs
    assert abs(run.kept - 1) < 0.06
    assert run.difference < run.effect / 3


def test_four_bits_are_refused(case: Case, tmp_path: Path) -> None:
    nbits(4, block_size=32, is_symmetric=True)(case.float_base, tmp_path / "q4.onnx")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(tmp_path / "q4.onnx", [case.adapter], tmp_path / "merged.onnx")
    assert set(caught.value.codes) == {"LF440"}


def test_undone_it_is_the_base(case: Case, tmp_path: Path) -> None:
    base, merged = quantise(case, "dynamic int8 per channel", case.float_base), tmp_path / "merged.onnx"
    loraformat.merge(base, [case.adapter], merged, keep_undo=True)
    loraformat.unmerge(merged, tmp_path / "restored.onnx")
    assert onnx.load(tmp_path / "restored.onnx").graph == onnx.load(base).graph
