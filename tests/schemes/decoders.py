"""Tensors of adapters of language models, under any scheme's names. Sizes are small, and no matrix is square."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from builders import MemoryFactor
from loraformat.adapter import Factor
from loraformat.base_facts import BaseFacts

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, VOCABULARY = 4, 2, 6, 10, 14, 9
COUNTS = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "hidden": HIDDEN}
LLAMA = BaseFacts("config.json", counts=COUNTS, architecture="llama")
QWEN = BaseFacts("config.json", counts=COUNTS, architecture="qwen2")
QWEN_MOE = BaseFacts("config.json", counts=COUNTS, architecture="qwen3_moe")
MIXTRAL = BaseFacts("config.json", counts=COUNTS, architecture="mixtral")
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

Modules = Mapping[str, tuple[int, int]]
"""Module to `(out, in)`."""

SHAPES: Modules = {
    "q": (Q, HIDDEN),
    "k": (KV, HIDDEN),
    "v": (KV, HIDDEN),
    "o": (HIDDEN, Q),
    "gate": (MLP, HIDDEN),
    "up": (MLP, HIDDEN),
    "down": (HIDDEN, MLP),
}


def blocks(names: Mapping[str, str], layers: tuple[int, ...] = (0, 11)) -> Modules:
    """Return modules of several blocks; `{i}` in a name is the number of its block."""
    return {name.format(i=layer): SHAPES[role] for layer in layers for role, name in names.items()}


TRANSFORMERS = {
    **{letter: f"model.layers.{{i}}.self_attn.{letter}_proj" for letter in "qkvo"},
    **{role: f"model.layers.{{i}}.mlp.{role}_proj" for role in ("gate", "up", "down")},
}


def factors(
    modules: Modules,
    down: str,
    up: str,
    *,
    rank: int = 3,
    dtype: Any = np.float32,
    transposed: bool = False,
    embedding: str = "",
) -> dict[str, Factor]:
    """Return LoRA factors of modules, whose names end with `down` and `up`.

    Args:
        modules: module to `(out, in)`.
        down: ending of A `(rank, in)`.
        up: ending of B `(out, rank)`.
        rank: of all.
        dtype: of all.
        transposed: store `(in, rank)` and `(rank, out)`.
        embedding: name of a table `(vocabulary, hidden)` that has factors `(vocabulary, rank)` and `(rank, hidden)`.
    """
    dice = np.random.default_rng(len(modules))
    arrays: dict[str, Any] = {}
    for name, (out, inner) in modules.items():
        a, b = dice.standard_normal((rank, inner)), dice.standard_normal((out, rank))
        arrays[f"{name}{down}"] = np.ascontiguousarray(a.T if transposed else a).astype(dtype)
        arrays[f"{name}{up}"] = np.ascontiguousarray(b.T if transposed else b).astype(dtype)
    if embedding:
        arrays[f"{embedding}{down}"] = dice.standard_normal((VOCABULARY, rank)).astype(dtype)
        arrays[f"{embedding}{up}"] = dice.standard_normal((rank, HIDDEN)).astype(dtype)
    return tensors(arrays)


def tensors(arrays: Mapping[str, Any]) -> dict[str, Factor]:
    """Return factors in memory."""
    return {name: MemoryFactor(name, np.asarray(array)) for name, array in arrays.items()}


EXPERTS = 3


def stacks(modules: Modules, down: str, up: str, *, rank: int = 3, dtype: Any = np.float32) -> dict[str, Factor]:
    """Return factors of all experts in one: A `(experts, rank, in)` and B `(experts, out, rank)`."""
    dice = np.random.default_rng(len(modules) + 1)
    arrays: dict[str, Any] = {}
    for name, (out, inner) in modules.items():
        arrays[f"{name}{down}"] = dice.standard_normal((EXPERTS, rank, inner)).astype(dtype)
        arrays[f"{name}{up}"] = dice.standard_normal((EXPERTS, out, rank)).astype(dtype)
    return tensors(arrays)
