"""KerasHub: layers by number, kernels with an axis for the heads, and a base that names them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laws.scheme_laws import SchemeLaws
from loraformat.base_facts import NO_FACTS, BaseFacts
from loraformat.errors import LoraformatError
from loraformat.schemes import NOT_STATED, Bundle, StatedScale
from loraformat.schemes.keras import SCHEME
from schemes import decoders as d

HEADS, SIZE, HIDDEN, RANK = d.HEADS, d.HEAD_DIM, d.HIDDEN, 2
DICE = np.random.default_rng(0)


def layer(number: int, a: tuple[int, ...], out: int) -> dict[str, Any]:
    shapes = {"a": (*a, RANK), "b": (RANK, out)}
    return {
        f"lora/{number}/vars/lora_kernel_{letter}": DICE.standard_normal(shape).astype(np.float32)
        for letter, shape in shapes.items()
    }


def bundle_of(arrays: Mapping[str, Any], facts: BaseFacts = d.LLAMA) -> Bundle:
    return Bundle(Path("a.lora.h5"), d.tensors({**arrays, "lora/vars/rank": np.array(RANK)}), facts=facts)


LLAMA = {**layer(11, (HIDDEN, HEADS), SIZE), **layer(20, (HIDDEN, d.KV_HEADS), SIZE), **layer(8, (HEADS, SIZE), HIDDEN)}


class TestKeras(SchemeLaws):
    scheme = SCHEME
    facts = d.LLAMA

    def examples(self) -> Mapping[str, Bundle]:
        return {"Llama": bundle_of({**LLAMA, **layer(3, (d.MLP,), HIDDEN)})}


def change_of(adapter: Any, name: str) -> Any:
    target = next(target for target in adapter.targets if target.name == name)
    return target.scale * target.factors["lora_B.weight"].read() @ target.factors["lora_A.weight"].read()


@pytest.mark.parametrize(("family", "number", "axes"), [("llama", 11, "dhr"), ("gemma", 10, "hdr")])
def test_heads_share_b(family: str, number: int, axes: str) -> None:
    sizes = {"d": HIDDEN, "h": HEADS}
    arrays = layer(number, (sizes[axes[0]], sizes[axes[1]]), SIZE)
    a, b = arrays.values()
    adapter = SCHEME.read(bundle_of(arrays, replace(d.LLAMA, architecture=family)), StatedScale(alpha=3.0))
    want = 1.5 * np.einsum(f"{axes},rk->hkd", a, b).reshape(HEADS * SIZE, HIDDEN)
    assert np.allclose(change_of(adapter, "model.layers.0.self_attn.q_proj"), want, atol=1e-5)


def test_names_of_blocks_and_the_scale() -> None:
    adapter = SCHEME.read(bundle_of(LLAMA), NOT_STATED)
    names = {"0.self_attn.q_proj", "1.self_attn.v_proj", "0.self_attn.o_proj"}
    assert {target.name.removeprefix("model.layers.") for target in adapter.targets} == names
    assert {target.scale for target in adapter.targets} == {1.0}


@pytest.mark.parametrize(
    ("arrays", "facts", "code"),
    [
        (LLAMA, NO_FACTS, "LF311"),
        (LLAMA, replace(d.LLAMA, architecture="opt"), "LF646"),
        (LLAMA, replace(d.LLAMA, counts={**d.COUNTS, "layers": 1}), "LF646"),
        (layer(7, (HIDDEN, HEADS), SIZE), d.LLAMA, "LF646"),
        (LLAMA, replace(d.LLAMA, architecture="qwen3"), "LF203"),
        (layer(11, (HEADS, HIDDEN), SIZE), d.LLAMA, "LF203"),
    ],
)
def test_what_the_base_does_not_name(arrays: Mapping[str, Any], facts: BaseFacts, code: str) -> None:
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle_of(arrays, facts), NOT_STATED)
    assert caught.value.codes == (code,)
