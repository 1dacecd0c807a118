"""Saved modules, biases and norms in whole bases: the merged parameter is the saved one, rounded once, or the merge is
refused with its reason.

The values are compared to the bit with `round_once`, which knows nothing of the code under test, and for ONNX with what
onnxruntime computes from the merged model against numpy with the saved values.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import loraformat
from builders import write_peft, write_tensors
from graphs import (
    FORMS,
    Array,
    ArrayFactor,
    Net,
    dyadic,
    dyadic_factors,
    dynamo_scopes,
    make_adapter,
    make_target,
    product,
    read_state,
    round_once,
    run,
    same_bits,
    stored_weights,
    tensor_kind,
    torchscript_name,
    write_model,
    write_state,
)
from loraformat.adapter import Adapter, Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.fingerprint import Fingerprint
from loraformat.receipt import Receipt

MODULE = "model.head"
COMMON = ("float32", "float16", "bfloat16")
STYLES = ("torchscript", "dynamo")


def saved(name: str = MODULE, scale: float = 1.0, **arrays: Array) -> Target:
    factors: dict[str, Factor] = {role: ArrayFactor(f"{name}.{role}", array) for role, array in arrays.items()}
    return Target(name, "replace", SlotKind.PARAMETER, factors, 0, Scaling(ScalingRule.MULTIPLIER, scale))


def wide(array: Array) -> Array:
    return array.astype(np.float64)


def dice(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def merge_into(base: Path, *adapters: Any, **options: Any) -> tuple[dict[str, Array], Receipt]:
    """Merge; return every stored tensor of the output and the receipt."""
    output = base.with_name(f"out{base.suffix}")
    receipt = loraformat.merge(base, list(adapters), output, force=True, **options)
    return (stored_weights if base.suffix == ".onnx" else read_state)(output), receipt


def refusal(base: Path, *adapters: Any, **options: Any) -> loraformat.LoraformatError:
    output = base.with_name(f"out{base.suffix}")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, list(adapters), output, **options)
    assert not output.exists()
    return caught.value


# --- state dicts -----------------------------------------------------------------------------------------------------

STATE_SHAPES: list[tuple[int, ...]] = [(7,), (6, 4), (5, 5), (4, 3, 2), (3, 2, 2, 3), (2, 3, 1, 2, 2)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", STATE_SHAPES, ids=str)
def test_a_state_dict_takes_the_saved_values_rounded_once(tmp_path: Path, form: str, shape: tuple[int, ...]) -> None:
    rng = dice()
    old, values = (rng.standard_normal(size).astype(np.float32) for size in (shape, shape))
    bias, other = rng.standard_normal(shape[0]).astype(np.float32), dyadic(rng, 3, 3)
    arrays = {f"{MODULE}.weight": old.astype(FORMS[form]), f"{MODULE}.bias": np.zeros(shape[0], FORMS[form])}
    base = write_state(tmp_path / "base.safetensors", arrays | {"model.other.weight": other})
    merged, receipt = merge_into(base, make_adapter(saved(weight=values, bias=bias)))
    assert same_bits(merged[f"{MODULE}.weight"], round_once(wide(values), FORMS[form]))
    assert same_bits(merged[f"{MODULE}.bias"], round_once(wide(bias), FORMS[form]))
    assert same_bits(merged["model.other.weight"], other)
    assert [weight.name for weight in receipt.weights] == [f"{MODULE}.bias", f"{MODULE}.weight"]
    assert receipt.adapters[0].targets == 2


@pytest.mark.parametrize("form", ["float16", "bfloat16", "float64"])
def test_values_of_the_stored_form_are_copied_to_the_bit(tmp_path: Path, form: str) -> None:
    values = dice().standard_normal((9, 8)).astype(FORMS[form])
    base = write_state(tmp_path / "base.safetensors", {f"{MODULE}.weight": np.ones((9, 8), FORMS[form])})
    merged, _ = merge_into(base, make_adapter(saved(weight=values)))
    assert same_bits(merged[f"{MODULE}.weight"], values)


def test_a_table_of_many_tiles_is_replaced_in_all_of_them(tmp_path: Path) -> None:
    """Tiles of float32 are summed up one in eight, which must not go for replaced ones."""
    values = dice().standard_normal((3000, 700)).astype(np.float32)
    base = write_state(tmp_path / "base.safetensors", {f"{MODULE}.weight": np.ones((3000, 700), np.float32)})
    plan = loraformat.plan_merge(base, [make_adapter(saved(weight=values))])
    assert 3000 / plan.weights[0].tile_rows > 3
    for jobs in (1, 4):
        merged, receipt = merge_into(base, make_adapter(saved(weight=values)), jobs=jobs)
        assert same_bits(merged[f"{MODULE}.weight"], values)
        change = np.linalg.norm(wide(values) - 1) / np.linalg.norm(np.ones((3000, 700)))
        assert receipt.weights[0].relative == pytest.approx(change, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_parameter_of_a_conv1d_is_taken_as_it_is(tmp_path: Path, family: str) -> None:
    """Square, so that a transposition would fit: what lies transposed in the base was saved so."""
    name = "h.0.attn.c_proj"
    values = dyadic(dice(), 6, 6)
    (tmp_path / "config.json").write_text(f'{{"model_type": "{family}"}}')
    base = write_state(tmp_path / "base.safetensors", {f"{name}.weight": np.ones((6, 6), np.float32)})
    merged, _ = merge_into(base, make_adapter(saved(name, weight=values)))
    assert same_bits(merged[f"{name}.weight"], values)


@pytest.mark.parametrize("form", COMMON)
@pytest.mark.parametrize("weight", [0.5, -1.0, 2.0])
def test_with_a_weight_it_lies_between(tmp_path: Path, form: str, weight: float) -> None:
    rng = dice()
    old, values = dyadic(rng, 6, 5).astype(FORMS[form]), dyadic(rng, 6, 5)
    base = write_state(tmp_path / "base.safetensors", {f"{MODULE}.weight": old})
    expected = round_once(wide(old) + weight * (wide(values) - wide(old)), FORMS[form])
    by_user, receipt = merge_into(base, (make_adapter(saved(weight=values)), weight))
    by_target, _ = merge_into(base, make_adapter(saved(weight=values, scale=weight)))
    assert same_bits(by_user[f"{MODULE}.weight"], expected)
    assert same_bits(by_target[f"{MODULE}.weight"], expected)
    assert receipt.weights[0].scales == (weight,)


def test_a_weight_of_zero_is_asked_for(tmp_path: Path) -> None:
    old = dyadic(dice(), 6, 5)
    base = write_state(tmp_path / "base.safetensors", {f"{MODULE}.weight": old})
    adapter = make_adapter(saved(weight=old + 1))
    assert refusal(base, (adapter, 0.0)).codes == ("LF208",)
    merged, _ = merge_into(base, (adapter, 0.0), allow_zero=True)
    assert same_bits(merged[f"{MODULE}.weight"], old)


def test_retained_never_refuses_a_replacement(tmp_path: Path) -> None:
    """A saved bias that differs by less than half a step rounds to the base's: nothing is lost, it is the value."""
    old = np.ones(8, FORMS["bfloat16"])
    base = write_state(tmp_path / "base.safetensors", {f"{MODULE}.bias": old})
    values = np.full(8, 1 + 2.0**-12, np.float32)
    merged, receipt = merge_into(base, make_adapter(saved(bias=values)), min_retained=0.99)
    assert same_bits(merged[f"{MODULE}.bias"], old)
    assert receipt.problems == ()
    assert receipt.weights[0].retained == 0.0


