"""Merges into graphs that onnxruntime's own quantisers made, beside the merged float model quantised by them.

The graphs are read back with onnx alone; what is compared is DequantizeLinear's definition in float64, and outputs of
onnxruntime. Weights lie on 7 bits where the processor would saturate otherwise.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import loraformat
from builders import write_peft

pytestmark = pytest.mark.oracle
quantization = pytest.importorskip("onnxruntime.quantization")

Array = NDArray[Any]
SHAPES = {"fc1": (96, 72), "fc2": (40, 96), "fc3": (24, 40)}
RANK = 4
SCALE = 2.0


def make_float(folder: Path, weights: Mapping[str, Array], name: str) -> Path:
    """Write x -> fc1 -> Relu -> fc2 -> Relu -> fc3 (a Gemm with bias), named as torch's exporter does."""
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["a"], name="/fc1/MatMul"),
        helper.make_node("Relu", ["a"], ["b"], name="/act/Relu"),
        helper.make_node("MatMul", ["b", "onnx::MatMul_2"], ["c"], name="/fc2/MatMul"),
        helper.make_node("Relu", ["c"], ["d"], name="/act_1/Relu"),
        helper.make_node("Gemm", ["d", "fc3.weight", "fc3.bias"], ["y"], name="/fc3/Gemm", transB=1),
    ]
    arrays = {
        "onnx::MatMul_1": weights["fc1"].T,
        "onnx::MatMul_2": weights["fc2"].T,
        "fc3.weight": weights["fc3"],
        "fc3.bias": np.linspace(-1, 1, 24),
    }
    initializers = [numpy_helper.from_array(np.ascontiguousarray(a, np.float32), n) for n, a in arrays.items()]
    value = helper.make_tensor_value_info
    ends = [value("x", TensorProto.FLOAT, ["n", 72])], [value("y", TensorProto.FLOAT, ["n", 24])]
    graph = helper.make_graph(nodes, "g", *ends, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = folder / name
    onnx.save(model, path)
    return path


class Case:
    """A float model, an adapter of a tenth of its weights, and the same merged in float64."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(11)
        self.folder = folder
        self.base = {n: rng.standard_normal(s) / np.sqrt(s[1]) for n, s in SHAPES.items()}
        factors, self.delta = {}, {}
        for name, (out, inner) in SHAPES.items():
            down, up = rng.standard_normal((RANK, inner)), rng.standard_normal((out, RANK))
            up *= 0.1 * np.linalg.norm(self.base[name]) / np.linalg.norm(SCALE * up @ down)
            factors[name] = (down.astype(np.float32), up.astype(np.float32))
            self.delta[name] = SCALE * factors[name][1].astype(np.float64) @ factors[name][0].astype(np.float64)
        self.adapter = write_peft(folder / "adapter", factors, r=RANK, lora_alpha=SCALE * RANK)
        self.merged = {n: self.base[n] + self.delta[n] for n in SHAPES}
        self.x = rng.standard_normal((32, 72)).astype(np.float32)
        self.float_base = make_float(folder, self.base, "float.onnx")
        self.float_merged = make_float(folder, self.merged, "float-merged.onnx")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("quantised"))


class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        rng = np.random.default_rng(12)
        self.feeds: Iterator[Any] = iter([{"x": rng.standard_normal((16, 72)).astype(np.float32)} for _ in range(4)])

    def get_next(self) -> Any:
        return next(self.feeds, None)


def dynamic(**options: Any) -> Callable[[Path, Path], None]:
    return lambda source, target: quantization.quantize_dynamic(source, target, **options)


def static(**options: Any) -> Callable[[Path, Path], None]:
    return lambda source, target: quantization.quantize_static(source, target, Calibration(), **options)


def nbits(bits: int, **options: Any) -> Callable[[Path, Path], None]:
    def quantise(source: Path, target: Path) -> None:
        pytest.importorskip("onnx_ir")
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        made = MatMulNBitsQuantizer(onnx.load(source), bits=bits, **options)
        made.process()
        made.model.save_model_to_file(str(target))

    return quantise


INT8, UINT8 = quantization.QuantType.QInt8, quantization.QuantType.QUInt8
QDQ, QOPERATOR = quantization.QuantFormat.QDQ, quantization.QuantFormat.QOperator
FLOATS_BETWEEN = {
    "dynamic int8": dynamic(weight_type=INT8, reduce_range=True),
    "dynamic uint8": dynamic(weight_type=UINT8),
    "dynamic int8 per channel": dynamic(weight_type=INT8, per_channel=True, reduce_range=True),
    "MatMulNBits 8": nbits(8, block_size=32, is_symmetric=True),
    "MatMulNBits 8 with zero points": nbits(8, block_size=32, is_symmetric=False),
    "MatMulNBits 8 by 16": nbits(8, block_size=16, is_symmetric=True),
}
RANGES = {
    "QDQ": static(quant_format=QDQ, weight_type=INT8, reduce_range=True),
    "QDQ per channel": static(quant_format=QDQ, weight_type=INT8, per_channel=True, reduce_range=True),
    "QOperator": static(quant_format=QOPERATOR, weight_type=INT8, reduce_range=True),
}


def quantise(case: Case, path: str, source: Path) -> Path:
    target = case.folder / f"{path.replace(' ', '-')}-{source.name}"
    if not target.exists():
        (FLOATS_BETWEEN | RANGES)[path](source, target)
    return target


def compute(path: Path, x: Array) -> Array:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def decode(path: Path) -> dict[str, NDArray[np.float64]]:
    """Return each weight as `(out, in)` by the definitions of the operators."""
    graph = onnx.load(path).graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    found = {}
    for node in graph.node:
        module = next((m for m in SHAPES if node.name.startswith(f"/{m}/")), "")
        names = [name for name in node.input if name in arrays and arrays[name].ndim >= 2]
        scaled = [n for n in node.input if n.endswith("_DequantizeLinear_Output") and n[:-24] + "_quantized" in arrays]
        name = names[0] if names else scaled[0][:-24] + "_quantized" if scaled else ""
        if not module or not name or node.op_type in ("Mul", "Add"):
            continue
        values = arrays[name].astype(np.float64)
        if node.op_type == "MatMulNBits":
            scales, blocks = arrays[node.input[1].replace("_Q8", "_scales")], arrays[name].shape[1]
            zeros = arrays.get(node.input[1].replace("_Q8", "_zero_points"), np.array(128)).astype(np.float64)
            zeros = zeros.reshape(-1, blocks, 1) if zeros.ndim else zeros
            whole = (values - zeros) * scales.astype(np.float64).reshape(-1, blocks, 1)
            values = whole.reshape(len(whole), -1)[:, : SHAPES[module][1]]
        else:
            root = name.removesuffix("_quantized")
            if root != name:
                shape = (-1, 1) if "Gemm" in node.op_type else (1, -1)
                scale, zero = (arrays[f"{root}_{part}"].reshape(shape) for part in ("scale", "zero_point"))
                values = (values - zero) * scale.astype(np.float64)
            values = values if values.shape == SHAPES[module] else values.T
        found[module] = values
    assert found.keys() == SHAPES.keys()
    return found


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


@pytest.mark.parametrize("path", FLOATS_BETWEEN)
def test_run_it_gives_the_base_and_the_change_apart(case: Case, tmp_path: Path, path: str) -> None:
    base, merged = quantise(case, path, case.float_base), tmp_path / "merged.onnx"
    loraformat.merge(base, [case.adapter], merged)
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
