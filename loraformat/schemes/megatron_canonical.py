"""NeMo and Megatron-Bridge with "canonical" LoRA: q, k, v, gate and up have factors of their own; no scale."""

import re
from typing import Final

from loraformat.schemes import Bundle
from loraformat.schemes._engine import TableReader
from loraformat.schemes._marks import Marks
from loraformat.schemes._megatron import ALIASES, CANONICAL, HOLDS, KEYS, ROWS
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._scales import StatedAlone


def _is_canonical(bundle: Bundle) -> bool:
    return any(re.match(expression, key) for key in bundle.tensors for expression in CANONICAL)


SCHEME: Final = TableReader(
    name="megatron_canonical",
    title="NeMo and Megatron-Bridge, canonical LoRA: factors for each of q, k, v, gate and up",
    rows=ROWS,
    naming=PlainNaming(),
    scale=StatedAlone(),
    holds=HOLDS,
    marks=Marks(keys=KEYS, asks=(_is_canonical,)),
    names="megatron_canonical",
    aliases=ALIASES,
)
