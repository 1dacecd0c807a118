"""Modules that libraries renamed between versions: one table, read in both directions.

The rows are transformers' own (`conversion_mapping.py` as of 5.23, and the move of the text model in 4.52), and where
checkpoints that hold a whole pipeline in one file keep its components (ComfyUI and the original repositories). A rename
is evidence of a name, never of a shape: it only gives names to look for.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Rename:
    """One rename, as an expression on whole names and what replaces it.

    Attributes:
        about: which of a library's changes it belongs to; a name goes through each once.
        expression: what it applies to.
        replacement: what is put there.
    """

    about: str
    expression: re.Pattern[str]
    replacement: str


def _start(about: str, old: str, new: str, *behind: str) -> list[Rename]:
    """Return the rename of a beginning in both directions, where one of some modules follows."""
    ahead = rf"(?=(?:{'|'.join(behind)})(?:\.|$))" if behind else r"(?=\.|$)"
    return [Rename(about, re.compile(rf"^{re.escape(a)}{ahead}"), b) for a, b in ((old, new), (new, old))]


def _inside(about: str, old: str, new: str) -> list[Rename]:
    return [Rename(about, re.compile(rf"(?<=\.){re.escape(a)}(?=\.)"), b) for a, b in ((old, new), (new, old))]


def _in_one_file(component: str, *places: str) -> list[Rename]:
    """Return where one file has a component of a pipeline; GPT-2's decoder `transformer` is none."""
    ahead = r"(?=\.)(?!\.(?:h\.\d|wte|wpe|ln_f))"
    return [Rename("one file", re.compile(rf"^{re.escape(component)}{ahead}"), place) for place in places]


def _of_open_clip(theirs: str, ours: str) -> list[Rename]:
    """Return where files of Stable Diffusion 2 and SDXL have a module of a text encoder, as open_clip names it."""
    path = rf"\.(?:text_model\.)?encoder\.layers\.(\d+)\.{re.escape(ours)}$"
    return [
        Rename("one file", re.compile(rf"^{component}{path}"), rf"{place}.model.transformer.resblocks.\1.{theirs}")
        for component, place in _OPEN_CLIP
    ]


def _of_experts(old: str, new: str) -> list[Rename]:
    return [Rename("experts", re.compile(rf"(\.experts\.\d+)\.{a}$"), rf"\1.{b}") for a, b in ((old, new), (new, old))]


DENOISER_IN_ONE_FILE: Final = "model.diffusion_model"
"""Where a checkpoint that holds a whole pipeline has its UNet or transformer."""
_OPEN_CLIP: Final = (
    ("text_encoder", "cond_stage_model"),
    ("text_encoder", "conditioner.embedders.0"),
    ("text_encoder_2", "conditioner.embedders.1"),
)
_ENCODER: Final = re.compile(r"^text_encoders\.[^.]+(?=\.transformer\.)")
_ANY_ENCODER: Final = "text_encoders.*"
"""A text encoder in one file, whatever ComfyUI calls its architecture."""
_BODY: Final = ("layers", "embed_tokens", "norm")

RENAMES: Final = (
    # Models that also see, before and since transformers 4.52; Qwen2-VL's text model stood alone in `model`.
    *_start("text", "language_model.model.", "model.language_model.", *_BODY),
    *_start("text", "model.", "model.language_model.", *_BODY),
    *_start("head", "language_model.lm_head", "lm_head"),
    # CLIP and its like lost a level in transformers 5.
    *_start("tower", "text_model.", "", "encoder", "embeddings", "final_layer_norm"),
    *_start("tower", "vision_model.", "", "encoder", "embeddings", "pre_layrnorm", "post_layernorm"),
    *_start("neox", "embed_out", "lm_head"),
    # Mixtral.
    *_inside("mixture", "block_sparse_moe", "mlp"),
    *_of_experts("w1", "gate_proj"),
    *_of_experts("w3", "up_proj"),
    *_of_experts("w2", "down_proj"),
    # A pipeline in one file: Stable Diffusion 1 and 2, SDXL, and ComfyUI's for all others.
    *(row for component in ("unet", "transformer") for row in _in_one_file(component, DENOISER_IN_ONE_FILE)),
    *_in_one_file(
        "text_encoder",
        "cond_stage_model.transformer",
        "conditioner.embedders.0.transformer",
        "text_encoders.clip_l.transformer",
        f"{_ANY_ENCODER}.transformer.model",  # A language model without a head: Anima's, Lumina 2's and others.
    ),
    Rename("one file", re.compile(r"^text_encoder(?=\.(?:layers\.\d|embed_tokens$))"), "model"),
    *_in_one_file("connectors", "text_embedding_projection"),  # LTX-2's.
    *_in_one_file("text_encoder_2", "text_encoders.clip_g.transformer", "text_encoders.t5xxl.transformer"),
    *_in_one_file("text_encoder_3", "text_encoders.t5xxl.transformer"),
    *(row for name in ("q_proj", "k_proj", "v_proj") for row in _of_open_clip(f"attn.{name}", f"self_attn.{name}")),
    *_of_open_clip("attn.out_proj", "self_attn.out_proj"),
    *_of_open_clip("mlp.c_fc", "mlp.fc1"),
    *_of_open_clip("mlp.c_proj", "mlp.fc2"),
    *_of_open_clip("ln_1", "layer_norm1"),
    *_of_open_clip("ln_2", "layer_norm2"),
)


def generalise(name: str) -> str:
    """Return a module's name with `*` for what `list_names` leaves open; the name itself where that is nothing."""
    return _ENCODER.sub(_ANY_ENCODER, name)


def list_names(name: str) -> Iterator[str]:
    """Yield the other names that a module has had, the nearest first; not its own; some as `generalise` has them."""
    seen = {name}
    fresh: list[tuple[str, frozenset[str]]] = [(name, frozenset())]
    while fresh:
        found = [
            (rename.expression.sub(rename.replacement, each, count=1), through | {rename.about})
            for each, through in fresh
            for rename in RENAMES
            if rename.about not in through and rename.expression.search(each)
        ]
        fresh = [pair for pair in found if pair[0] and pair[0] not in seen]
        seen.update(other for other, _ in fresh)
        yield from dict.fromkeys(other for other, _ in fresh)
