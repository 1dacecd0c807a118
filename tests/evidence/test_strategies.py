"""Each strategy finds the weight that is the target's, and no other; numbers that differ are never merged into.

The graphs have no names, or wrong ones; what is merged is compared with W + ΔW in float64.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import loraformat
from builders import write_peft, write_tensors
from graphs import Array, Net, dyadic, dyadic_factors, product, torchscript_name, write_model

TARGET = "model.layers.0.fc"
OUT, IN, RANK = 12, 10, 2


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def random(rng: np.random.Generator, *shape: int) -> Array:
    return np.asarray(rng.standard_normal(shape), np.float32)


def write_case(folder: Path, net: Net, rng: np.random.Generator, w: Array) -> Any:
    """Write base, adapter and checkpoint; return their paths and the adapter's delta of one target."""
    factors = dyadic_factors(rng, OUT, IN, RANK)
    adapter = write_peft(folder / "adapter", {TARGET: factors}, alpha=4.0)
    checkpoint = write_tensors(folder / "model.safetensors", {f"{TARGET}.weight": w})
    return write_model(folder / "base.onnx", net.model()), adapter, checkpoint, product(factors, 2.0)


def initializers(path: Path) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def matmuls(*weights: Array, names: tuple[str, ...] = ()) -> Net:
    """Return MatMuls of stored matrices `(in, out)`, nameless unless names are given."""
    net = Net()
    for index, weight in enumerate(weights):
        name = names[index] if names else f"n{index}"
        net.op("MatMul", [net.feed(f"x{index}"), net.weight(f"v{index}", weight)], net.result(f"y{index}"), name)
    return net


@pytest.mark.parametrize("form", [np.float32, np.float16])
def test_values_find_a_weight_without_a_name(tmp_path: Path, rng: np.random.Generator, form: type) -> None:
    w, other = random(rng, OUT, IN), random(rng, OUT, IN)
    base, adapter, checkpoint, delta = write_case(tmp_path, matmuls(other.T.astype(form), w.T.astype(form)), rng, w)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    assert caught.value.codes == ("LF401",)
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", base_checkpoint=checkpoint)
    before, after = initializers(base), initializers(tmp_path / "merged.onnx")
    assert after["v0"].tobytes() == before["v0"].tobytes()
    np.testing.assert_array_equal(after["v1"], (before["v1"].astype(np.float64) + delta.T).astype(form))


def test_values_find_the_rows_of_a_packed_weight(tmp_path: Path, rng: np.random.Generator) -> None:
    w, first, last = random(rng, OUT, IN), random(rng, 7, IN), random(rng, 5, IN)
    packed = np.concatenate([first, w, last])
    base, adapter, checkpoint, delta = write_case(tmp_path, matmuls(packed.T), rng, w)
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", base_checkpoint=checkpoint)
    expected = packed.astype(np.float64)
    expected[7 : 7 + OUT] += delta
    np.testing.assert_array_equal(initializers(tmp_path / "merged.onnx")["v0"], expected.T.astype(np.float32))


@pytest.mark.parametrize("factors", ["one", "each"])
def test_what_was_folded_into_a_weight_is_folded_into_its_change(
    tmp_path: Path, rng: np.random.Generator, factors: str
) -> None:
    w = random(rng, OUT, IN)
    folded = np.full(OUT, 0.25) if factors == "one" else rng.uniform(-3, 3, OUT)
    stored = (w * folded[:, None]).astype(np.float32)
    base, adapter, checkpoint, delta = write_case(
        tmp_path, matmuls(stored.T, names=(torchscript_name(TARGET, "MatMul"),)), rng, w
    )
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", base_checkpoint=checkpoint)
    expected = stored + folded[:, None] * delta
    np.testing.assert_allclose(initializers(tmp_path / "merged.onnx")["v0"].T, expected, rtol=1e-6, atol=1e-6)
    (found,) = loraformat.resolve_targets(base, adapter, base_checkpoint=checkpoint).targets
    assert (found.strategy, found.verified, found.folded) == ("names", ("values",), True)


