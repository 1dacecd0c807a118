"""Models of TensorFlow as tf2onnx exports them, merged by names; TensorFlow with other kernels is the oracle.

Needs tensorflow, tf2onnx and a transformers that has TensorFlow models (before 5): an environment of its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from builders import Factors, write_peft
from graphs import run

pytestmark = pytest.mark.oracle
for _package in ("tensorflow", "tf2onnx", "transformers", "onnxruntime"):
    pytest.importorskip(_package, reason=f"these tests need {_package}")
pytestmark = [pytestmark, pytest.mark.filterwarnings("ignore")]

Array = NDArray[Any]
RNG = np.random.default_rng(0)
SCALE = 2.0
SIZES = {"vocab_size": 50, "num_attention_heads": 2, "max_position_embeddings": 16}
BERT = SIZES | {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
TEXT = {"input_ids": RNG.integers(0, 50, (2, 7)).astype(np.int32), "attention_mask": np.ones((2, 7), np.int32)}


def _bert() -> Any:
    import transformers

    return transformers.TFBertForSequenceClassification(transformers.BertConfig(**BERT))


def _gpt2() -> Any:
    import transformers

    sizes = {"vocab_size": 50, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return transformers.TFGPT2LMHeadModel(transformers.GPT2Config(**sizes))


MODELS: Mapping[str, tuple[Any, dict[str, str]]] = {
    "bert": (
        _bert,
        {
            "bert/encoder/layer_._0/attention/self/query/kernel:0": "bert.encoder.layer.0.attention.self.query",
            "bert/encoder/layer_._1/intermediate/dense/kernel:0": "bert.encoder.layer.1.intermediate.dense",
            "bert/encoder/layer_._1/output/dense/kernel:0": "bert.encoder.layer.1.output.dense",
            "classifier/kernel:0": "classifier",
        },
    ),
    "gpt2": (
        _gpt2,
        {
            "h_._0/attn/c_attn/weight:0": "transformer.h.0.attn.c_attn",
            "h_._1/mlp/c_fc/weight:0": "transformer.h.1.mlp.c_fc",
        },
    ),
}
"""How each is made, and targets by the ends of variables' names."""


def export(compute: Any, path: Path) -> Path:
    import tf2onnx

    tf2onnx.convert.from_function(compute, input_signature=compute.input_signature, opset=15, output_path=str(path))
    return path


def assert_merged(
    folder: Path, base: Path, factors: Mapping[str, Factors], feeds: Mapping[str, Array], wanted: Array
) -> None:
    import loraformat

    rank = next(iter(factors.values()))[0].shape[0]
    adapter = write_peft(folder / "adapter", factors, alpha=rank * SCALE)
    loraformat.merge(base, [adapter], folder / "merged.onnx")
    before, after = (run(path, feeds)[0] for path in (base, folder / "merged.onnx"))
    apart = np.abs(after - wanted).max()
    assert apart <= 1e-6 * np.abs(wanted).max() + 1e-6 < np.abs(before - wanted).max() / 100


@pytest.mark.parametrize("name", MODELS)
def test_text_models(tmp_path: Path, name: str) -> None:
    import tensorflow as tf

    make, targets = MODELS[name]
    model = make()
    model({key: tf.constant(value) for key, value in TEXT.items()})
    variables = {variable.name: variable for variable in model.trainable_variables}
    for variable in variables.values():
        variable.assign(RNG.normal(0, 0.2, variable.shape).astype(np.float32))
    signature = [{key: tf.TensorSpec((None, None), tf.int32, name=key) for key in TEXT}]
    compute = tf.function(lambda feeds: model(feeds)[0], input_signature=signature)
    base = export(compute, tmp_path / "base.onnx")
    factors = {}
    for ending, target in targets.items():
        kernel = next(variable for full, variable in variables.items() if full.endswith(ending))
        size, out = kernel.shape
        factors[target] = RNG.normal(size=(2, size)).astype(np.float32), RNG.normal(size=(out, 2)).astype(np.float32)
        kernel.assign(kernel.numpy() + SCALE * (factors[target][1] @ factors[target][0]).T)
    assert_merged(tmp_path, base, factors, TEXT, compute({k: tf.constant(v) for k, v in TEXT.items()}).numpy())


@pytest.mark.parametrize("normed", [False, True])
def test_convolutions(tmp_path: Path, normed: bool) -> None:
    """tf2onnx folds BatchNorm: then the kernel is no longer the layer's, and refused."""
    import tensorflow as tf
    from tensorflow import keras

    import loraformat

    layers = keras.layers
    given = layers.Input((9, 9, 3))
    hidden = layers.Conv2D(5, (3, 2), name="stem", use_bias=not normed)(given)
    hidden = layers.BatchNormalization(name="norm")(hidden) if normed else hidden
    hidden = layers.Conv2D(4, 3, name="body")(layers.ReLU()(hidden))
    model = keras.Model(given, layers.Dense(6, name="head")(layers.Flatten()(hidden)), name="net")
    for variable in model.variables:
        variable.assign(RNG.uniform(0.1, 0.4, variable.shape).astype(np.float32))
    signature = [tf.TensorSpec((None, 9, 9, 3), tf.float32, name="x")]
    compute = tf.function(lambda x: model(x), input_signature=signature)
    base = export(compute, tmp_path / "base.onnx")
    factors = {}
    for name in ("stem", "body"):
        kernel = model.get_layer(name).kernel
        high, wide, size, out = kernel.shape
        a = RNG.normal(size=(2, size, high, wide)).astype(np.float32)
        b = RNG.normal(size=(out, 2, 1, 1)).astype(np.float32)
        factors[name] = a, b
        change = (b.reshape(out, 2) @ a.reshape(2, -1)).reshape(out, size, high, wide)
        kernel.assign(kernel.numpy() + SCALE * change.transpose(2, 3, 1, 0))
    feeds = {"x": RNG.normal(size=(2, 9, 9, 3)).astype(np.float32)}
    if normed:
        with pytest.raises(loraformat.LoraformatError) as caught:
            assert_merged(tmp_path, base, factors, feeds, compute(feeds["x"]).numpy())
        assert caught.value.codes == ("LF407",)
    else:
        assert_merged(tmp_path, base, factors, feeds, compute(feeds["x"]).numpy())
