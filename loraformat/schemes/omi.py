"""OneTrainer's OMI format ("open model initiative"): the original names, fused weights in numbered parts.

`transformer.double_blocks.0.img_attn.qkv.1.lora_down.weight` is the second part, k; text encoders stand behind
`clip_l`, `clip_g` and `t5`. Source: Nerogar/OneTrainer, modules/util/convert.
"""

from typing import Final

from loraformat.adapter import SlotKind
from loraformat.schemes import LORA_SLOTS, PIPELINES, Holds
from loraformat.schemes._engine import TableReader
from loraformat.schemes._lycoris import LYCORIS_KINDS, LYCORIS_ROWS
from loraformat.schemes._marks import Marks
from loraformat.schemes._naming import ComponentNaming
from loraformat.schemes._scales import AlphaTensors
from loraformat.schemes._table import NameTable, Row

_PREFIXES: Final = {
    "transformer": "transformer",
    "unet": "unet",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_2",
}
_TENSOR: Final = r".*\.(?:lora_(?:down|up|A|B)\.|hada_|lokr_|dora_scale)"

SCHEME: Final = TableReader(
    name="omi",
    title="OneTrainer OMI: original names, fused weights in parts",
    rows=NameTable(
        [
            Row("lora_down.weight", "lora", "lora_A.weight"),
            Row("lora_up.weight", "lora", "lora_B.weight"),
            Row("lora_A.weight", "lora", "lora_A.weight"),
            Row("lora_B.weight", "lora", "lora_B.weight"),
            *LYCORIS_ROWS,
        ]
    ),
    naming=ComponentNaming("omi", _PREFIXES),
    scale=AlphaTensors(),
    holds=Holds(kinds=LYCORIS_KINDS, slots=LORA_SLOTS | {SlotKind.PARAMETER}, models=PIPELINES),
    marks=Marks(
        keys=(
            rf"(?:clip_l|clip_g|t5)\.{_TENSOR}",
            rf"transformer\.(?:double|single)_blocks\.{_TENSOR}",
            r"(?:transformer|unet)\..*\.lora_(?:down|up)\.weight$",
        )
    ),
    names="omi",
)
