"""PEFT folders and the one file that each becomes, byte for byte.

What stands in `expected` is read off the configuration by hand, as PEFT 0.21 computes it.
"""

from collections.abc import Mapping
from typing import Any

from make.kit import Dice, Files, Tensor, lora, manifest_of, pack, roles_of, sha256, shape_factors, store

Shapes = Mapping[str, tuple[str, tuple[int, ...], int]]
"""Target to its slot, canonical shape and rank."""

LINEAR = {"model.layers.0.self_attn.q_proj": ("linear", (4, 6), 2), "model.layers.0.mlp.up_proj": ("linear", (5, 4), 2)}
DTYPES = ("F32", "F16", "BF16")


def vector(
    seed: int,
    shapes: Shapes,
    config: Mapping[str, Any],
    scaling: Mapping[str, tuple[str, float]],
    keys: Mapping[str, str] | None = None,
    requirements: str = "",
) -> Files:
    """Return a vector.

    Args:
        seed: of the numbers.
        shapes: the targets.
        config: fields of `adapter_config.json` beside the usual ones.
        scaling: target to the rule and its number.
        keys: what stands before and after a target's role in the keys of PEFT, where it is not the usual.
        requirements: besides those of every vector.
    """
    fields = {"peft_type": "LORA", "base_model_name_or_path": "a/base", "revision": None, "bias": "none", **config}
    dice = Dice(seed)
    tensors: dict[str, Tensor] = {}
    targets = {}
    for index, (name, (slot, shape, rank)) in enumerate(shapes.items()):
        tensors |= shape_factors(dice, name, slot, shape, rank, DTYPES[index % len(DTYPES)])
        targets[name] = lora(slot, rank, *scaling[name])
    manifest = manifest_of(targets, base={"name": "a/base"}, provenance={"peft": fields})
    native = pack(manifest, tensors)
    prefixes = {f"{name}.{role}": f"base_model.model.{name}.{role}" for name in shapes for role in _roles(shapes[name])}
    theirs = {(prefixes | dict(keys or {}))[key]: item for key, item in tensors.items()}
    expected = {
        "requirements": f"R-020 R-070 R-071 R-072 {requirements}".split(),
        "verdict": "converted",
        "source": "peft",
        "sha256": sha256(native),
    }
    return {
        "peft/adapter_config.json": fields,
        "peft/adapter_model.safetensors": store(theirs, {"format": "pt"}),
        "native.safetensors": native,
        "expected.json": expected,
    }


def _roles(target: tuple[str, tuple[int, ...], int]) -> tuple[str, str]:
    return roles_of(target[0])


def _same(shapes: Shapes, rule: str, number: float) -> dict[str, tuple[str, float]]:
    return dict.fromkeys(shapes, (rule, number))


def _patterns() -> Files:
    """Ranks and alphas by pattern; PEFT takes the first pattern that is a target's end or fits as an expression."""
    shapes = {
        "layers.0.q_proj": ("linear", (4, 4), 4),
        "layers.0.v_proj": ("linear", (4, 4), 2),
        "layers.1.q_proj": ("linear", (4, 4), 1),
        "layers.1.v_proj": ("linear", (4, 4), 2),
    }
    config = {
        "r": 2,
        "lora_alpha": 8,
        "rank_pattern": {"layers.1.q_proj": 1, "q_proj": 4},
        "alpha_pattern": {r"layers\.\d+\.v_proj": 3},
        "peft_version": "0.21.2",  # Before 0.15 this alpha was that of no target.
    }
    alphas = {"layers.0.q_proj": 8, "layers.0.v_proj": 3, "layers.1.q_proj": 8, "layers.1.v_proj": 3}
    scaling = {name: ("alpha/rank", alpha) for name, alpha in alphas.items()}
    return vector(302, shapes, config, scaling, requirements="R-050")


def _shapes() -> Files:
    shapes = {
        "conv1": ("conv", (3, 2, 3), 2),
        "down.conv": ("conv", (3, 2, 3, 3), 2),
        "tokens": ("embedding", (3, 9), 2),
        "head": ("linear", (4, 3), 2),
    }
    return vector(303, shapes, {"r": 2, "lora_alpha": 4}, _same(shapes, "alpha/rank", 4), requirements="R-022 R-041")


def _prefixes() -> Files:
    """Wrappers of training frameworks and the adapter's own name in the keys."""
    keys = {}
    for name, wrapped in {
        "model.layers.0.self_attn.q_proj": "module.base_model.model.model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj": "module.base_model.model.model.layers.0._orig_mod.mlp.up_proj",
    }.items():
        keys |= {f"{name}.{role}.weight": f"{wrapped}.{role}.default.weight" for role in ("lora_A", "lora_B")}
    return vector(305, LINEAR, {"r": 2, "lora_alpha": 4}, _same(LINEAR, "alpha/rank", 4), keys)


VECTORS: Mapping[str, Files] = {
    "alpha-over-rank": vector(300, LINEAR, {"r": 2, "lora_alpha": 32}, _same(LINEAR, "alpha/rank", 32)),
    "rslora": vector(
        301,
        LINEAR,
        {"r": 2, "lora_alpha": 32, "use_rslora": True},
        _same(LINEAR, "alpha/sqrt(rank)", 32),
        requirements="R-050",
    ),
    "patterns": _patterns(),
    "conv-and-embedding": _shapes(),
    "conv1d-of-transformers": vector(
        304,
        {"h.0.attn.c_attn": ("linear-transposed", (6, 2), 2)},
        {"r": 2, "lora_alpha": 0.5, "fan_in_fan_out": True},
        {"h.0.attn.c_attn": ("alpha/rank", 0.5)},
        requirements="R-030",
    ),
    "wrapped-names": _prefixes(),
}