@pytest.mark.parametrize("stored", ["transposed", "as it is"])
@pytest.mark.parametrize("named", [False, True])
def test_rows_that_were_moved_are_moved_in_the_change_too(
    tmp_path: Path, rng: np.random.Generator, stored: str, named: bool
) -> None:
    """As for rotations of neighbours instead of halves; a second matrix has other numbers."""
    w, other = random(rng, OUT, IN), random(rng, OUT, IN)
    order = np.concatenate([np.arange(0, OUT, 2), np.arange(1, OUT, 2)])
    net = Net()
    for index, matrix in enumerate((other, w[order])):
        turned = stored == "as it is"
        weight = net.weight(f"v{index}", matrix if turned else matrix.T)
        name = torchscript_name(TARGET, "Gemm") if named and index else f"n{index}"
        net.op("Gemm", [net.feed(f"x{index}"), weight], net.result(f"y{index}"), name, transB=int(turned))
    base, adapter, checkpoint, delta = write_case(tmp_path, net, rng, w)
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", base_checkpoint=checkpoint)
    after = initializers(tmp_path / "merged.onnx")
    found = after["v1"] if stored == "as it is" else after["v1"].T
    np.testing.assert_array_equal(found, (w + delta).astype(np.float32)[order])
    assert after["v0"].tobytes() == initializers(base)["v0"].tobytes()
    (target,) = loraformat.resolve_targets(base, adapter, base_checkpoint=checkpoint).targets
    assert (target.folded, target.verified) == (True, ("values",))
    assert loraformat.verify(tmp_path / "merged.onnx", base, [adapter], base_checkpoint=checkpoint).holds


def test_moved_rows_that_look_alike_are_not_told_apart(tmp_path: Path, rng: np.random.Generator) -> None:
    w = random(rng, OUT, IN)
    w[3] = w[7]
    base, adapter, checkpoint, _ = write_case(tmp_path, matmuls(np.roll(w, 1, axis=0).T), rng, w)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx", base_checkpoint=checkpoint)
    assert caught.value.codes == ("LF401",)


def quantise(w: Array, bits: int = 8) -> tuple[Array, Array]:
    """Return codes and one scale for each row of `(out, in)`."""
    most = 2 ** (bits - 1) - 1
    scales = (np.abs(w).max(axis=1, keepdims=True) / most).astype(np.float32)
    return np.rint(w / scales).astype(np.int8), scales


def dequantised(*weights: Array, name: str = "n") -> Net:
    """Return MatMuls of matrices in codes, the last of which may have a name."""
    net = Net()
    for index, w in enumerate(weights):
        codes, scales = quantise(w)
        inputs = [net.weight(f"v{index}", codes.T), net.weight(f"s{index}", scales[:, 0])]
        wide = net.op("DequantizeLinear", inputs, f"w{index}", f"d{index}", axis=1)
        last = name if index == len(weights) - 1 else f"n{index}"
        net.op("MatMul", [net.feed(f"x{index}"), wide], net.result(f"y{index}"), last)
    return net


def test_codes_are_found_by_what_they_decode_to(tmp_path: Path, rng: np.random.Generator) -> None:
    w, near = random(rng, OUT, IN), random(rng, OUT, IN)
    near = w + 0.2 * near  # Not another direction, but other numbers.
    base, adapter, checkpoint, _ = write_case(tmp_path, dequantised(near, w), rng, w)
    (found,) = loraformat.resolve_targets(base, adapter, base_checkpoint=checkpoint).targets
    assert (found.weight, found.strategy, found.verified) == ("v1", "values", ("values",))
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", base_checkpoint=checkpoint)
    before, after = initializers(base), initializers(tmp_path / "merged.onnx")
    assert before["v0"].tobytes() == after["v0"].tobytes()
    assert before["v1"].tobytes() != after["v1"].tobytes()


def test_codes_of_equal_weights_are_not_chosen_between(tmp_path: Path, rng: np.random.Generator) -> None:
    w = random(rng, OUT, IN)
    base, adapter, checkpoint, _ = write_case(tmp_path, dequantised(w, w), rng, w)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx", base_checkpoint=checkpoint)
    assert caught.value.codes == ("LF404",)


@pytest.mark.parametrize(("noise", "code", "verified"), [(0.0, "", True), (0.1, "", False), (3.0, "LF421", False)])
def test_codes_that_names_find_are_verified(
    tmp_path: Path, rng: np.random.Generator, noise: float, code: str, verified: bool
) -> None:
    """Calibrated quantisers move numbers: then nothing is verified, and nothing is refused."""
    w = random(rng, OUT, IN)
    net = dequantised(w + np.float32(noise) * random(rng, OUT, IN), name=torchscript_name(TARGET, "MatMul"))
    base, adapter, checkpoint, _ = write_case(tmp_path, net, rng, w)
    found = loraformat.resolve_targets(base, adapter, base_checkpoint=checkpoint)
    assert {problem.code for problem in found.problems} == ({code} if code else set())
    assert [bool(target.verified) for target in found.targets] == ([] if code else [verified])