def test_values_equal_to_the_base_change_nothing(tmp_path: Path) -> None:
    old = dice().standard_normal(8).astype(FORMS["float16"])
    base = write_state(tmp_path / "base.safetensors", {f"{MODULE}.bias": old})
    merged, receipt = merge_into(base, make_adapter(saved(bias=old)))
    assert same_bits(merged[f"{MODULE}.bias"], old)
    assert receipt.weights[0].relative == 0.0


def test_values_beyond_the_range_are_an_error(tmp_path: Path) -> None:
    base = write_state(tmp_path / "base.safetensors", {f"{MODULE}.bias": np.ones(4, np.float16)})
    values = np.array([1.0, 70000.0, -3.0, 2.0], np.float32)
    error = refusal(base, make_adapter(saved(bias=values)))
    assert error.codes == ("LF503",)
    assert "1 numbers" in error.problems[0].found


@pytest.mark.parametrize("form", ["float32", "float16"])
def test_a_broken_number_of_the_base_is_mended_and_told(tmp_path: Path, form: str) -> None:
    old = np.array([1.0, np.nan, np.inf, 2.0], FORMS[form])
    base = write_state(tmp_path / "base.safetensors", {f"{MODULE}.bias": old})
    values = np.array([1.0, 2.0, 3.0, 4.0], FORMS[form])
    merged, receipt = merge_into(base, make_adapter(saved(bias=values)))
    assert same_bits(merged[f"{MODULE}.bias"], values)
    assert [(problem.code, problem.severity) for problem in receipt.problems] == [("LF502", "warning")]


