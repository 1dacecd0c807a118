"""GGUF models as bases; `tests/oracles/test_gguf_models.py` has transformers load them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from graphs import Array, dyadic, dyadic_factors, product, write_peft
from loraformat.bases import BASES
from loraformat.bases.gguf_model import BASE
from loraformat.containers.gguf import CONTAINER, write_gguf
from loraformat.dtypes import BY_GGML, BY_NAME
from loraformat.errors import LoraformatError

HEADS, KV_HEADS, WIDTH = 4, 2, 64
FACTS = {
    "general.architecture": "llama",
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
}
Q8_0 = BY_GGML[8]


def write(path: Path, arrays: Mapping[str, Array], facts: Mapping[str, Any] = FACTS) -> Path:
    tensors: list[Any] = [(name, BY_NAME[each.dtype.name], each.shape, each) for name, each in arrays.items()]
    with path.open("wb") as sink:
        write_gguf(sink, tensors, facts)
    return path


def read(path: Path) -> dict[str, Array]:
    return {name: tensor.read() for name, tensor in CONTAINER.open(path).tensors.items()}


def interleave(rows: Array, heads: int) -> Array:
    """Return rows as llama.cpp has them: of each head, number i of the first half before number i of the second."""
    half = len(rows) // heads // 2
    return np.concatenate(
        [rows[[h * 2 * half + i, h * 2 * half + half + i]] for h in range(heads) for i in range(half)]
    )


def merge(folder: Path, base: Path, modules: Mapping[str, int], **options: Any) -> tuple[dict[str, Array], Path]:
    """Return the deltas `(out, in)` of an adapter of modules with so many rows, and the merged model."""
    rng = np.random.default_rng(4)
    factors = {module: dyadic_factors(rng, out, WIDTH, 2) for module, out in modules.items()}
    adapter = write_peft(folder / "adapter", factors, alpha=2.0)
    loraformat.merge(base, [adapter], folder / "merged.gguf", **options)
    assert loraformat.verify(folder / "merged.gguf", base, [adapter]).holds
    return {module: product(pair) for module, pair in factors.items()}, folder / "merged.gguf"


def test_the_room_has_it_and_it_knows_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"output.weight": np.ones((3, 2), np.float32)})
    assert BASES.find("gguf_model") is BASE
    assert BASE.accepts(path, path.read_bytes()[:64], path.stat().st_size)
    lora = write(tmp_path / "a.gguf", {"output.weight.lora_a": np.ones((3, 2), np.float32)})
    assert not BASE.accepts(lora, lora.read_bytes()[:64], lora.stat().st_size)
    with pytest.raises(LoraformatError, match="LF111"):
        loraformat.merge(lora, [lora], tmp_path / "out.gguf")


def test_names_and_rows_are_those_of_transformers(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sizes = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "ffn_up": 48}
    arrays = {f"blk.0.{n}.weight": rng.standard_normal((rows, WIDTH)).astype(np.float16) for n, rows in sizes.items()}
    arrays["blk.0.attn_norm.weight"] = np.ones(WIDTH, np.float32)
    base = write(tmp_path / "base.gguf", arrays)
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    modules = {f"model.layers.0.{name}": sizes[own] for own, name in names.items()}
    deltas, merged = merge(tmp_path, base, modules)
    found, heads = read(merged), {"attn_q": HEADS, "attn_k": KV_HEADS}
    for own, name in names.items():
        delta = deltas[f"model.layers.0.{name}"]
        delta = interleave(delta, heads[own]) if own in heads else delta
        before = arrays[f"blk.0.{own}.weight"]
        wanted = (before.astype(np.float32) + delta.astype(np.float32)).astype(np.float16)
        np.testing.assert_array_equal(found[f"blk.0.{own}.weight"], wanted)
    assert found["blk.0.ffn_up.weight"].tobytes() == arrays["blk.0.ffn_up.weight"].tobytes()
    assert merged.stat().st_size == base.stat().st_size
    assert (tmp_path / "merged.gguf.merge_receipt.json").is_file()


def test_one_expert_of_a_stack(tmp_path: Path) -> None:
    stack = np.random.default_rng(2).standard_normal((3, 48, WIDTH)).astype(np.float32)
    base = write(tmp_path / "base.gguf", {"blk.0.ffn_up_exps.weight": stack})
    name = "model.layers.0.block_sparse_moe.experts.1.w3"
    deltas, merged = merge(tmp_path, base, {name: 48})
    found = read(merged)["blk.0.ffn_up_exps.weight"]
    np.testing.assert_array_equal(found[1], stack[1] + deltas[name].astype(np.float32))
    np.testing.assert_array_equal(found[[0, 2]], stack[[0, 2]])


def test_blocks_of_8_bits_are_encoded_again_and_others_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    blocks = np.zeros((48, WIDTH // 32), np.dtype([("scale", "<f2"), ("codes", "i1", 32)]))
    blocks["scale"], blocks["codes"] = 0.5, rng.integers(-127, 128, blocks["codes"].shape)
    tensors: list[Any] = [
        ("blk.0.ffn_up.weight", Q8_0, (48, WIDTH), blocks.tobytes),
        ("blk.1.ffn_up.weight", BY_GGML[16], (1, 256), lambda: bytes(66)),
    ]
    base = tmp_path / "base.gguf"
    with base.open("wb") as sink:
        write_gguf(sink, tensors, FACTS)
    module = "model.layers.0.mlp.up_proj"
    deltas, merged = merge(tmp_path, base, {module: 48})
    stored = CONTAINER.open(merged).tensors["blk.0.ffn_up.weight"].read_bytes().view(blocks.dtype).reshape(blocks.shape)
    values = (stored["codes"] * stored["scale"].astype(np.float32)[..., None]).reshape(48, WIDTH)
    wanted = (blocks["codes"] * np.float32(0.5)).reshape(48, WIDTH) + deltas[module]
    assert np.abs(values - wanted).max() <= np.abs(wanted).max() / 127 * 0.58  # Half a step, and float16 of the scale.
    with pytest.raises(LoraformatError, match="iq2_xxs"):
        merge(tmp_path / "b", base, {"model.layers.1.mlp.up_proj": 48})


@pytest.mark.parametrize("alignment", [32, 128])
def test_blocks_become_floats_and_the_rest_stays(tmp_path: Path, alignment: int) -> None:
    """What stands behind them moves, each tensor to a multiple of the alignment."""
    rng = np.random.default_rng(3)
    blocks = np.zeros((7, WIDTH // 32), np.dtype([("scale", "<f2"), ("codes", "u1", 16)]))
    blocks["scale"], blocks["codes"] = 0.5, rng.integers(0, 256, blocks["codes"].shape)
    last = dyadic(rng, 7, WIDTH).astype(np.float16)
    tensors: list[Any] = [
        ("blk.0.ffn_gate.weight", BY_GGML[2], (7, WIDTH), blocks.tobytes),
        ("blk.0.ffn_up.weight", BY_GGML[2], (7, WIDTH), blocks.tobytes),
        ("blk.0.ffn_norm.weight", BY_NAME["float32"], (3,), lambda: np.arange(3, dtype=np.float32).tobytes()),
        ("blk.1.ffn_up.weight", BY_NAME["float16"], (7, WIDTH), last.tobytes),
    ]
    with (base := tmp_path / "base.gguf").open("wb") as sink:
        write_gguf(sink, tensors, FACTS | {"general.alignment": alignment})
    modules = {"model.layers.0.mlp.up_proj": 7, "model.layers.1.mlp.up_proj": 7}
    deltas, merged = merge(tmp_path, base, modules, on_quantized="dequantize")
    found = CONTAINER.open(merged)
    assert found.metadata == CONTAINER.open(base).metadata
    codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=2).astype(np.float32)
    up, other = (found.tensors[f"blk.{layer}.ffn_up.weight"].read() for layer in (0, 1))
    wanted = ((codes - 8) * 0.5).reshape(7, WIDTH) + deltas["model.layers.0.mlp.up_proj"]
    np.testing.assert_array_equal(up, wanted.astype(np.float16))
    np.testing.assert_array_equal(other, (last + deltas["model.layers.1.mlp.up_proj"]).astype(np.float16))
    assert found.tensors["blk.0.ffn_gate.weight"].read_bytes().tobytes() == blocks.tobytes()
    np.testing.assert_array_equal(found.tensors["blk.0.ffn_norm.weight"].read(), np.arange(3))


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path: Path) -> None:
    arrays = {"blk.0.attn_q.weight": np.ones((62, WIDTH), np.float32)}
    base = write(tmp_path / "base.gguf", arrays)
    with pytest.raises(LoraformatError, match="LF403"):
        merge(tmp_path, base, {"model.layers.0.self_attn.q_proj": 62})
