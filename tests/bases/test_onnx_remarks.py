"""What is said of a graph, whatever is merged: compiled ones, and ones without their weights; prefixes of compose."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import loraformat
from builders import write_peft
from graphs import dyadic, dyadic_factors, linear_net, product, run, write_model

Q, K = "model.layers.0.q_proj", "model.layers.0.k_proj"
RNG = np.random.default_rng(6)
WEIGHTS = {name: dyadic(RNG, 12, 8) for name in (Q, K)}
PAIR = dyadic_factors(RNG, 12, 8, 2)


def codes_of(base: Path, adapter: Path) -> tuple[str, ...]:
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.plan_merge(base, [adapter])
    return caught.value.codes


def test_a_graph_compiled_for_an_accelerator_is_named(tmp_path: Path) -> None:
    """What of it is still readable could be merged, and the part behind the node would not follow."""
    model = linear_net({Q: WEIGHTS[Q]}).model()
    node = helper.make_node("EPContext", ["x"], ["y"], "block", domain="com.microsoft", source="QNN", embed_mode=0)
    model.graph.node.append(node)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    base = write_model(tmp_path / "base.onnx", model)
    assert codes_of(base, write_peft(tmp_path / "adapter", {Q: PAIR})) == ("LF636",)


@pytest.mark.parametrize("is_input", [True, False])
def test_a_graph_without_its_weights_is_named(tmp_path: Path, is_input: bool) -> None:
    """Both of torch's exporters write one where they are asked to, as inputs or as values that nothing makes."""
    model = linear_net({Q: WEIGHTS[Q]}, "dynamo-unfolded").model()
    (weight,) = model.graph.initializer
    if is_input:
        model.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims)))
    adapter = write_peft(tmp_path / "adapter", {Q: PAIR})
    loraformat.plan_merge(write_model(tmp_path / "whole.onnx", model), [adapter])
    del model.graph.initializer[:]
    (tmp_path / "base.onnx").write_bytes(model.SerializeToString())
    assert codes_of(tmp_path / "base.onnx", adapter)[0] == "LF637"


@pytest.mark.parametrize("style", ["torchscript", "torchscript-unfolded", "dynamo", "named"])
def test_prefixes_that_compose_puts_before_all_names(tmp_path: Path, style: str) -> None:
    base = tmp_path / "base.onnx"
    onnx.save(onnx.compose.add_prefix(linear_net(WEIGHTS, style).model(), "first/"), base)
    loraformat.merge(base, [write_peft(tmp_path / "adapter", {Q: PAIR}, alpha=2.0)], tmp_path / "out.onnx")
    x = dyadic(RNG, 3, 8)
    found = run(tmp_path / "out.onnx", {f"first/in.{name}": x for name in WEIGHTS})
    for got, name in zip(found, WEIGHTS, strict=True):
        weight = WEIGHTS[name] + (product(PAIR, 1.0) if name == Q else 0)
        np.testing.assert_array_equal(got, (x @ weight.T).astype(np.float32))


def test_two_models_in_one_are_not_guessed_between(tmp_path: Path) -> None:
    """Each has the module; the prefix before the target's name says which."""
    models = [onnx.compose.add_prefix(linear_net(WEIGHTS, "named").model(), f"{name}/") for name in ("query", "text")]
    joined = onnx.compose.merge_graphs(models[0].graph, models[1].graph, [])
    model = helper.make_model(joined, opset_imports=models[0].opset_import, ir_version=models[0].ir_version)
    base = write_model(tmp_path / "base.onnx", model)
    assert codes_of(base, write_peft(tmp_path / "adapter", {Q: PAIR})) == ("LF404",)
    plan = loraformat.plan_merge(base, [write_peft(tmp_path / "own", {f"text.{Q}": PAIR})])
    assert [weight.name for weight in plan.weights] == [f"text/{Q}.weight"]