def test_a_right_name_with_other_numbers_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    w = random(rng, OUT, IN)
    net = matmuls(random(rng, IN, OUT), w.T, names=(torchscript_name(TARGET, "MatMul"), "n1"))
    base, adapter, checkpoint, _ = write_case(tmp_path, net, rng, w)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx", base_checkpoint=checkpoint)
    assert caught.value.codes == ("LF421",)


def test_equal_weights_without_names_are_not_chosen_between(tmp_path: Path, rng: np.random.Generator) -> None:
    w = random(rng, OUT, IN)
    base, adapter, checkpoint, _ = write_case(tmp_path, matmuls(w.T, w.T), rng, w)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx", base_checkpoint=checkpoint)
    assert caught.value.codes == ("LF404",)


def test_a_stamped_adapter_finds_its_rows_in_a_packed_weight(tmp_path: Path, rng: np.random.Generator) -> None:
    w, first = random(rng, OUT, IN), random(rng, 9, IN)
    base, adapter, checkpoint, delta = write_case(tmp_path, matmuls(np.concatenate([first, w]).T), rng, w)
    stamped = loraformat.stamp(adapter, checkpoint)
    loraformat.merge(base, [stamped], tmp_path / "merged.onnx")
    after = initializers(tmp_path / "merged.onnx")["v0"].T
    np.testing.assert_array_equal(after[:9], first)
    np.testing.assert_array_equal(after[9:], (w + delta).astype(np.float32))


def test_what_resolve_prints_is_a_map(tmp_path: Path, rng: np.random.Generator) -> None:
    w, first = random(rng, OUT, IN), random(rng, 9, IN)
    base, adapter, checkpoint, _ = write_case(tmp_path, matmuls(np.concatenate([first, w]).T), rng, w)
    found = loraformat.resolve_targets(base, adapter, base_checkpoint=checkpoint)
    mapped = tmp_path / "map.json"
    mapped.write_text(json.dumps(found.as_json()))
    loraformat.merge(base, [adapter], tmp_path / "a.onnx", base_checkpoint=checkpoint)
    loraformat.merge(base, [adapter], tmp_path / "b.onnx", map=mapped)
    for name, value in initializers(tmp_path / "a.onnx").items():
        assert value.tobytes() == initializers(tmp_path / "b.onnx")[name].tobytes()


def test_a_map_of_a_folded_weight_needs_the_checkpoint(tmp_path: Path, rng: np.random.Generator) -> None:
    w = random(rng, OUT, IN)
    base, adapter, checkpoint, _ = write_case(tmp_path, matmuls(0.25 * w.T), rng, w)
    mapped = tmp_path / "map.json"
    found = loraformat.resolve_targets(base, adapter, base_checkpoint=checkpoint)
    mapped.write_text(json.dumps(found.as_json()))
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx", map=mapped)
    assert caught.value.codes == ("LF407",)
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", map=mapped, base_checkpoint=checkpoint)