def test_a_saved_number_that_is_none_is_refused(tmp_path: Path) -> None:
    base = write_state(tmp_path / "base.safetensors", {f"{MODULE}.bias": np.ones(3, np.float32)})
    error = refusal(base, make_adapter(saved(bias=np.array([1.0, np.nan, 2.0], np.float32))))
    assert error.codes == ("LF501",)
    assert f"{MODULE}: bias" in error.problems[0].where


def test_zeros_are_values(tmp_path: Path) -> None:
    base = write_state(tmp_path / "base.safetensors", {f"{MODULE}.bias": np.ones(3, np.float32)})
    merged, receipt = merge_into(base, make_adapter(saved(bias=np.zeros(3, np.float32))))
    assert not merged[f"{MODULE}.bias"].any()
    assert receipt.problems == ()


# --- what does not fit, and what meets -------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path) -> Path:
    rng = dice(7)
    arrays = {
        f"{MODULE}.weight": dyadic(rng, 6, 4),
        f"{MODULE}.bias": dyadic(rng, 6),
        "model.fc.weight": dyadic(rng, 5, 4),
    }
    return write_state(tmp_path / "base.safetensors", arrays)


@pytest.mark.parametrize(
    ("arrays", "where"),
    [
        ({"weight": np.ones((7, 4))}, "weight"),
        ({"weight": np.ones((4, 6))}, "weight"),
        ({"weight": np.ones((6, 4, 1))}, "weight"),
        ({"weight": np.ones(24)}, "weight"),
        ({"weight": np.ones((6, 4)), "bias": np.ones(7)}, "bias"),
        ({"bias": np.ones((6, 1))}, "bias"),
    ],
)
def test_a_shape_of_another_parameter_is_refused(state: Path, arrays: Mapping[str, Array], where: str) -> None:
    error = refusal(state, make_adapter(saved(**arrays)))
    assert error.codes == ("LF405",)
    assert error.problems[0].where == f"{MODULE}.{where}"


def test_a_vocabulary_that_has_grown_is_refused(tmp_path: Path) -> None:
    base = write_state(tmp_path / "base.safetensors", {"model.embed.weight": np.ones((9, 4), np.float32)})
    error = refusal(base, make_adapter(saved("model.embed", weight=np.ones((11, 4)))))
    assert error.codes == ("LF405",)
    assert "(9, 4)" in str(error)
    assert "(11, 4)" in str(error)


def test_a_parameter_that_the_base_lacks(state: Path) -> None:
    adapter = make_adapter(saved("model.fc", weight=np.ones((5, 4)), bias=np.ones(5)))
    error = refusal(state, adapter)
    assert error.codes == ("LF401",)
    assert "--new-biases" in error.problems[0].advice
    assert error.problems[0].where == "model.fc.bias"
    merged, receipt = merge_into(state, adapter, allow_unmatched=["model.fc"])
    assert same_bits(merged["model.fc.weight"], np.ones((5, 4), np.float32))
    assert receipt.unmatched == ("model.fc.bias",)
    assert receipt.adapters[0].targets == 1


def test_a_module_that_the_base_lacks(state: Path) -> None:
    adapter = make_adapter(saved("model.gone", weight=np.ones((5, 4)), bias=np.ones(5)), saved(bias=np.ones(6)))
    error = refusal(state, adapter)
    assert {problem.where for problem in error.problems} == {"model.gone.weight", "model.gone.bias"}
    merged, receipt = merge_into(state, adapter, allow_unmatched=["*.gone"])
    assert [weight.name for weight in receipt.weights] == [f"{MODULE}.bias"]
    assert (merged[f"{MODULE}.bias"] == 1).all()


def test_two_adapters_on_one_parameter_are_refused(state: Path) -> None:
    first, second = (make_adapter(saved(bias=np.full(6, number))) for number in (1.0, 2.0))
    error = refusal(state, first, second)
    assert error.codes == ("LF409",)
    assert error.problems[0].where == f"{MODULE}.bias"
    assert refusal(state, (first, 0.5), (first, 0.5)).codes == ("LF409",)


