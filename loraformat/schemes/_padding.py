"""LoRAs whose weight has more inputs than the base's: readers fill the base's up with zeros.

ComfyUI does it where `reshape_weight` beside the factors says so, and for BFL's control adapters of FLUX.1, known by
their norms; diffusers for the first layer of FLUX.1 in every file. Source: comfyanonymous/ComfyUI,
comfy/lora_convert.py and comfy/weight_adapter/lora.py; huggingface/diffusers 0.42, loaders/lora_pipeline.py.
"""

from dataclasses import replace
from typing import Final

import numpy as np

from loraformat.adapter import Adapter, Target
from loraformat.derived import NewFactor
from loraformat.problems import Problem
from loraformat.schemes._memory import find_memory
from loraformat.schemes._naming import find_denoiser

PADDED: Final = "padded_lora"
"""The kind of such a LoRA."""
SHAPE: Final = "reshape_weight"
"""The role of a tensor that states the shape, `(out, in)`."""
SHAPES: Final = "shapes"
"""The part of a provenance that says whether shapes were stated."""
_CHANNELS: Final = 64
"""Of FLUX.1's latents, four pixels together. More inputs are of a control image, or of a mask, beside them."""
_FIRST: Final = frozenset({"transformer.img_in", "transformer.x_embedder"})
_TABLE: Final = "flux1-transformer"


def pad_first_layer(adapter: Adapter) -> Adapter:
    """Return an adapter of FLUX.1 whose first layer, where it has more inputs, is one that bases are filled up for."""
    targets = (replace(target, kind=PADDED) if _is_wider(target) else target for target in adapter.targets)
    return replace(adapter, targets=tuple(targets))


def is_of_flux1(adapter: Adapter) -> bool:
    """Say whether an adapter's first layer has more inputs than FLUX.1's, and its names are of no other model."""
    names = (target.name for target in adapter.targets)
    return any(map(_is_wider, adapter.targets)) and [table.name for table in find_denoiser(names)] == [_TABLE]


def _is_wider(target: Target) -> bool:
    shape = target.factors["lora_A.weight"].shape if target.kind == "lora" else ()
    return target.name in _FIRST and "base_layer.weight" not in target.factors and shape[1:] > (_CHANNELS,)


def take_shapes(adapter: Adapter, scheme: str) -> Adapter:
    """Return an adapter without the shapes that are stated beside factors; LF203 where one is not the factors'.

    That they were is remembered for the scheme.
    """
    stated = [target for target in adapter.targets if target.kind == PADDED and SHAPE in target.factors]
    if not stated:
        return adapter
    problems = [problem for target in stated for problem in _check_shape(target)]
    targets = (_without_shape(target) if target in stated else target for target in adapter.targets)
    absorbed = (target.factors[SHAPE] for target in stated)
    memory = {**find_memory(adapter.provenance, scheme), SHAPES: True}
    return replace(
        adapter,
        targets=tuple(targets),
        provenance={**adapter.provenance, scheme: memory},
        problems=(*adapter.problems, *problems),
        absorbed=(*adapter.absorbed, *absorbed),
    )


def state_shapes(adapter: Adapter) -> Adapter:
    """Return an adapter whose padded targets state their shapes."""
    return replace(adapter, targets=tuple(map(_with_shape, adapter.targets)))


def _check_shape(target: Target) -> list[Problem]:
    tensor, shape = target.factors[SHAPE], _shape_of(target)
    whole = tensor.dtype.family in ("int", "uint") and tensor.elements == len(shape)
    stated = tuple(map(int, tensor.read().reshape(-1))) if whole else f"{tensor.dtype.name} of {tensor.shape}"
    return [] if stated == shape else [Problem("LF203", f"{target.name}.{SHAPE}", f"{stated}", f"{shape}")]


def _without_shape(target: Target) -> Target:
    return replace(target, factors={role: each for role, each in target.factors.items() if role != SHAPE})


def _with_shape(target: Target) -> Target:
    if target.kind != PADDED:
        return target
    shape = NewFactor(f"{target.name}.{SHAPE}", np.array(_shape_of(target), np.int64))
    return replace(target, factors={**target.factors, SHAPE: shape})


def _shape_of(target: Target) -> tuple[int, ...]:
    """Return `(out, in)` of factors that are there; without them, which is said elsewhere, nothing."""
    down, up = target.factors.get("lora_A.weight"), target.factors.get("lora_B.weight")
    return (*up.shape[:1], *down.shape[1:]) if down is not None and up is not None else ()
