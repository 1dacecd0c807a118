"""Paddle's own files: what `paddle.save` writes of a LoRA layer, merged, is what the layer computes in Paddle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat

paddle = pytest.importorskip("paddle", reason="needs paddle, in an environment of its own")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore::UserWarning")]

CONFIG = {"r": 4, "lora_alpha": 6, "rslora": False, "trainable_bias": None, "tensor_model_parallel_size": -1}


def make_layer() -> Any:
    """Return a layer whose parameters and product are those of Paddle's LoRALinear."""
    layer = paddle.nn.Linear(24, 40)
    layer.lora_A = layer.create_parameter([24, 4], default_initializer=paddle.nn.initializer.Normal())
    layer.lora_B = layer.create_parameter([4, 40], default_initializer=paddle.nn.initializer.Normal())
    return layer


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_a_merge_is_what_the_layer_computes(tmp_path: Path, form: str) -> None:
    paddle.seed(3)
    layer = make_layer()
    name = "model.layers.0.mlp.up_proj"
    state = {f"{name}.lora_{letter}": getattr(layer, f"lora_{letter}").astype(form) for letter in "AB"}
    paddle.save(state, str(tmp_path / "lora_model_state.pdparams"))
    (tmp_path / "lora_config.json").write_text(json.dumps(CONFIG))
    x = paddle.randn([5, 24])
    down, up = (state[f"{name}.lora_{letter}"].astype("float32") for letter in "AB")
    want = (layer(x) + x @ down @ up * (6 / 4)).numpy()

    weight = np.ascontiguousarray(layer.weight.numpy().T)
    merged = loraformat.merge_state_dict({f"{name}.weight": weight}, tmp_path).tensors[f"{name}.weight"]
    got = x.numpy() @ merged.T + layer.bias.numpy()
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
