"""qwix and Tunix: every axis of a weight, Gemma's fused ones, and names that are transformers' but for a few."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laws.scheme_laws import SchemeLaws
from loraformat.errors import LoraformatError
from loraformat.schemes import NOT_STATED, Bundle, StatedScale
from loraformat.schemes.qwix import SCHEME
from schemes import decoders as d

RANK = 3
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Module with its parameter, to the shapes of A and of B."""

MLP: Shapes = {
    "mlp.gate_proj.kernel": ((d.HIDDEN, RANK), (RANK, d.MLP)),
    "mlp.down_proj.kernel": ((d.MLP, RANK), (RANK, d.HIDDEN)),
}
LLAMA: Shapes = {
    "attn.q_proj.w": ((d.HIDDEN, RANK), (RANK, d.HEADS, d.HEAD_DIM)),
    "attn.v_proj.w": ((d.HIDDEN, RANK), (RANK, d.KV_HEADS, d.HEAD_DIM)),
    "attn.o_proj.w": ((d.HEADS, d.HEAD_DIM, RANK), (RANK, d.HIDDEN)),
}
GEMMA: Shapes = {
    "attn.q_einsum.w": ((d.HIDDEN, RANK), (RANK, d.HEADS, d.HEAD_DIM)),
    "attn.kv_einsum.w": ((d.HIDDEN, RANK), (RANK, 2, d.KV_HEADS, d.HEAD_DIM)),
    "attn.attn_vec_einsum.w": ((d.HEADS, d.HEAD_DIM, RANK), (RANK, d.HIDDEN)),
}
SMALL_GEMMA: Shapes = {"attn.qkv_einsum.w": ((d.HIDDEN, RANK), (RANK, 3, d.HEADS, d.HEAD_DIM))}


def make(shapes: Shapes, key: str = "layers.{layer}.{module}_lora_{letter}") -> dict[str, Any]:
    dice = np.random.default_rng(len(shapes))
    return {
        key.format(layer=layer, module=module, letter=letter): dice.standard_normal(shape).astype(np.float32)
        for layer in (0, 12)
        for module, pair in shapes.items()
        for letter, shape in zip("ab", pair, strict=True)
    }


def bundle_of(arrays: Mapping[str, Any]) -> Bundle:
    return Bundle(Path("lora.safetensors"), d.tensors(arrays))


class TestQwix(SchemeLaws):
    scheme = SCHEME
    stated = StatedScale(alpha=6)

    def examples(self) -> Mapping[str, Bundle]:
        slashes = make({**LLAMA, **MLP}, "params/layers/{layer}/{module}_lora_{letter}")
        return {
            "Llama and Qwen": bundle_of(make({**LLAMA, **MLP})),
            "Gemma": bundle_of(make({**GEMMA, **MLP})),
            "Gemma with as many keys as queries": bundle_of(make(SMALL_GEMMA)),
            "slashes": bundle_of({name.replace("attn.", "attn/"): array for name, array in slashes.items()}),
            "an optimiser's values": bundle_of(make(LLAMA, "layers.{layer}.{module}_lora_{letter}.value")),
        }


def change_of(arrays: Mapping[str, Any], name: str) -> Any:
    factors = {each.name: each.factors for each in SCHEME.read(bundle_of(arrays), StatedScale(alpha=6)).targets}[name]
    return factors["lora_B.weight"].read().astype(np.float64) @ factors["lora_A.weight"].read()


@pytest.mark.parametrize(
    ("shapes", "module", "name", "einsum", "part"),
    [
        (LLAMA, "attn.q_proj.w", "q_proj", "dr,rnh->nhd", None),
        (LLAMA, "attn.o_proj.w", "o_proj", "nhr,rd->dnh", None),
        (GEMMA, "attn.q_einsum.w", "q_proj", "dr,rnh->nhd", None),
        (GEMMA, "attn.kv_einsum.w", "k_proj", "dr,rckh->ckhd", 0),
        (GEMMA, "attn.kv_einsum.w", "v_proj", "dr,rckh->ckhd", 1),
        (GEMMA, "attn.attn_vec_einsum.w", "o_proj", "nhr,rd->dnh", None),
        (SMALL_GEMMA, "attn.qkv_einsum.w", "k_proj", "dr,rsnh->snhd", 1),
    ],
)
def test_a_change_is_the_product_over_the_rank(
    shapes: Shapes, module: str, name: str, einsum: str, part: int | None
) -> None:
    arrays = make(shapes)
    pair = (arrays[f"layers.12.{module}_lora_{letter}"].astype(np.float64) for letter in "ab")
    expected = np.einsum(einsum, *pair)
    expected = expected if part is None else expected[part]
    change = change_of(arrays, f"model.layers.12.self_attn.{name}")
    np.testing.assert_allclose(change, expected.reshape(change.shape), rtol=1e-12)


def test_the_scale_is_asked_for() -> None:
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle_of(make(LLAMA)), NOT_STATED)
    assert caught.value.codes == ("LF211",)


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        ("mlp.experts.w", ((4, d.HIDDEN, RANK), (4, RANK, d.MLP))),
        ("attn.kv_einsum.w", ((d.HIDDEN, RANK), (RANK, 3, d.KV_HEADS, d.HEAD_DIM))),
    ],
)
def test_axes_that_are_of_no_one_weight_are_refused(module: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle_of(make({module: shapes})), StatedScale(alpha=6))  # type: ignore[dict-item]
    assert caught.value.codes == ("LF203",)
