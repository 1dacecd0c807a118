"""Ranges of activations measured anew, beside onnxruntime's quantiser on the merged float model and the same data."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import loraformat
from builders import write_peft
from loraformat.errors import LoraformatError

if TYPE_CHECKING:
    from lab import Lab

pytestmark = pytest.mark.oracle
quantization = pytest.importorskip("onnxruntime.quantization")

from quantised import INT8, QDQ, QOPERATOR, Case, compute  # noqa: E402

UINT8 = quantization.QuantType.QUInt8
MANNERS: dict[str, dict[str, Any]] = {
    "QDQ": {"quant_format": QDQ, "activation_type": UINT8},
    "QDQ of int8": {"quant_format": QDQ, "activation_type": INT8, "per_channel": True},
    "QDQ symmetric": {"quant_format": QDQ, "activation_type": INT8, "extra_options": {"ActivationSymmetric": True}},
    "QOperator": {"quant_format": QOPERATOR, "activation_type": UINT8},
}


class Reader:
    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        count = len(next(iter(arrays.values())))
        self._feeds: Iterator[Any] = iter([{n: a[i] for n, a in arrays.items()} for i in range(count)])

    def get_next(self) -> Any:
        return next(self._feeds, None)


class Set:
    """A float model, an adapter as large as its weights, and data that both are calibrated on."""

    def __init__(self, folder: Path) -> None:
        self.case = Case(folder, share=1.0)
        self.arrays = {"x": np.random.default_rng(12).standard_normal((6, 16, 72)).astype(np.float32)}
        self.data = folder / "data.npz"
        np.savez(self.data, **self.arrays)  # type: ignore[arg-type]

    def quantise(self, name: str, source: Path) -> Path:
        target = self.case.folder / f"{name.replace(' ', '-')}-{source.name}"
        if not target.exists():
            quantize(source, target, Reader(self.arrays), weight_type=INT8, reduce_range=True, **MANNERS[name])
        return target


quantize: Callable[..., None] = quantization.quantize_static


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Set:
    return Set(tmp_path_factory.mktemp("calibration"))


def numbers(path: Path) -> dict[str, NDArray[Any]]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("name", MANNERS)
def test_scales_are_those_of_the_quantiser(made: Set, tmp_path: Path, name: str) -> None:
    case, base, merged = made.case, made.quantise(name, made.case.float_base), tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, [case.adapter], merged, calibration=made.data)
    assert "LF441" not in {problem.code for problem in receipt.problems}
    before, found, afresh = (numbers(path) for path in (base, merged, made.quantise(name, case.float_merged)))
    scales = [each for each in found if each.endswith("_scale") and found[each].ndim == 0 and "MatMul" not in each]
    scales = [each for each in scales if "weight" not in each and "bias" not in each]
    assert len(scales) >= 4
    for each in scales:
        off = 0.15 if each == "y_scale" else 0.03  # fc3 keeps the scale of its weight, which cuts it off.
        np.testing.assert_allclose(found[each], afresh[each], rtol=off, err_msg=each)
        zero = each.removesuffix("_scale") + "_zero_point"
        assert abs(int(found[zero]) - int(afresh[zero])) <= 3
        assert found[zero].dtype == before[zero].dtype
    assert any(abs(float(found[each]) / float(before[each]) - 1) > 0.2 for each in scales)


@pytest.mark.parametrize("name", MANNERS)
def test_outputs_are_far_nearer_than_with_the_ranges_of_the_base(made: Set, tmp_path: Path, name: str) -> None:
    case, base = made.case, made.quantise(name, made.case.float_base)
    exact, errors = compute(case.float_merged, case.x), []
    for options in ({"accept_ranges": True}, {"calibration": made.data}):
        loraformat.merge(base, [case.adapter], tmp_path / "merged.onnx", force=True, **options)
        errors.append(np.linalg.norm(compute(tmp_path / "merged.onnx", case.x) - exact))
    usual = np.linalg.norm(compute(made.quantise(name, case.float_merged), case.x) - exact)
    assert errors[1] < errors[0] / 3
    assert errors[1] < 2 * usual  # fc3 keeps the base's scale, for its bias's sake.


@pytest.mark.parametrize("name", ["QDQ", "QOperator"])
def test_it_is_proven(made: Set, tmp_path: Path, name: str) -> None:
    case, base, merged = made.case, made.quantise(name, made.case.float_base), tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, [case.adapter], merged, calibration=made.data)
    assert receipt.options["calibration"].startswith("data.npz ")
    assert loraformat.verify(merged, base, [case.adapter]).holds
    assert loraformat.verify(merged, base, [case.adapter], calibration=made.data).holds
    np.savez(tmp_path / "other.npz", x=made.arrays["x"] * 2)
    found = loraformat.verify(merged, base, [case.adapter], calibration=tmp_path / "other.npz")
    assert {problem.code for problem in found.problems} == {"LF629"}
    model = onnx.load(merged)
    scale = next(each for each in model.graph.initializer if each.name == "x_scale")
    scale.CopyFrom(numpy_helper.from_array(np.float32(0.5) * numpy_helper.to_array(scale), scale.name))
    onnx.save(model, merged)
    assert not loraformat.verify(merged, base, [case.adapter]).holds


def test_nothing_is_left_aside(made: Set, tmp_path: Path) -> None:
    base = made.quantise("QDQ", made.case.float_base)
    loraformat.merge(base, [made.case.adapter], tmp_path / "merged.onnx", calibration=made.data)
    assert [each.name for each in tmp_path.iterdir()] == ["merged.onnx"]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [({"y": np.zeros((2, 4, 72))}, "arrays named y"), ({"x": np.zeros((0, 4, 72))}, "samples")],
)
def test_data_that_do_not_fit_are_refused(made: Set, tmp_path: Path, arrays: Mapping[str, Any], said: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(
            made.quantise("QDQ", made.case.float_base),
            [made.case.adapter],
            tmp_path / "merged.onnx",
            calibration=tmp_path / "data.npz",
        )
    assert caught.value.codes == ("LF628",)
    assert said in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["data.npz"]


@pytest.mark.parametrize(("model", "manner"), [("bert", QDQ), ("gpt2", QOPERATOR)])
def test_real_architectures(request: pytest.FixtureRequest, tmp_path: Path, model: str, manner: Any) -> None:
    """Tables that share a scale with what is looked up, products of activations, constants, Softmax."""
    pytest.importorskip("torch")
    import zoo

    lab: Lab = request.getfixturevalue("lab")
    trained, source = lab.trained(model), lab.exported(model, "ts")
    feeds = {name: np.asarray(each) for name, each in trained.feeds.items()}
    np.savez(tmp_path / "data.npz", **{name: each[None] for name, each in feeds.items()})  # type: ignore[arg-type]
    loraformat.merge(source, [trained.folder], tmp_path / "float.onnx")
    paths = {name: tmp_path / f"{name}.onnx" for name in ("base", "afresh", "accepted", "calibrated")}
    for path, target in ((source, paths["base"]), (tmp_path / "float.onnx", paths["afresh"])):
        reader = Reader({name: each[None] for name, each in feeds.items()})
        quantize(path, target, reader, quant_format=manner, weight_type=INT8, reduce_range=True)
    loraformat.merge(paths["base"], [trained.folder], paths["accepted"], accept_ranges=True, min_retained=0)
    loraformat.merge(
        paths["base"], [trained.folder], paths["calibrated"], calibration=tmp_path / "data.npz", min_retained=0
    )
    outputs = trained.specimen.outputs
    exact = zoo.run_onnx(tmp_path / "float.onnx", trained.feeds, outputs)
    errors = {
        name: max(np.linalg.norm(found[each] - exact[each]) for each in exact)
        for name, found in ((name, zoo.run_onnx(path, trained.feeds, outputs)) for name, path in paths.items())
    }
    assert errors["calibrated"] < errors["accepted"]
    assert errors["calibrated"] < 1.25 * errors["afresh"]
    assert loraformat.verify(paths["calibrated"], paths["base"], [trained.folder]).holds


def test_a_convolution_and_other_operators(tmp_path: Path) -> None:
    """Conv with a bias, Add, Mul, Sigmoid and pooling, between codes of whole numbers."""
    rng = np.random.default_rng(5)
    kernel, bias = rng.standard_normal((8, 3, 3, 3)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    pair = rng.standard_normal((2, 3, 3, 3)).astype(np.float32), rng.standard_normal((8, 2, 1, 1)).astype(np.float32)

    def write(weight: NDArray[np.float32], path: Path) -> Path:
        nodes = [
            helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["a"], name="/conv/Conv"),
            helper.make_node("Sigmoid", ["a"], ["b"], name="sigmoid"),
            helper.make_node("Mul", ["a", "b"], ["c"], name="mul"),
            helper.make_node("Add", ["c", "a"], ["d"], name="add"),
            helper.make_node("GlobalAveragePool", ["d"], ["y"], name="pool"),
        ]
        held = {"conv.weight": weight, "conv.bias": bias}
        value = helper.make_tensor_value_info
        ends = [value("x", TensorProto.FLOAT, [2, 3, 9, 9])], [value("y", TensorProto.FLOAT, [2, 8, 1, 1])]
        graph = helper.make_graph(nodes, "g", *ends, [numpy_helper.from_array(a, n) for n, a in held.items()])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        return path

    merged = kernel + np.einsum("or,rikl->oikl", pair[1][:, :, 0, 0], pair[0])
    arrays = {"x": rng.standard_normal((4, 2, 3, 9, 9)).astype(np.float32)}
    np.savez(tmp_path / "data.npz", **arrays)  # type: ignore[arg-type]
    adapter = write_peft(tmp_path / "adapter", {"conv": pair}, r=2, lora_alpha=2)
    exact = run(write(merged, tmp_path / "merged-float.onnx"), arrays["x"][0])
    source = write(kernel, tmp_path / "float.onnx")
    for manner in (QDQ, QOPERATOR):
        base, errors = tmp_path / "base.onnx", []
        quantize(source, base, Reader(arrays), quant_format=manner, weight_type=INT8, reduce_range=True)
        for options in ({"accept_ranges": True}, {"calibration": tmp_path / "data.npz"}):
            loraformat.merge(base, [adapter], tmp_path / "out.onnx", force=True, keep_scales=False, **options)
            errors.append(np.linalg.norm(run(tmp_path / "out.onnx", arrays["x"][0]) - exact))
        assert errors[1] < errors[0], manner


def run(path: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


METHODS = {
    "entropy": quantization.CalibrationMethod.Entropy,
    "percentile": quantization.CalibrationMethod.Percentile,
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_give_what_the_quantiser_finds_by_them(made: Set, tmp_path: Path, method: str) -> None:
    """Ranges hang on the merged weights, which are codes here and floats there; those of the input do not."""
    case, merged, afresh, data = (made.case, *(tmp_path / each for each in ("m.onnx", "afresh.onnx", "data.npz")))
    arrays = {"x": np.random.default_rng(13).standard_t(4, (60, 48, 72)).astype(np.float32)}
    np.savez(data, **arrays)  # type: ignore[arg-type]
    base = made.quantise("QDQ of int8", case.float_base)
    manner = MANNERS["QDQ of int8"] | {"weight_type": INT8, "reduce_range": True}
    plainly = tmp_path / "plain.onnx"
    quantize(case.float_merged, plainly, Reader(arrays), **manner)
    quantize(case.float_merged, afresh, Reader(arrays), calibrate_method=METHODS[method], **manner)
    receipt = loraformat.merge(base, [case.adapter], merged, calibration=data, calibration_method=method)
    assert receipt.as_json()["options"]["calibration_method"] == method
    found, wanted, plain = (numbers(path) for path in (merged, afresh, plainly))
    assert found["x_scale"] == wanted["x_scale"]
    assert found["x_zero_point"] == wanted["x_zero_point"]
    scales = [each for each in ("a_scale", "b_scale", "c_scale", "d_scale") if each in found]
    assert len(scales) >= 2
    for each in scales:
        np.testing.assert_allclose(found[each], wanted[each], rtol=0.05, err_msg=each)
    if method == "percentile":  # Entropy with as many bins as codes finds the whole range in onnxruntime.
        assert float(wanted["x_scale"]) < 0.95 * float(plain["x_scale"]), "outliers are left out"
    assert loraformat.verify(merged, base, [case.adapter], calibration=data).holds


def test_methods_that_give_no_range_are_refused(made: Set, tmp_path: Path) -> None:
    base = made.quantise("QDQ", made.case.float_base)
    options: list[dict[str, Any]] = [{"calibration": made.data, "calibration_method": "distribution"}]
    options.append({"calibration_method": "entropy"})
    for each in options:
        with pytest.raises(LoraformatError) as caught:
            loraformat.merge(base, [made.case.adapter], tmp_path / "merged.onnx", **each)
        assert caught.value.codes == ("LF628",)
