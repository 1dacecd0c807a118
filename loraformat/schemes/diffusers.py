"""diffusers' `pytorch_lora_weights.safetensors`: `<component>.<path>.lora_A.weight`, and its older generations.

Scale: in the annotation `lora_adapter_metadata` (fields of LoraConfig for each component), or in tensors `.alpha`, or
nowhere, in which case every reader takes 1. Source: huggingface/diffusers 0.42, loaders/lora_base.py and
utils/peft_utils.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraformat.adapter import Adapter, SlotKind, Target
from loraformat.manifest import MANIFEST_KEY
from loraformat.problems import Problem
from loraformat.schemes import PIPELINES, Bundle, Holds, StatedScale
from loraformat.schemes._beside import ALPHA, Module
from loraformat.schemes._engine import TableScheme
from loraformat.schemes._groups import TOKEN
from loraformat.schemes._header_scales import ADAPTER_METADATA, read_adapter_metadata
from loraformat.schemes._known_names import find_model
from loraformat.schemes._lora_config import describe_lora
from loraformat.schemes._lycoris import LYCORIS_ROWS
from loraformat.schemes._marks import BARE, BARE_TENSOR, NOISE, Alias, Marks
from loraformat.schemes._memory import find_texts
from loraformat.schemes._naming import COMPONENTS, ComponentNaming, split_component
from loraformat.schemes._padding import PADDED, is_of_flux1, pad_first_layer
from loraformat.schemes._peft.writing import find_uneven, says_the_same
from loraformat.schemes._scales import AlphaTensors, ScalesRead, ScalesWritten
from loraformat.schemes._table import NameTable, Row
from loraformat.strict_json import JsonValue, write_canonical

_WHOLE: Final = r"(?:unet|prior|connectors|text_encoder(?:_[23])?)\."
_TRANSFORMER: Final = (
    r"transformer(?:_2)?\.(?:base_model\.model\.)?"
    r"(?:(?:\w+_)?transformer_blocks|(?:(?:double|single)_stream_|refiner_|vace_)?blocks|layers|\w+_refiner|all_\w+"
    r"|proj_(?:in|out)|norm_out|img_in|txt_in|adaln_single|caption_projection|time_text_embed|condition_embedder"
    r"|(?:x|context|patch|pos|time|token)_?\w*embed\w*)(?=\.)"
)
_ALONE: Final = re.compile(
    r"(?!base_model\.|diffusion_model\.|conditional_transformer\.|text_encoders\.|lora_|lycoris_)"
    r".*\.lora_(?:[AB](?:\.[^.]+)?\.(?:weight|bias)|magnitude_vector(?:\.weight)?)$"
)
_OF_TRANSFORMER: Final = re.compile(
    r"transformer\..*\.(?:lora_[AB]\.(?:[^.]+\.)?(?:weight|bias)|lora\.(?:down|up)\.weight|alpha)$"
)


@dataclass(frozen=True, slots=True)
class _AdapterMetadata:
    """LoraConfig's fields in the file's annotations, else tensors beside the modules."""

    tensors: AlphaTensors

    def read(self, modules: Sequence[Module], bundle: Bundle, stated: StatedScale) -> ScalesRead:
        """Return the scalings that the annotation states, and else those of the alphas."""
        configs = read_adapter_metadata(bundle)
        ruled = [
            module
            for module in modules
            if module.rank and ALPHA not in module.sidecars and _component(module.name) in configs
        ]
        known = {module.name for module in ruled}
        result = self.tensors.read([module for module in modules if module.name not in known], bundle, stated)
        for module in ruled:
            component, path = split_component(module.name)
            config = configs[component]
            result.scalings[module.name] = config.scaling_of(path, stated, bundle.path)
        return result

    def write(self, targets: Sequence[Target], remembered: Mapping[str, JsonValue]) -> ScalesWritten:
        """Return the annotation, each component's fields behind its name, or alone in a file without components.

        The annotation that the adapter once had is written as it was where it still says the same.
        """
        known = find_texts(remembered, "metadata").get(ADAPTER_METADATA)
        if known is not None and _says_all(known, targets):
            return ScalesWritten(metadata={ADAPTER_METADATA: known})
        bare = remembered.get("bare")
        fields: dict[str, JsonValue] = {}
        problems: list[Problem] = []
        low_rank = [target for target in targets if target.rank]
        for component in dict.fromkeys(_component(target.name) for target in low_rank):
            own = {split_component(each.name)[1]: each for each in low_rank if _component(each.name) == component}
            prefix = "" if component in (bare, "") else f"{component}."
            fields |= {f"{prefix}{name}": value for name, value in describe_lora(own).items()}
            problems += find_uneven(own)
        return ScalesWritten(metadata={ADAPTER_METADATA: write_canonical(fields).decode("utf-8")}, problems=problems)


def _says_all(text: str, targets: Sequence[Target]) -> bool:
    """Say whether an annotation gives every target the rank and scale that it has."""
    configs = read_adapter_metadata(Bundle(Path(ADAPTER_METADATA), {}, {ADAPTER_METADATA: text}))
    own: dict[str, dict[str, Target]] = {}
    for target in targets:
        component, path = split_component(target.name)
        own.setdefault(component, {}).update({path: target} if target.rank else {})
    return all(
        component in configs and says_the_same(configs[component].fields, each) for component, each in own.items()
    )


def _component(target: str) -> str:
    return split_component(target)[0]


class _Diffusers(TableScheme):
    def detect(self, bundle: Bundle) -> str | None:
        """Recognise the components, the annotation beside names alone, or a transformer's names in a table."""
        marked = self.marks.find(bundle)
        if marked or MANIFEST_KEY in bundle.metadata:
            return marked
        if ADAPTER_METADATA in bundle.metadata and all(map(_ALONE.match, bundle.tensors)):
            return f"the annotation {ADAPTER_METADATA}, and names without a component"
        if not all(map(_OF_TRANSFORMER.match, bundle.tensors)):
            return None
        known = find_model(bundle, "transformer.")
        return str(known) if known else None

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; FLUX.1's first layer may have more inputs than the base's, as diffusers lets it."""
        adapter = super().read(bundle, stated)
        return pad_first_layer(adapter) if is_of_flux1(adapter) else adapter


SCHEME: Final = _Diffusers(
    name="diffusers",
    title="diffusers: pytorch_lora_weights.safetensors",
    rows=NameTable(
        [
            Row("lora_A.weight", "lora", "lora_A.weight"),
            Row("lora_B.weight", "lora", "lora_B.weight"),
            Row("lora_A.{adapter}.weight", "lora", "lora_A.weight"),
            Row("lora_B.{adapter}.weight", "lora", "lora_B.weight"),
            Row("lora_linear_layer.down.weight", "lora", "lora_A.weight"),
            Row("lora_linear_layer.up.weight", "lora", "lora_B.weight"),
            Row("lora.down.weight", "lora", "lora_A.weight"),
            Row("lora.up.weight", "lora", "lora_B.weight"),
            Row("lora_B.bias", "lora", "lora_B.bias"),
            Row("lora_magnitude_vector", "dora", "lora_magnitude_vector"),
            Row("lora_magnitude_vector.weight", "dora", "lora_magnitude_vector"),
            Row("lora_magnitude_vector.{adapter}.weight", "dora", "lora_magnitude_vector"),
            Row("magnitude", "dora", "lora_magnitude_vector"),  # ai-toolkit's.
            Row("weight", "replace", "weight"),  # Norms of BFL's control adapters.
            Row("bias", "replace", "bias"),
            Row(ALPHA, "", ALPHA),
            *(row for row in LYCORIS_ROWS if row.kind == TOKEN),
        ]
    ),
    naming=ComponentNaming("diffusers", {component: component for component in COMPONENTS}),
    scale=_AdapterMetadata(AlphaTensors()),
    marks=Marks(
        keys=tuple(f"{start}{BARE_TENSOR}" for start in (_WHOLE, _TRANSFORMER, BARE)),
        others=(r"base_model\.model\.(?!unet)", r".*\.processor\.(?:qkv|proj)_lora", r".*\.dora_scale$"),
    ),
    holds=Holds(
        kinds=frozenset({"lora", "dora", "replace", PADDED}),
        slots=frozenset({SlotKind.LINEAR, SlotKind.CONV, SlotKind.PARAMETER}),
        models=PIPELINES,
    ),
    names="diffusers",
    aliases=(
        *NOISE,
        Alias(r"^(\w+)\.base_model\.model\.", r"\1."),
        Alias(r"^(text_encoder\w*\..*)\.to_([qkv])_lora\.(down|up)\.weight$", r"\1.\2_proj.lora.\3.weight"),
        Alias(r"^(text_encoder\w*\..*)\.to_out_lora\.(down|up)\.weight$", r"\1.out_proj.lora.\2.weight"),
        Alias(r"^(.*)\.processor\.to_([qkv])_lora\.(down|up)\.weight$", r"\1.to_\2.lora.\3.weight"),
        Alias(r"^(.*)\.processor\.to_out_lora\.(down|up)\.weight$", r"\1.to_out.0.lora.\2.weight"),
    ),
)
