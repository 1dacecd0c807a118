"""What onnxruntime-genai's model builder calls modules: one name for what families of models call by several."""

import re
from collections.abc import Collection, Iterator
from typing import Final

_NAMES: Final = (
    ("attn", "self_attn"),
    ("attn.o_proj", "self_attn.out_proj"),
    ("attn.o_proj", "self_attn.dense"),
    ("moe", "mlp"),
    ("moe", "feed_forward"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.up_proj", "feed_forward.w3"),
    ("mlp.down_proj", "feed_forward.w2"),
)
_BUILT: Final = tuple((re.compile(rf"(?<=\.){re.escape(built)}(?=\.|$)"), own) for built, own in _NAMES)

_HALVES: Final = {
    "audio_features": (
        (r"attn\.cross\.", "decoder", "encoder_attn."),
        (r"attn\.(?:Attention\.)?(?=[qkv]_proj$)", "encoder", "self_attn."),
        (r"attn\.o_proj$", "encoder", "self_attn.out_proj"),
        (r"mlp\.", "encoder", ""),
    ),
    "past_key_cross_0": (
        (r"cross_attn\.o_proj$", "decoder", "encoder_attn.out_proj"),
        (r"cross_attn\.", "decoder", "encoder_attn."),
        (r"attn\.o_proj$", "decoder", "self_attn.out_proj"),
        (r"attn\.", "decoder", "self_attn."),
        (r"mlp\.", "decoder", ""),
    ),
}
"""Whisper is built as two models, known by what they take in. Layers bear the same names in both; the keys and values
that the decoder makes of the encoder's states are computed by the encoder."""


def rename_built(module: str, inputs: Collection[str]) -> Iterator[str]:
    """Yield the names that models have for what the builder calls `module`.

    Args:
        module: module path.
        inputs: names of the graph's inputs.
    """
    half = next((rows for name, rows in _HALVES.items() if name in inputs), None)
    if half is None:
        yield from (built.sub(own, module) for built, own in _BUILT if built.search(module))
        return
    for expression, side, own in half:
        found = re.fullmatch(rf"model\.layers\.(\d+)\.{expression}(.*)", module)
        if found:
            yield f"model.{side}.layers.{found[1]}.{own}{found[2]}"
            return