def test_a_map_of_a_module_in_pieces(tmp_path: Path, rng: np.random.Generator) -> None:
    """The first rows lie in every third row of one tensor, the rest in another from its fifth row on."""
    first, second = random(rng, 17, IN), random(rng, 15, IN)
    base, adapter, _, delta = write_case(tmp_path, matmuls(first.T, second.T), rng, random(rng, OUT, IN))
    pieces = [
        {"target": TARGET, "weight": "v0", "section": [0, 5], "rows": [2, 15, 3]},
        {"target": TARGET, "weight": "v1", "section": [5, OUT], "rows": [4, 4 + OUT - 5]},
    ]
    (tmp_path / "map.json").write_text(json.dumps({"targets": pieces}))
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", map=tmp_path / "map.json")
    wanted = [first.astype(np.float64), second.astype(np.float64)]
    wanted[0][2:15:3] += delta[:5]
    wanted[1][4 : 4 + OUT - 5] += delta[5:]
    after = initializers(tmp_path / "merged.onnx")
    for index, expected in enumerate(wanted):
        np.testing.assert_array_equal(after[f"v{index}"].T, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"targets": [{"target": "model.layers.0.fc", "weight": "nothing"}]}', "LF420"),
        ('{"targets": [{"target": "model.layers.0.fc", "weight": "v0", "rows": [3, 99]}]}', "LF420"),
        ('{"targets": [{"target": "model.layers.0.fc"}]}', "LF422"),
        ('{"targets": [{"target": "a", "weight": "b"}, {"target": "a", "weight": "c"}]}', "LF422"),
        ('{"targets": [{"target": "a", "weight": "b", "rows": [2, 1]}]}', "LF422"),
        ('{"targets": [{"target": "a", "weight": "b", "sites": [1]}]}', "LF422"),
        ('{"targets": {}}', "LF422"),
        ('{"targets": [{"target": "a", "weight": "b", "rows": [0, 4, 0]}]}', "LF422"),
        ('{"targets": [{"target": "a", "weight": "b", "rows": [0, true]}]}', "LF422"),
        ('{"targets": [{"target": "a", "weight": "b", "section": [0, 4, 2]}]}', "LF422"),
        ('{"targets": [{"target": "a", "weight": "b", "copies": "c"}]}', "LF422"),
        (
            '{"targets": [{"target": "a", "weight": "b", "section": [0, 4]}, {"target": "a", "weight": "b"}]}',
            "LF422",
        ),
        ('{"targets": [{"target": "model.layers.0.fc", "weight": "v0", "rows": [0, 9], "section": [0, 9]}]}', "LF405"),
        ('{"targets": [{"target": "model.layers.0.fc", "weight": "v0", "transposed": false}]}', "LF420"),
    ],
)
def test_maps_that_lead_nowhere(tmp_path: Path, rng: np.random.Generator, text: str, code: str) -> None:
    w = random(rng, OUT, IN)
    base, adapter, _, _ = write_case(tmp_path, matmuls(w.T), rng, w)
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx", map=tmp_path / "map.json")
    assert caught.value.codes == (code,)


def test_verify_takes_the_checkpoint_too(tmp_path: Path, rng: np.random.Generator) -> None:
    w = random(rng, OUT, IN)
    base, adapter, checkpoint, _ = write_case(tmp_path, matmuls(random(rng, IN, OUT), w.T), rng, w)
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", base_checkpoint=checkpoint)
    assert loraformat.verify(tmp_path / "merged.onnx", base, [adapter], base_checkpoint=checkpoint).holds


def conv(weight: str, bias: str, output: str = "y", name: str = torchscript_name(TARGET, "Conv")) -> Net:
    net = Net()
    kernel, numbers = dyadic(np.random.default_rng(3), 5, 4, 3), dyadic(np.random.default_rng(4), 5)
    inputs = [net.feed("x", rank=3), net.weight(weight, kernel), net.weight(bias, numbers)]
    net.op("Conv", inputs, net.result(output, rank=3), name)
    return net


@pytest.mark.parametrize(
    "net",
    [
        conv(f"{TARGET}.weight", f"{TARGET}.weight_bias", name="node_Conv_1"),
        conv("_v_65", "_v_66"),
        conv(f"ConvBnFusion_W_{TARGET}.weight", "ConvBnFusion_BN_B_norm.bias"),
        conv(f"{TARGET}.weight", f"{TARGET}.bias", "/norm/BatchNormalization_output_0"),
    ],
    ids=["dynamo, then a tool without metadata", "onnxsim", "onnxruntime", "a norm's output"],
)
def test_folded_convolutions_are_known_by_what_tools_leave(tmp_path: Path, net: Net) -> None:
    rng = np.random.default_rng(5)
    adapter = write_peft(tmp_path / "adapter", {TARGET: (dyadic(rng, 2, 4, 3), dyadic(rng, 5, 2, 1))}, alpha=4.0)
    base = write_model(tmp_path / "base.onnx", net.model())
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    assert caught.value.codes == ("LF407",)


@pytest.mark.parametrize("module", [f"{TARGET}.lora_A.default", f"{TARGET}.base_layer"])
def test_graphs_that_already_hold_branches_of_an_adapter_are_refused(
    tmp_path: Path, rng: np.random.Generator, module: str
) -> None:
    w = random(rng, OUT, IN)
    names = (torchscript_name(TARGET, "MatMul"), torchscript_name(module, "MatMul"))
    base, adapter, _, _ = write_case(tmp_path, matmuls(w.T, random(rng, IN, RANK), names=names), rng, w)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    assert caught.value.codes == ("LF423",)