def test_two_adapters_on_different_parameters_of_a_module_are_not(state: Path) -> None:
    weight, bias = dyadic(dice(1), 6, 4), dyadic(dice(2), 6)
    merged, _ = merge_into(state, make_adapter(saved(weight=weight)), make_adapter(saved(bias=bias)))
    assert same_bits(merged[f"{MODULE}.weight"], weight)
    assert same_bits(merged[f"{MODULE}.bias"], bias)


@pytest.mark.parametrize("replaced_first", [True, False])
def test_a_change_of_a_replaced_weight_is_refused(state: Path, replaced_first: bool) -> None:
    """Neither order of the two is what somebody trained."""
    adapters = [
        make_adapter(saved(weight=np.ones((6, 4)))),
        make_adapter(make_target(MODULE, dyadic_factors(dice(), 6, 4, 2))),
    ]
    error = refusal(state, *(adapters if replaced_first else adapters[::-1]))
    assert error.codes == ("LF409",)
    assert f"{MODULE}.weight" in str(error)


def test_a_change_of_the_weight_beside_a_replaced_bias_is_not(state: Path) -> None:
    factors, bias = dyadic_factors(dice(), 6, 4, 2), dyadic(dice(1), 6)
    before = read_state(state)
    merged, _ = merge_into(state, make_adapter(make_target(MODULE, factors)), make_adapter(saved(bias=bias)))
    np.testing.assert_array_equal(merged[f"{MODULE}.weight"], before[f"{MODULE}.weight"] + product(factors))
    assert same_bits(merged[f"{MODULE}.bias"], bias)


