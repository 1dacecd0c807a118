"""What onnxruntime-genai's builder puts into one matrix, or calls by names of its own."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

import loraformat
from graphs import Net, dyadic, dyadic_factors, merge_model, product, run, torchscript_name
from loraformat.bases._onnx.built_names import rename_built

IN = 6
LAYER = "model.layers.0"


def built(module: str, rows: Sequence[int], stored: np.ndarray, *, equal: bool = False) -> onnx.ModelProto:
    """Return a product whose columns a Split gives to `rows` outputs, of sizes stated or all equal."""
    net = Net()
    path = f"{LAYER}.{module}"
    weight = net.weight(f"{path}.MatMul.weight", stored.T)
    x = net.feed("x", rank=3)
    net.op("MatMul", [x, weight], "products", torchscript_name(path, "MatMul"))
    sizes = {"num_outputs": len(rows)} if equal else {}
    given = ["products"] if equal else ["products", net.weight("sizes", np.array(rows))]
    net.op("Split", given, net.result("y0", rank=3), torchscript_name(path, "Split"), axis=-1, **sizes)
    net.nodes[-1].output.extend(net.result(f"y{number}", rank=3) for number in range(1, len(rows)))
    model = net.model()
    model.producer_name = "onnxruntime-genai"
    return model


@pytest.mark.parametrize(
    ("module", "members", "rows"),
    [
        ("attn.qkv_proj", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], [8, 4, 4]),
        ("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"], [5, 5]),
    ],
)
def test_a_split_behind_the_product_says_whose_rows_are_whose(
    tmp_path: Path, module: str, members: Sequence[str], rows: Sequence[int]
) -> None:
    """Qwen 3 has norms between, so no attention reads the product; gate and up are packed where asked for."""
    rng = np.random.default_rng(51)
    weights = [dyadic(rng, count, IN) for count in rows]
    model = built(module, rows, np.concatenate(weights), equal=len(set(rows)) == 1)
    factors = {
        f"{LAYER}.{member}": dyadic_factors(rng, count, IN, 2) for member, count in zip(members, rows, strict=True)
    }
    merged = merge_model(tmp_path, model, factors, alpha=2.0)
    x = dyadic(rng, 1, 3, IN)
    for found, weight, pair in zip(run(merged, {"x": x}), weights, factors.values(), strict=True):
        np.testing.assert_allclose(found, x @ (weight + product(pair)).T, rtol=1e-6)


def test_of_sizes_that_do_not_add_up_nothing_is_known(tmp_path: Path) -> None:
    rng = np.random.default_rng(52)
    model = built("attn.qkv_proj", [8, 4, 3], dyadic(rng, 16, IN))
    with pytest.raises(loraformat.FindingError) as caught:
        merge_model(tmp_path, model, {f"{LAYER}.self_attn.k_proj": dyadic_factors(rng, 4, IN, 2)})
    assert caught.value.codes == ("LF401",)


@pytest.mark.parametrize(
    ("inputs", "module", "own"),
    [
        ({"input_ids"}, "model.layers.3.attn.q_proj", "model.layers.3.self_attn.q_proj"),
        ({"input_ids"}, "model.layers.3.attn.o_proj", "model.layers.3.self_attn.dense"),
        ({"input_ids"}, "model.layers.3.mlp.up_proj", "model.layers.3.feed_forward.w3"),
        ({"input_ids"}, "model.layers.3.moe.router", "model.layers.3.mlp.router"),
        ({"audio_features"}, "model.layers.3.attn.Attention.k_proj", "model.encoder.layers.3.self_attn.k_proj"),
        ({"audio_features"}, "model.layers.3.attn.cross.k_proj", "model.decoder.layers.3.encoder_attn.k_proj"),
        ({"past_key_cross_0"}, "model.layers.3.attn.k_proj", "model.decoder.layers.3.self_attn.k_proj"),
        ({"past_key_cross_0"}, "model.layers.3.cross_attn.o_proj", "model.decoder.layers.3.encoder_attn.out_proj"),
        ({"past_key_cross_0"}, "model.layers.3.mlp.fc1", "model.decoder.layers.3.fc1"),
    ],
)
def test_names_of_the_builder(inputs: set[str], module: str, own: str) -> None:
    assert own in set(rename_built(module, inputs))


def test_names_of_others_are_left_alone() -> None:
    assert not list(rename_built("model.layers.3.self_attn.q_proj", {"input_ids"}))
    assert not list(rename_built("lm_head", {"past_key_cross_0"}))
