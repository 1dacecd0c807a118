"""fal's FLUX adapters and some of ai-toolkit's: PEFT's keys over the original names, without PEFT's configuration.

`base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight`. For want of a scale every reader takes 1. With
a configuration beside it, it is a PEFT folder, and read as one. Source: huggingface/diffusers,
`_convert_fal_kontext_lora_to_diffusers`, `_convert_non_diffusers_krea2_lora_to_diffusers`.
"""

from typing import Final

from loraformat.adapter import SlotKind
from loraformat.manifest import MANIFEST_KEY
from loraformat.schemes import PIPELINES, Bundle, Holds
from loraformat.schemes._beside import ALPHA
from loraformat.schemes._engine import TableReader
from loraformat.schemes._known_names import find_original
from loraformat.schemes._marks import NOISE, Alias, Marks
from loraformat.schemes._naming import ComponentNaming
from loraformat.schemes._scales import AlphaTensors
from loraformat.schemes._table import NameTable, Row

_PREFIX: Final = "base_model.model."


def _is_alone(bundle: Bundle) -> bool:
    return bundle.config is None


class _Fal(TableReader):
    def detect(self, bundle: Bundle) -> str | None:
        """Recognise FLUX's names, or those of any other model's own repository that a table has."""
        known = find_original(bundle, _PREFIX) if _is_alone(bundle) and MANIFEST_KEY not in bundle.metadata else None
        return self.marks.find(bundle) or (str(known) if known else None)


SCHEME: Final = _Fal(
    name="fal",
    title="fal: PEFT's keys over original names, without a configuration",
    rows=NameTable(
        [
            Row("lora_A.weight", "lora", "lora_A.weight"),
            Row("lora_B.weight", "lora", "lora_B.weight"),
            Row(ALPHA, "", ALPHA),
        ]
    ),
    naming=ComponentNaming("dotted", {"": "transformer"}),
    scale=AlphaTensors(),
    holds=Holds(kinds=frozenset({"lora"}), slots=frozenset({SlotKind.LINEAR}), models=PIPELINES),
    marks=Marks(keys=(r"base_model\.model\.(?:double|single)_blocks\..*\.lora_[AB]\.weight$",), asks=(_is_alone,)),
    names="dotted",
    aliases=(*NOISE, Alias(r"^base_model\.model\.", "")),
)
