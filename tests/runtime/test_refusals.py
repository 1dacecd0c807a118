"""What cannot be an input of a model: each target is refused by name, with a reason and a way out."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import loraformat
from builders import write_peft, write_tensors
from graphs import Array, Net, dyadic, dyadic_factors, linear_net, make_adapter, make_target, write_model
from loraformat import runtime
from loraformat.adapter import Adapter

MODULE = "model.fc"
OUT, IN, RANK = 7, 10, 2
MS = "com.microsoft"


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def plain(name: str = MODULE, out: int = OUT, inner: int = IN) -> Adapter:
    return make_adapter(make_target(name, dyadic_factors(rng(), out, inner, RANK)))


def linear(folder: Path, **more: Any) -> Path:
    return write_model(folder / "base.onnx", linear_net({MODULE: dyadic(rng(2), OUT, IN)}, **more).model())


def refused(base: Path, adapter: Adapter | Path, **options: Any) -> loraformat.LoraformatError:
    output = base.with_name("refused.onnx")
    with pytest.raises(loraformat.LoraformatError) as caught:
        runtime.export_runtime(base, [adapter], output, **options)
    assert not output.exists()
    return caught.value


def with_roles(kind: str, arrays: dict[str, Array], folder: Path) -> Adapter:
    """Return an adapter of another kind beside a LoRA of the same module."""
    down, up = dyadic_factors(rng(), OUT, IN, RANK)
    keys = {"lora_A.weight": down, "lora_B.weight": up} | arrays
    tensors = {f"base_model.model.{MODULE}.{role}": array for role, array in keys.items()}
    write_peft(folder, {MODULE: (down, up)}, **{"use_dora" if kind == "dora" else "lora_bias": True})
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return loraformat.load(folder)


OTHERS = {
    "dora": {"lora_magnitude_vector": np.ones(OUT, np.float32)},
    "bias": {"lora_B.bias": np.ones(OUT, np.float32)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_product_of_thin_matrices(tmp_path: Path, kind: str) -> None:
    net = Net()
    weight = net.weight(f"{MODULE}.weight", dyadic(rng(2), OUT, IN))
    bias = net.weight(f"{MODULE}.bias", dyadic(rng(3), OUT))
    net.op("Gemm", [net.feed("x"), weight, bias], net.result("y"), "/model/fc/Gemm", transB=1)
    base = write_model(tmp_path / "base.onnx", net.model())
    adapter = with_roles(kind, OTHERS[kind], tmp_path / kind)
    error = refused(base, adapter)
    assert set(error.codes) == {"LF821"}
    assert MODULE in str(error)
    assert "runtime.session" in str(error)


def make_fused() -> Net:
    net = Net()
    weight, bias = net.weight(f"{MODULE}.weight", dyadic(rng(2), OUT, IN)), net.weight("b", dyadic(rng(), OUT))
    net.op(
        "FusedGemm",
        [net.feed("x"), weight, bias],
        net.result("y"),
        "/f",
        domain=MS,
        transB=1,
        activation="LeakyRelu",
        activation_alpha=0.1,
    )
    return net


def make_whole_numbers() -> Net:
    """Nothing of x or of the product is there as a float."""
    net = Net()
    x, zero = net.feed("xq", TensorProto.UINT8), net.weight("xz", np.array(3, np.uint8))
    codes = net.weight("w", rng().integers(-63, 64, (IN, OUT)).astype(np.int8))
    step, none = net.weight("s", np.array(0.1, np.float32)), net.weight("z", np.array(0, np.int8))
    inputs = [x, step, zero, codes, step, none, step, zero]
    net.op("QLinearMatMul", inputs, net.result("y", TensorProto.UINT8), "/model/fc/MatMul")
    return net


def make_called() -> Net:
    net = Net()
    body = [helper.make_node("MatMul", ["a", "b"], ["c"], name="/model/fc/MatMul")]
    opsets = [helper.make_opsetid("", 20)]
    net.functions.append(helper.make_function("own", "Layer", ["a", "b"], ["c"], body, opsets))
    net.op("Layer", [net.feed("x"), net.weight("w", dyadic(rng(2), IN, OUT))], net.result("y"), domain="own")
    return net


@pytest.mark.parametrize("make", [make_fused, make_whole_numbers, make_called])
def test_nodes_that_nothing_can_be_added_to(tmp_path: Path, make: Any) -> None:
    error = refused(write_model(tmp_path / "base.onnx", make().model(check=False)), plain())
    assert error.codes == ("LF820",)
    assert MODULE in str(error)


def test_a_target_may_be_left_out(tmp_path: Path) -> None:
    net = make_fused()
    net.op("MatMul", [net.feed("z"), net.weight("w", dyadic(rng(), IN, OUT))], net.result("v"), "/model/other/MatMul")
    base = write_model(tmp_path / "base.onnx", net.model(check=False))
    adapter = make_adapter(*plain().targets, *plain("model.other").targets)
    done = runtime.export_runtime(base, [adapter], tmp_path / "m.onnx", allow_unmatched=[MODULE])
    assert (done.left_out, [each.name for each in done.inputs.layouts]) == ((MODULE,), ["model.other"])
    assert refused(base, plain(), allow_unmatched=["*"]).codes == ("LF401",)


def test_a_model_has_run_time_inputs_once(tmp_path: Path) -> None:
    base = linear(tmp_path)
    runtime.export_runtime(base, [plain()], tmp_path / "m.onnx")
    assert refused(tmp_path / "m.onnx", plain()).codes == ("LF822",)


def test_a_checkpoint_is_no_graph(tmp_path: Path) -> None:
    base = write_tensors(tmp_path / "m.safetensors", {f"{MODULE}.weight": dyadic(rng(), OUT, IN)}, {})
    assert refused(Path(base), plain()).codes == ("LF828",)


def test_old_formats_have_no_defaults(tmp_path: Path) -> None:
    model = linear_net({MODULE: dyadic(rng(2), OUT, IN)}).model()
    model.ir_version = 3
    assert refused(write_model(tmp_path / "base.onnx", model), plain()).codes == ("LF824",)


def test_a_taken_name_is_said(tmp_path: Path) -> None:
    net = linear_net({MODULE: dyadic(rng(2), OUT, IN)})
    net.weight(f"{MODULE}.lora_B.weight", np.zeros(1, np.float32))
    error = refused(write_model(tmp_path / "base.onnx", net.model()), plain())
    assert error.codes == ("LF826",)


@pytest.mark.parametrize("kind", ["exists", "base", "elsewhere", "inline"])
def test_outputs_are_as_careful_as_those_of_a_merge(tmp_path: Path, kind: str) -> None:
    model = linear_net({MODULE: dyadic(rng(2), OUT, IN)}).model()
    base, output = write_model(tmp_path / "base.onnx", model, "" if kind == "inline" else "one"), tmp_path / "m.onnx"
    options: dict[str, Any] = {"external_data": "share"} if kind in ("elsewhere", "inline") else {}
    if kind == "exists":
        output.write_bytes(b"mine")
    elif kind == "base":
        output, options = base, {"force": True}
    elif kind == "elsewhere":
        output = tmp_path / "other" / "m.onnx"
        output.parent.mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(loraformat.LoraformatError) as caught:
        runtime.export_runtime(base, [plain()], output, **options)
    code = {"exists": "LF601", "base": "LF602", "elsewhere": "LF444", "inline": "LF444"}[kind]
    assert caught.value.codes == (code,)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("share", [False, True])
def test_the_rest_of_the_model_is_as_it_was(tmp_path: Path, share: bool) -> None:
    """Weights, other nodes, values and annotations; the data file is copied or shared."""
    model = linear_net({MODULE: dyadic(rng(2), OUT, IN), "model.rest": dyadic(rng(3), 9, 8)}, "dynamo").model()
    model.metadata_props.add(key="made", value="by hand")
    base = write_model(tmp_path / "base.onnx", model, "one")
    data = (tmp_path / "base.onnx.data").read_bytes()
    output = tmp_path / "m.onnx"
    runtime.export_runtime(base, [plain()], output, external_data="share" if share else "copy")
    assert (tmp_path / "m.onnx.data").exists() != share
    before, after = (onnx.load(path, load_external_data=not share) for path in (base, output))
    assert [p for p in after.metadata_props if p.key != "loraformat.runtime"] == list(before.metadata_props)
    assert list(after.graph.initializer)[:2] == list(before.graph.initializer)
    assert list(after.graph.input)[:2] == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    kept = [node for node in after.graph.node if "/lora" not in node.name]
    (changed,) = (node for node in before.graph.node if node.output[0] == f"out.{MODULE}")
    changed.output[0] += ".base"
    assert kept == list(before.graph.node)
    assert data == (tmp_path / "base.onnx.data").read_bytes()
    value = next(each for each in after.graph.input if each.name == f"{MODULE}.lora_A.weight")
    assert [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] == [IN, f"{MODULE}.rank"]
