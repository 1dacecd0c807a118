"""Paddle: factors as `(in, rank)` and `(rank, out)`, a configuration of its own, and what else has the same names."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loraformat
from builders import write_tensors
from laws.scheme_laws import SchemeLaws
from loraformat.errors import LoraformatError
from loraformat.loading.readers import choose_scheme
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes.paddle import SCHEME
from schemes import decoders as d

Q, OUT = "llama.layers.0.self_attn.q_proj", "llama.layers.0.self_attn.o_proj"
SHAPES = {Q: (7, 10), OUT: (10, 10)}
CONFIG = {"r": 2, "lora_alpha": 6, "rslora": False, "lora_plus_scale": 1.0, "trainable_bias": None, "scaling": 3.0}


def arrays_of(rank: int = 2, names: Mapping[str, tuple[int, int]] = SHAPES) -> dict[str, Any]:
    dice = np.random.default_rng(1)
    return {
        f"{name}.lora_{letter}": dice.standard_normal(shape).astype(np.float32)
        for name, (out, inner) in names.items()
        for letter, shape in (("A", (inner, rank)), ("B", (rank, out)))
    }


def bundle_of(tensors: Mapping[str, Any], config: Any = CONFIG) -> Bundle:
    return Bundle(Path("paddle"), d.tensors(tensors), {}, config)


class TestPaddle(SchemeLaws):
    scheme = SCHEME

    def examples(self) -> Mapping[str, Bundle]:
        nlp = arrays_of()
        formers = {name.replace("llama.", "model."): each for name, each in arrays_of().items()}
        return {"PaddleNLP": bundle_of(nlp), "PaddleFormers": bundle_of(formers, CONFIG | {"rslora": True})}


def test_a_folder_changes_the_weight_as_paddle_does(tmp_path: Path) -> None:
    arrays = arrays_of()
    names = {"StructuredToParameterName@@": {name: f"p_{index}" for index, name in enumerate(arrays)}}
    (tmp_path / "lora_model_state.pdparams").write_bytes(pickle.dumps({**arrays, **names}, 4))
    (tmp_path / "lora_config.json").write_text(json.dumps(CONFIG))
    base = {f"{name.replace('llama', 'model')}.weight": np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    write_tensors(tmp_path / "base.safetensors", base)
    loraformat.merge(tmp_path / "base.safetensors", tmp_path, output=tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    for module in SHAPES:
        want = 1 + 3.0 * (arrays[f"{module}.lora_A"] @ arrays[f"{module}.lora_B"]).T
        key = f"{module.replace('llama', 'model')}.weight"
        assert np.allclose(merged[key], want, atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "config", "scale"),
    [(2, {"rslora": True}, 6 / 2**0.5), (4, {"loraga": True}, 3.0), (2, {"lora_alpha": 5}, 2.5)],
)
def test_the_scale_is_of_the_rank_in_the_configuration(rank: int, config: Mapping[str, Any], scale: float) -> None:
    adapter = SCHEME.read(bundle_of(arrays_of(rank), {**CONFIG, **config}), NOT_STATED)
    assert {target.scale for target in adapter.targets} == {scale}
    assert {target.rank for target in adapter.targets} == {rank}


def test_without_a_configuration_the_shapes_tell_and_the_scale_is_asked_for() -> None:
    bundle = bundle_of(arrays_of(names={OUT: (10, 10)}), None)
    assert choose_scheme(bundle, None)[0] is SCHEME
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle, NOT_STATED)
    assert caught.value.codes == ("LF211",)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"pissa": True}, SHAPES),
        ({"enable_lora_list": [[True, False, True]]}, SHAPES),
        ({"tensor_parallel_degree": 2}, SHAPES),
        ({}, {"llama.layers.0.self_attn.qkv_proj": (14, 10)}),
    ],
)
def test_what_is_something_else(config: Mapping[str, Any], names: Mapping[str, tuple[int, int]]) -> None:
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle_of(arrays_of(names=names), {**CONFIG, **config}), NOT_STATED)
    assert caught.value.codes == ("LF209",)
    assert caught.value.problems[0].mend
