"""The dotted native scheme of ComfyUI, ai-toolkit, diffusion-pipe and OneTrainer: the original repository's own names.

`diffusion_model.<path>.lora_A.weight`, or the path alone; text encoders behind `text_encoders.<name>.transformer`.
Every payload of LyCORIS may stand there too. A module without `alpha` acts with scale 1. diffusion-pipe writes it as a
folder with PEFT's configuration beside it: the keys decide. Source: comfyanonymous/ComfyUI, comfy/lora.py.
"""

import re
from typing import Final

from loraformat.adapter import Adapter, SlotKind
from loraformat.base_facts import BaseFacts
from loraformat.manifest import MANIFEST_KEY
from loraformat.schemes import LORA_SLOTS, PIPELINES, Bundle, Holds, StatedScale, WrittenBundle
from loraformat.schemes._by_heads import interleave_heads, stack_heads
from loraformat.schemes._header_scales import ADAPTER_METADATA
from loraformat.schemes._known_names import find_model
from loraformat.schemes._lycoris import LYCORIS_KINDS, LYCORIS_ROWS, QUERY_NORM, LycorisScheme
from loraformat.schemes._marks import BARE, BARE_TENSOR, BUNDLED_KEYS, NOISE, Alias, Marks
from loraformat.schemes._naming import ComponentNaming
from loraformat.schemes._padding import pad_first_layer
from loraformat.schemes._scales import AlphaTensors, fold_rankless
from loraformat.schemes._table import NameTable, Row

_COMPONENTS: Final = ("transformer", "transformer_2", "unet", "text_encoder", "text_encoder_2", "text_encoder_3")
_PREFIXES: Final = {
    "diffusion_model": "diffusion_model",
    "diffusion_model.llm_adapter": "text_conditioner",
    "conditional_transformer": "transformer",
    "text_embedding_projection": "connectors",
    "pipe.dit": "transformer",
    "text_encoders.clip_l.transformer": "text_encoder",
    "text_encoders.clip_g.transformer": "text_encoder_2",
    "text_encoders.t5xxl.transformer": "text_encoder_3",
    "": "",
    **{name: name for name in _COMPONENTS},
}
_PAYLOAD: Final = (
    r".*\.(?:hada_\w+|lokr_\w+|oft_blocks|oft_R\.\w+|rescale|diff|diff_b|w_norm|b_norm|(?:a1|a2|b1|b2)\.weight)$"
)
_TENSOR: Final = r".*\.(?:lora[_.]|hada_|lokr_|diff|oft_|w_norm|b_norm|dora_scale|a1\.|set_weight|on_input$|rescale$)"
_DECOMPOSED: Final = re.compile(
    rf"(?:{'|'.join(_COMPONENTS)})\..*\.(?:lora_[AB]\.weight|lora\.(?:down|up)\.weight|alpha|dora_scale)$"
)
_CONTROL: Final = (f"{QUERY_NORM}.scale", f"{QUERY_NORM}.scale.set_weight")
_BARE: Final = re.compile(rf"{BARE}{BARE_TENSOR}")
_NATIVE: Final = (
    r"(?:double_blocks|single_blocks|joint_blocks|input_blocks|middle_block|output_blocks|final_layer)(?=\.)"
)


class _Dotted(LycorisScheme):
    def detect(self, bundle: Bundle) -> str | None:
        """Recognise the prefixes, or names alone that a table has of a pipeline's model.

        So are diffusers' names with `dora_scale`, which diffusers leaves out: OneTrainer's, with one for each input.
        """
        marked = self.marks.find(bundle)
        magnitude = next((key for key in bundle.tensors if key.endswith(".dora_scale")), None)
        if magnitude and not marked and all(map(_DECOMPOSED.match, bundle.tensors)):
            return f"names as diffusers has them, and magnitudes such as {magnitude}, which it does not read"
        others = {MANIFEST_KEY, ADAPTER_METADATA} & set(bundle.metadata)
        if marked or others or any(map(_BARE.match, bundle.tensors)):
            return marked
        known = find_model(bundle)
        return str(known) if known else None

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter, rows of fused q, k and v as other files have them."""
        adapter = super().read(bundle, stated)
        adapter = pad_first_layer(adapter) if any(key.endswith(_CONTROL) for key in bundle.tensors) else adapter
        return stack_heads(adapter, bundle.tensors)

    def write(self, adapter: Adapter, facts: BaseFacts) -> WrittenBundle:
        """Return the tensors; rows of fused q, k and v stand by heads where the names say so."""
        written = super().write(adapter, facts)
        turned = interleave_heads(adapter, written.tensors)
        return written if turned is adapter else super().write(turned, facts)


SCHEME: Final = _Dotted(
    name="dotted",
    title="dotted native names: ComfyUI, ai-toolkit, diffusion-pipe, OneTrainer",
    rows=NameTable(
        [
            Row("lora_A.weight", "lora", "lora_A.weight"),
            Row("lora_B.weight", "lora", "lora_B.weight"),
            Row("lora_A.{adapter}.weight", "lora", "lora_A.weight"),
            Row("lora_B.{adapter}.weight", "lora", "lora_B.weight"),
            Row("lora_down.weight", "lora", "lora_A.weight"),
            Row("lora_up.weight", "lora", "lora_B.weight"),
            Row("lora.down.weight", "lora", "lora_A.weight"),
            Row("lora.up.weight", "lora", "lora_B.weight"),
            Row("lora_B.bias", "lora", "lora_B.bias"),
            Row("scale", "replace", "scale"),
            *LYCORIS_ROWS,
            Row("magnitude", "dora", "lora_magnitude_vector"),
            Row("lora_magnitude_vector", "dora", "lora_magnitude_vector"),
            Row("lora_magnitude_vector.weight", "dora", "lora_magnitude_vector"),
            Row("lora_magnitude_vector.{adapter}.weight", "dora", "lora_magnitude_vector"),
        ]
    ),
    naming=ComponentNaming("dotted", _PREFIXES),
    scale=AlphaTensors(),
    marks=Marks(
        keys=(
            rf"(?:diffusion_model|conditional_transformer|text_embedding_projection|pipe\.dit|text_encoders\.\w+)\.{_TENSOR}",
            rf"{_NATIVE}{_TENSOR}",
            rf"(?:transformer(?:_2)?\.(?!(?:double|single)_blocks\.)|unet\.|text_encoder(?:_2)?\.){_PAYLOAD}",
        ),
        neutral=(r".+\.alpha$", BUNDLED_KEYS, r".+_norm\.scale$", r"(?:diffusion_model|text_encoders)\..+\.weight$"),
        others=(r".*\.processor\.(?:qkv|proj)_lora", r"base_model\.model\.", r"lora_(?:unet|te)"),
    ),
    holds=Holds(kinds=LYCORIS_KINDS, slots=LORA_SLOTS | {SlotKind.PARAMETER}, models=PIPELINES),
    names="dotted",
    fits=(fold_rankless,),
    aliases=(
        *NOISE,
        Alias(r"^(.*)\.lora_([AB])$", r"\1.lora_\2.weight"),
        Alias(r"^(.*\.(?:query|key)_norm\.scale)\.set_weight$", r"\1"),  # BFL's, as ComfyUI has them.
        Alias(r"^(.*)\.diff_m$", r"\1.modulation.diff"),  # LightX2V's, of Wan's modulations.
    ),
)
