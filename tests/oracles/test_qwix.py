"""qwix itself adapts modules that compute as Tunix's do: what it adds to their outputs is the change that we read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat

jax = pytest.importorskip("jax", reason="needs jax")
nnx = pytest.importorskip("flax.nnx", reason="needs flax")
qwix = pytest.importorskip("qwix", reason="needs qwix")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # qwix calls what flax is about to remove.
]

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, RANK, ALPHA = 12, 4, 2, 6, 10, 3, 12.0
EINSUMS = {
    "q_einsum": ("BTD,NDH->BTNH", (HEADS, HIDDEN, HEAD_DIM)),
    "kv_einsum": ("BSD,CKDH->CBSKH", (2, KV_HEADS, HIDDEN, HEAD_DIM)),
    "q_proj": ("BTD,DNH->BTNH", (HIDDEN, HEADS, HEAD_DIM)),
    "attn_vec_einsum": ("BTNH,NHD->BTD", (HEADS, HEAD_DIM, HIDDEN)),
}
"""As models/gemma3 and models/llama3 of Tunix 0.1 have them."""
INPUTS = {"attn_vec_einsum": (HEADS, HEAD_DIM)}
READ_AS = {
    "q_einsum": ["q_proj"],
    "kv_einsum": ["k_proj", "v_proj"],
    "q_proj": ["q_proj"],
    "attn_vec_einsum": ["o_proj"],
}


def build(name: str) -> Any:
    class Einsum(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.w = nnx.Param(jax.numpy.zeros(EINSUMS[name][1]))

        def __call__(self, x: Any) -> Any:
            return jax.numpy.einsum(EINSUMS[name][0], x, self.w[...])

    class Block(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.attn = nnx.Module()
            setattr(self.attn, name, Einsum())
            self.mlp = nnx.Module()
            self.mlp.gate_proj = nnx.Linear(HIDDEN, MLP, use_bias=False, rngs=nnx.Rngs(0))
            self.mlp.gate_proj.kernel[...] = jax.numpy.zeros((HIDDEN, MLP))

    class Model(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.layers = nnx.List([Block()])

        def __call__(self, x: Any, y: Any) -> Any:
            (block,) = self.layers
            return getattr(block.attn, name)(x), block.mlp.gate_proj(y)

    return Model()


@pytest.mark.parametrize("name", EINSUMS)
def test_what_qwix_adds_is_what_we_read(name: str, tmp_path: Path) -> None:
    features = INPUTS.get(name, (HIDDEN,))
    dice = np.random.default_rng(0)
    x = dice.standard_normal((1, 40, *features)).astype(np.float32)
    y = dice.standard_normal((1, 40, HIDDEN)).astype(np.float32)
    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(build(name), provider, x, y, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda leaf: dice.standard_normal(leaf.shape).astype(np.float32), state))
    added, added_to_gate = (np.asarray(each, np.float64) for each in model(x, y))
    pairs = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    arrays = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in pairs}
    np.savez(tmp_path / "lora.npz", **arrays)
    adapter = loraformat.load(tmp_path / "lora.npz", alpha=ALPHA)
    assert adapter.scheme == "qwix"
    changes = {each.name: change_of(each) for each in adapter.targets}
    names = [f"model.layers.0.self_attn.{read}" for read in READ_AS[name]]
    assert set(changes) == {*names, "model.layers.0.mlp.gate_proj"}
    parts = added.reshape(len(names), 40, -1)
    for part, read in zip(parts, names, strict=True):
        np.testing.assert_allclose(x.reshape(40, -1) @ changes[read].T, part, rtol=1e-4, atol=1e-4)
    gate = changes["model.layers.0.mlp.gate_proj"]
    np.testing.assert_allclose(y[0] @ gate.T, added_to_gate[0], rtol=1e-4, atol=1e-4)


def change_of(target: Any) -> Any:
    down, up = (target.factors[f"lora_{letter}.weight"].read().astype(np.float64) for letter in "AB")
    return target.scale * up @ down