def test_tied_embeddings_are_shared(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    base = write_state(tmp_path / "base.safetensors", {"model.embed_tokens.weight": np.ones((9, 4), np.float32)})
    assert refusal(base, make_adapter(saved("model.embed_tokens", weight=np.ones((9, 4))))).codes == ("LF402",)


def test_lora_and_a_saved_head_in_one_adapter(tmp_path: Path, state: Path) -> None:
    """As PEFT writes it for a classifier; alpha is for the factors alone."""
    factors, weight, bias = dyadic_factors(dice(), 5, 4, 2), dyadic(dice(1), 6, 4), dyadic(dice(2), 6)
    folder = write_peft(tmp_path / "a", {"model.fc": factors}, alpha=8, modules_to_save=["head"])
    arrays = {"model.fc.lora_A.weight": factors[0], "model.fc.lora_B.weight": factors[1]}
    arrays |= {f"{MODULE}.weight": weight, f"{MODULE}.bias": bias}
    write_tensors(
        folder / "adapter_model.safetensors", {f"base_model.model.{key}": each for key, each in arrays.items()}
    )
    before = read_state(state)
    merged, receipt = merge_into(state, folder)
    np.testing.assert_array_equal(merged["model.fc.weight"], before["model.fc.weight"] + product(factors, 4.0))
    assert same_bits(merged[f"{MODULE}.weight"], weight)
    assert same_bits(merged[f"{MODULE}.bias"], bias)
    assert receipt.problems == ()
    assert {weight.name: weight.scales for weight in receipt.weights} == {
        "model.fc.weight": (4.0,),
        f"{MODULE}.weight": (1.0,),
        f"{MODULE}.bias": (1.0,),
    }


# --- our own file, and fingerprints ----------------------------------------------------------------------------------


def make_mixed(rng: np.random.Generator) -> Adapter:
    head = saved(weight=dyadic(rng, 6, 4), bias=dyadic(rng, 6).astype(np.float16), scale=0.5)
    return make_adapter(head, make_target("model.fc", dyadic_factors(rng, 5, 4, 2), scale=2.0))


def test_our_own_file_keeps_it(tmp_path: Path, state: Path) -> None:
    adapter = make_mixed(dice())
    path = loraformat.save(adapter, tmp_path / "copy.safetensors")
    copy = loraformat.load(path)
    for one, other in zip(adapter.targets, copy.targets, strict=True):
        assert (one.name, one.kind, one.slot, one.rank, one.scaling) == (
            *(other.name, other.kind, other.slot),
            *(other.rank, other.scaling),
        )
        assert one.factors.keys() == other.factors.keys()
        assert all(same_bits(one.factors[role].read(), other.factors[role].read()) for role in one.factors)
    again = loraformat.save(copy, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()
    assert not [problem for verdict in loraformat.validate(path) for problem in verdict.problems]
    merged, _ = merge_into(state, adapter)
    from_file, _ = merge_into(state, path)
    assert all(same_bits(merged[name], from_file[name]) for name in merged)


def test_a_stamp_leaves_replaced_targets_out(state: Path) -> None:
    """Their values do not depend on the base; a print of the old ones would be of what is thrown away."""
    stamped = loraformat.stamp(make_mixed(dice()), state)
    prints = {target.name: target.fingerprint for target in stamped.targets}
    assert prints[MODULE] is None
    assert prints["model.fc"] is not None
    merged, _ = merge_into(state, stamped)
    plain, _ = merge_into(state, make_mixed(dice()))
    assert all(same_bits(merged[name], plain[name]) for name in merged)


def test_a_stamp_takes_an_old_print_away(state: Path) -> None:
    old = replace(saved(bias=np.ones(6)), fingerprint=Fingerprint((6, 4), (1.0,) * 16))
    stamped = loraformat.stamp(make_adapter(old, make_target("model.fc", dyadic_factors(dice(), 5, 4, 2))), state)
    assert [target.fingerprint is None for target in stamped.targets] == [False, True]


# --- ONNX ------------------------------------------------------------------------------------------------------------


def notes(style: str, op: str = "linear") -> dict[str, str]:
    return dynamo_scopes(MODULE, op) if style == "dynamo" else {}


def node(style: str, op: str) -> str:
    return torchscript_name(MODULE, op) if style == "torchscript" else f"node_{op.lower()}"


def feed(net: Net, form: Array, rank: int = 2) -> str:
    net.result("y", tensor_kind(form), rank)
    return net.feed("x", tensor_kind(form), rank)


def gemm(style: str, weight: Array, bias: Array) -> Net:
    net = Net()
    inputs = [feed(net, weight), net.weight(f"{MODULE}.weight", weight), net.weight(f"{MODULE}.bias", bias)]
    net.op("Gemm", inputs, "y", node(style, "Gemm"), notes(style), transB=1)
    return net


def matmul(style: str, weight: Array, bias: Array) -> Net:
    """A Linear of a 3-d input: the weight folded through a Transpose, anonymous."""
    net = Net()
    inputs = [feed(net, weight, 3), net.weight("onnx::MatMul_7" if style == "torchscript" else "val_7", weight.T)]
    net.op("MatMul", inputs, "product", node(style, "MatMul"), notes(style))
    net.op("Add", [net.weight(f"{MODULE}.bias", bias), "product"], "y", node(style, "Add"), notes(style))
    return net


def unfolded(style: str, weight: Array, bias: Array) -> Net:
    net = Net()
    x = feed(net, weight, 3)
    turned = [net.weight(f"{MODULE}.weight", weight)]
    net.op("Transpose", turned, "turned", node(style, "Transpose"), notes(style), perm=[1, 0])
    net.op("MatMul", [x, "turned"], "product", node(style, "MatMul"), notes(style))
    net.op("Add", ["product", net.weight(f"{MODULE}.bias", bias)], "y", node(style, "Add"), notes(style))
    return net


def norm(style: str, weight: Array, bias: Array) -> Net:
    net = Net()
    inputs = [feed(net, weight), net.weight(f"{MODULE}.weight", weight), net.weight(f"{MODULE}.bias", bias)]
    net.op("LayerNormalization", inputs, "y", node(style, "LayerNormalization"), notes(style, "layer_norm"), axis=-1)
    return net


def conv(style: str, weight: Array, bias: Array) -> Net:
    net = Net()
    inputs = [feed(net, weight, 4), net.weight(f"{MODULE}.weight", weight), net.weight(f"{MODULE}.bias", bias)]
    net.op("Conv", inputs, "y", node(style, "Conv"), notes(style, "conv2d"))
    return net


def scale_only(style: str, weight: Array, bias: Array) -> Net:
    """The end of a decomposed RMSNorm, with a bias to look like the others."""
    net = Net()
    net.op(
        "Mul", [net.weight(f"{MODULE}.weight", weight), feed(net, weight)], "p", node(style, "Mul"), notes(style, "mul")
    )
    net.op("Add", ["p", net.weight(f"{MODULE}.bias", bias)], "y", node(style, "Add"), notes(style, "add"))
    return net


def apply_linear(x: Array, weight: Array, bias: Array) -> Array:
    return np.asarray(x @ weight.T + bias)


def apply_norm(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias)


def apply_conv(x: Array, weight: Array, bias: Array) -> Array:
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))
    return np.asarray(np.einsum("bihwkl,oikl->bohw", windows, weight) + bias[:, None, None])


