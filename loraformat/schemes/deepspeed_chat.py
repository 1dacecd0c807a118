"""DeepSpeed-Chat: `<module>.lora_right_weight` as `(in, rank)` and `lora_left_weight` as `(rank, out)`.

Scale: lora_scaling / rank, where lora_scaling is an argument of its layers (1 in its scripts) and in no file: it is
given as an alpha. Checkpoints of whole models hold the factors beside the weights; here they stand alone. Source:
deepspeedai/DeepSpeedExamples, applications/DeepSpeed-Chat/dschat/utils/module/lora.py.
"""

from typing import Final

from loraformat.adapter import SlotKind
from loraformat.schemes import Holds
from loraformat.schemes._engine import TableReader
from loraformat.schemes._marks import Marks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._scales import StatedAlone
from loraformat.schemes._table import TRANSPOSED, NameTable, Row

SCHEME: Final = TableReader(
    name="deepspeed_chat",
    title="DeepSpeed-Chat: lora_right_weight and lora_left_weight, without a scale",
    rows=NameTable(
        [
            Row("lora_right_weight", "lora", "lora_A.weight", TRANSPOSED),
            Row("lora_left_weight", "lora", "lora_B.weight", TRANSPOSED),
        ]
    ),
    naming=PlainNaming(),
    scale=StatedAlone(),
    holds=Holds(kinds=frozenset({"lora"}), slots=frozenset({SlotKind.LINEAR}), scale="not stored"),
    marks=Marks(keys=(r".+\.lora_(?:right|left)_weight$",)),
    names="peft",
)
