"""Convolutions that onnxruntime's own quantisers made, merged, and run beside the base with the change apart.

In floats they are compared with a float model of the very numbers that the codes stood for.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import loraformat
from builders import write_peft

pytestmark = pytest.mark.oracle
quantization = pytest.importorskip("onnxruntime.quantization")

Array = NDArray[Any]
SHAPES = {"c1": (12, 3, 3, 3), "c2": (8, 6, 3, 1)}
"""The second has two groups."""
SIZES = {"h": 16, "w": 12}
INT8, UINT8 = quantization.QuantType.QInt8, quantization.QuantType.QUInt8


def make_float(path: Path, weights: dict[str, Array]) -> Path:
    """Write x -> c1 -> Relu -> c2, named as torch's exporter does."""
    nodes = [
        helper.make_node("Conv", ["x", "c1.weight", "c1.bias"], ["a"], name="/c1/Conv", pads=[1] * 4, strides=[2, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="/act/Relu"),
        helper.make_node("Conv", ["b", "c2.weight"], ["y"], name="/c2/Conv", group=2, dilations=[2, 1]),
    ]
    arrays = {"c1.weight": weights["c1"], "c1.bias": np.linspace(-1, 1, 12), "c2.weight": weights["c2"]}
    initializers = [numpy_helper.from_array(each.astype(np.float32), name) for name, each in arrays.items()]
    value = helper.make_tensor_value_info
    ends = [value("x", 1, ["n", 3, "h", "w"])], [value("y", 1, ["n", 8, "p", "q"])]
    graph = helper.make_graph(nodes, "g", *ends, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        rng = np.random.default_rng(12)
        self.feeds: Iterator[Any] = iter([{"x": rng.standard_normal((2, 3, 16, 12)).astype("f4")} for _ in range(3)])

    def get_next(self) -> Any:
        return next(self.feeds, None)


def dynamic(**options: Any) -> Callable[[Path, Path], None]:
    return lambda source, target: quantization.quantize_dynamic(
        source, target, op_types_to_quantize=["Conv"], **options
    )


def static(form: str, **options: Any) -> Callable[[Path, Path], None]:
    own = quantization.QuantFormat[form]
    return lambda source, target: quantization.quantize_static(
        source, target, Calibration(), quant_format=own, weight_type=INT8, **options
    )


MADE = {
    "ConvInteger uint8": dynamic(weight_type=UINT8),
    "ConvInteger int8": dynamic(weight_type=INT8),
    "QDQ": static("QDQ"),
    "QDQ per channel": static("QDQ", per_channel=True),
    "QLinearConv": static("QOperator"),
    "QLinearConv per channel": static("QOperator", per_channel=True),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Array], dict[str, Array], Path]:
    """Return a folder, the float weights, the changes, and the adapter of these."""
    folder, rng = tmp_path_factory.mktemp("convolutions"), np.random.default_rng(4)
    weights = {name: rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:])) for name, shape in SHAPES.items()}
    factors, deltas = {}, {}
    for name, (out, *kernel) in SHAPES.items():
        down, up = rng.standard_normal((2, *kernel)) * 0.1, rng.standard_normal((out, 2, 1, 1)) * 0.1
        factors[name] = down.astype(np.float32), up.astype(np.float32)
        deltas[name] = 2 * np.einsum("ri...,or->oi...", factors[name][0], factors[name][1][:, :, 0, 0])
    return folder, weights, deltas, write_peft(folder / "adapter", factors, r=2, alpha=4)


def quantise(case: Any, name: str) -> Path:
    folder, weights, _, _ = case
    target: Path = folder / f"{name.replace(' ', '-')}.onnx"
    if not target.exists():
        MADE[name](make_float(folder / "float.onnx", weights), target)
    return target


def decode(path: Path) -> dict[str, Array]:
    """Return the weights by the definition of DequantizeLinear."""
    held = {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
    found = {}
    for name in SHAPES:
        root = f"{name}.weight"
        scale, zero = (held[f"{root}_{part}"].reshape(-1, 1, 1, 1) for part in ("scale", "zero_point"))
        found[name] = (held[f"{root}_quantized"].astype(np.float64) - zero) * scale
    return found


@pytest.mark.parametrize("name", MADE)
def test_run_they_give_the_base_and_the_change_apart(case: Any, tmp_path: Path, name: str) -> None:
    base, merged = quantise(case, name), tmp_path / "merged.onnx"
    _, _, deltas, adapter = case
    receipt = loraformat.merge(base, [adapter], merged, accept_ranges=True)
    assert all(weight.retained > 0.9 for weight in receipt.weights)
    before, after = decode(base), decode(merged)
    for module, delta in deltas.items():
        kept = np.vdot(after[module] - before[module], delta) / np.vdot(delta, delta)
        assert kept == pytest.approx(1, abs=0.05)
    found = loraformat.verify(merged, base, [adapter], run=True, sizes=SIZES)
    assert found.holds, found.problems
    assert found.runs[0].effect > 0.05
    assert abs(found.runs[0].kept - 1) < 0.1


@pytest.mark.parametrize("name", MADE)
def test_in_floats_they_are_what_the_codes_stood_for_and_the_change(case: Any, tmp_path: Path, name: str) -> None:
    base, merged = quantise(case, name), tmp_path / "merged.onnx"
    _, _, deltas, adapter = case
    loraformat.merge(base, [adapter], merged, accept_ranges=True, on_quantized="dequantize")
    model = onnx.load(merged)
    onnx.checker.check_model(model)
    assert {"ConvInteger", "QLinearConv"}.isdisjoint(node.op_type for node in model.graph.node)
    weights = {module: own + deltas[module] for module, own in decode(base).items()}
    held = [numpy_helper.to_array(each) for each in model.graph.initializer if len(each.dims) == 4]
    for module, wanted in weights.items():
        own = next(each for each in held if each.shape == SHAPES[module])
        np.testing.assert_allclose(own, wanted, atol=1e-6)
    if name.startswith("Conv"):  # Nothing of the activations is rounded any more.
        exact = make_float(tmp_path / "exact.onnx", weights)
        np.testing.assert_allclose(compute(merged), compute(exact), atol=2e-5)
    assert loraformat.verify(merged, base, [adapter], run=True, sizes=SIZES).holds


def compute(path: Path) -> Array:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(2).standard_normal((2, 3, 16, 12)).astype(np.float32)
    return np.asarray(session.run(None, {"x": x})[0])