Case = tuple[
    Callable[[str, Array, Array], Net], tuple[int, ...], tuple[int, ...], Callable[[Array, Array, Array], Array]
]
CASES: dict[str, Case] = {
    "Gemm": (gemm, (6, 4), (3, 4), apply_linear),
    "square Gemm": (gemm, (5, 5), (3, 5), apply_linear),
    "MatMul and Add": (matmul, (6, 4), (2, 3, 4), apply_linear),
    "square MatMul and Add": (matmul, (5, 5), (2, 3, 5), apply_linear),
    "Transpose, MatMul and Add": (unfolded, (5, 5), (2, 3, 5), apply_linear),
    "LayerNormalization": (norm, (6,), (3, 6), apply_norm),
    "Mul and Add": (scale_only, (6,), (3, 6), lambda x, weight, bias: x * weight + bias),
    "Conv": (conv, (6, 3, 2, 3), (2, 3, 5, 6), apply_conv),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("form", COMMON)
@pytest.mark.parametrize("case", CASES)
def test_a_graph_takes_the_saved_values_rounded_once(tmp_path: Path, case: str, form: str, style: str) -> None:
    build, shape, reach, apply = CASES[case]
    rng = dice()
    old, old_bias, weight, bias = (rng.standard_normal(size).astype(np.float32) for size in (shape, shape[0]) * 2)
    model = build(style, old.astype(FORMS[form]), old_bias.astype(FORMS[form])).model()
    base = write_model(tmp_path / "base.onnx", model)
    before = stored_weights(base)
    merged, receipt = merge_into(base, make_adapter(saved(weight=weight, bias=bias)))
    name = next(name for name in merged if not name.endswith(".bias"))
    expected = round_once(wide(weight), FORMS[form])
    lies_transposed = name != f"{MODULE}.weight"
    assert same_bits(merged[name], np.ascontiguousarray(expected.T) if lies_transposed else expected)
    assert same_bits(merged[f"{MODULE}.bias"], round_once(wide(bias), FORMS[form]))
    assert not any(same_bits(merged[each], before[each]) for each in merged)
    assert len(receipt.weights) == 2
    if form == "float32":
        x = rng.standard_normal(reach).astype(np.float32)
        (y,) = run(tmp_path / "out.onnx", {"x": x})
        np.testing.assert_allclose(y, apply(x, weight, bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_half_of_it_lies_between_in_a_graph(tmp_path: Path, case: str) -> None:
    build, shape, _, _ = CASES[case]
    rng = dice(1)
    old, old_bias, weight, bias = (dyadic(rng, *size) for size in (shape, shape[:1]) * 2)
    base = write_model(tmp_path / "base.onnx", build("torchscript", old, old_bias).model())
    merged, _ = merge_into(base, (make_adapter(saved(weight=weight, bias=bias)), 0.5))
    name = next(name for name in merged if not name.endswith(".bias"))
    between = old + 0.5 * (weight - old)
    np.testing.assert_array_equal(merged[name], between if name == f"{MODULE}.weight" else between.T)
    np.testing.assert_array_equal(merged[f"{MODULE}.bias"], old_bias + 0.5 * (bias - old_bias))


@pytest.mark.parametrize("shape", [(9, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("form", COMMON)
def test_a_looked_up_table_is_replaced_as_it_is(tmp_path: Path, form: str, shape: tuple[int, int]) -> None:
    rng, net = dice(), Net()
    table = net.weight(f"{MODULE}.weight", rng.standard_normal(shape).astype(FORMS[form]))
    ids = net.feed("ids", TensorProto.INT64, 1)
    net.op("Gather", [table, ids], "y", torchscript_name(MODULE, "Gather"))
    net.result("y", tensor_kind(np.ones(1, FORMS[form])))
    values = rng.standard_normal(shape).astype(np.float32)
    merged, _ = merge_into(write_model(tmp_path / "base.onnx", net.model()), make_adapter(saved(weight=values)))
    assert same_bits(merged[f"{MODULE}.weight"], round_once(wide(values), FORMS[form]))


def square(
    op: str, *, turned: bool = False, left: bool = False, name: str = f"{MODULE}.weight", **more: Any
) -> onnx.ModelProto:
    """Return a product with a square matrix in a way that a Linear is not written."""
    net = Net()
    x, weight = feed(net, np.ones(1, np.float32)), net.weight(name, dyadic(dice(), 5, 5))
    if turned:
        weight = net.op("Transpose", [weight], "turned", torchscript_name(MODULE, "Transpose"), perm=[1, 0])
    net.op(op, [weight, x] if left else [x, weight], "y", torchscript_name(MODULE, op), **more)
    return net.model()


DOUBTFUL = {
    "Gemm, as Conv1D": square("Gemm", transB=0),
    "Gemm of an anonymous matrix": square("Gemm", transB=0, name="onnx::Gemm_7"),
    "Gemm of a matrix that is turned twice": square("Gemm", turned=True, transB=1),
    "x @ self.weight": square("MatMul"),
    "self.weight.T @ x": square("MatMul", turned=True, left=True),
    "self.weight.T @ x, folded": square("MatMul", left=True, name="onnx::MatMul_7"),
}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_a_matrix_that_may_lie_either_way_is_refused(tmp_path: Path, case: str) -> None:
    """The operator tells how the matrix acts, and so what a LoRA of it is; not how the module holds its parameter."""
    base = write_model(tmp_path / "base.onnx", DOUBTFUL[case])
    error = refusal(base, make_adapter(saved(weight=np.eye(5))))
    assert error.codes == ("LF408",)
    assert error.problems[0].where == f"{MODULE}.weight"
    merge_into(base, make_adapter(make_target(MODULE, dyadic_factors(dice(), 5, 5, 2))))


def test_a_parameter_on_the_left_is_taken_as_it_is(tmp_path: Path) -> None:
    values = dyadic(dice(3), 5, 5)
    base = write_model(tmp_path / "base.onnx", square("MatMul", left=True))
    merged, _ = merge_into(base, make_adapter(saved(weight=values)))
    assert same_bits(merged[f"{MODULE}.weight"], values)


@pytest.mark.parametrize(("op", "parameter"), [("Mul", "weight"), ("Add", "bias"), ("LayerNormalization", "weight")])
@pytest.mark.parametrize("style", STYLES)
def test_a_vector_without_its_name_was_computed_and_is_no_parameter(
    tmp_path: Path, op: str, parameter: str, style: str
) -> None:
    """Gemma's norms multiply by 1 + weight, which exporters fold: the saved weight must not take the sum's place."""
    net = Net()
    inputs = [
        feed(net, np.ones(1, np.float32)),
        net.weight("onnx::Mul_7" if style == "torchscript" else "add_1", np.ones(6, np.float32)),
    ]
    net.op(op, inputs, "y", node(style, op), notes(style, "mul"))
    base = write_model(tmp_path / "base.onnx", net.model())
    assert refusal(base, make_adapter(saved(**{parameter: np.zeros(6, np.float32)}))).codes == ("LF401",)


def test_a_sum_that_is_computed_in_the_graph_is_none_either(tmp_path: Path) -> None:
    net = Net()
    weight = net.weight(f"{MODULE}.weight", np.ones(6, np.float32))
    net.op("Add", [weight, net.weight("one", np.ones((), np.float32))], "sum", node("torchscript", "Add"))
    net.op("Mul", [feed(net, np.ones(1, np.float32)), "sum"], "y", node("torchscript", "Mul"))
    base = write_model(tmp_path / "base.onnx", net.model())
    assert refusal(base, make_adapter(saved(weight=np.zeros(6, np.float32)))).codes == ("LF401",)


@pytest.mark.parametrize("style", STYLES)
def test_a_bias_that_another_module_reads_is_copied(tmp_path: Path, style: str) -> None:
    """Exporters store equal tensors once, as zeros at the start of a training are."""
    net = Net()
    bias = net.weight(f"{MODULE}.bias", np.zeros(4, np.float32))
    first = [feed(net, np.ones(1, np.float32)), net.weight(f"{MODULE}.weight", dyadic(dice(), 4, 4)), bias]
    net.op("Gemm", first, "middle", node(style, "Gemm"), notes(style), transB=1)
    scoped = dynamo_scopes("model.tail") if style == "dynamo" else {}
    second = ["middle", net.weight("model.tail.weight", dyadic(dice(1), 4, 4)), bias]
    net.op("Gemm", second, "y", torchscript_name("model.tail", "Gemm"), scoped, transB=1)
    base = write_model(tmp_path / "base.onnx", net.model())
    for name, more in ((MODULE, {}), ("model.tail", {}), (MODULE, {"weight": np.ones((4, 4))})):
        after, receipt = merge_into(base, make_adapter(saved(name, bias=np.ones(4), **more)))
        (copied,) = (weight for weight in receipt.weights if weight.copied_from)
        assert copied.copied_from == f"{MODULE}.bias"
        assert copied.targets == (name,)
        assert (after[copied.name] == 1).all()
        assert not after[f"{MODULE}.bias"].any()
        (problem,) = receipt.problems
        assert problem.code == "LF417"


def test_a_bias_that_the_graph_lacks(tmp_path: Path) -> None:
    net = Net()
    inputs = [feed(net, np.ones(1, np.float32)), net.weight(f"{MODULE}.weight", dyadic(dice(), 6, 4))]
    net.op("Gemm", inputs, "y", node("torchscript", "Gemm"), transB=1)
    base = write_model(tmp_path / "base.onnx", net.model())
    adapter = make_adapter(saved(weight=np.ones((6, 4)), bias=np.ones(6)))
    error = refusal(base, adapter)
    assert error.codes == ("LF401",)
    assert error.problems[0].where == f"{MODULE}.bias"
    merged, receipt = merge_into(base, adapter, allow_unmatched=[MODULE])
    assert (merged[f"{MODULE}.weight"] == 1).all()
    assert receipt.unmatched == (f"{MODULE}.bias",)


@pytest.mark.parametrize(("alpha", "beta", "role"), [(2.0, 1.0, "weight"), (1.0, 2.0, "bias"), (1.0, 0.0, "bias")])
def test_what_the_graph_multiplies_is_not_replaced(tmp_path: Path, alpha: float, beta: float, role: str) -> None:
    net = Net()
    inputs = [feed(net, np.ones(1, np.float32)), net.weight(f"{MODULE}.weight", dyadic(dice(), 6, 4))]
    inputs.append(net.weight(f"{MODULE}.bias", dyadic(dice(), 6)))
    net.op("Gemm", inputs, "y", node("torchscript", "Gemm"), transB=1, alpha=alpha, beta=beta)
    base = write_model(tmp_path / "base.onnx", net.model())
    error = refusal(base, make_adapter(saved(weight=np.ones((6, 4)), bias=np.ones(6))))
    assert error.codes == ("LF403",)
    assert error.problems[0].where.startswith(f"{MODULE}.{role}")


def test_lora_and_a_saved_head_in_one_graph(tmp_path: Path) -> None:
    rng, net = dice(), Net()
    old, old_bias, body = dyadic(rng, 6, 5), dyadic(rng, 6), dyadic(rng, 5, 4)
    x = net.feed("x")
    net.op("Gemm", [x, net.weight("model.fc.weight", body)], "h", torchscript_name("model.fc", "Gemm"), transB=1)
    inputs = ["h", net.weight(f"{MODULE}.weight", old), net.weight(f"{MODULE}.bias", old_bias)]
    net.op("Gemm", inputs, net.result("y"), node("torchscript", "Gemm"), transB=1)
    base = write_model(tmp_path / "base.onnx", net.model())
    factors, weight, bias = dyadic_factors(rng, 5, 4, 2), dyadic(rng, 6, 5), dyadic(rng, 6)
    adapter = make_adapter(make_target("model.fc", factors, scale=2.0), saved(weight=weight, bias=bias))
    merge_into(base, adapter)
    feeds = rng.standard_normal((3, 4)).astype(np.float32)
    (y,) = run(tmp_path / "out.onnx", {"x": feeds})
    np.testing.assert_allclose(y, feeds @ (body + product(factors, 2.0)).T @ weight.T + bias, rtol=1e-4, atol=1e-4)


def test_a_graph_that_an_exporter_left_a_bias_out_of(tmp_path: Path) -> None:
    """torch's newer exporter drops biases of zeros, as those of a new head: said, with the way to keep them."""
    rng, net, module = np.random.default_rng(3), Net(), "model.head"
    net.op("Gemm", [net.feed("x"), net.weight(f"{module}.weight", dyadic(rng, 5, 6))], net.result("y"), transB=1)
    base = write_model(tmp_path / "base.onnx", net.model())
    adapter = write_peft(tmp_path / "a", {}, r=4, modules_to_save=["head"])
    saved = {f"base_model.model.{module}.weight": dyadic(rng, 5, 6), f"base_model.model.{module}.bias": dyadic(rng, 5)}
    write_tensors(adapter / "adapter_model.safetensors", saved)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("LF401", "model.head.bias")
    assert problem.found == "the base has no model.head.bias"
    assert "optimize=False" in problem.mend
    receipt = loraformat.merge(base, [adapter], tmp_path / "merged.onnx", allow_unmatched=["model.head.bias"])
    assert [weight.name for weight in receipt.weights] == ["model.head.weight"]
