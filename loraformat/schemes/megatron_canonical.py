"""NeMo and Megatron-Bridge with "canonical" LoRA: q, k, v, gate and up have factors of their own; no scale."""

import re
from typing import Final

from loraformat.schemes import Bundle
from loraformat.schemes._marks import Marks
from loraformat.schemes._megatron import ALIASES, CANONICAL, HOLDS, KEYS, ROWS, ArchiveScale, MegatronReader
from loraformat.schemes._naming import PlainNaming


def _is_canonical(bundle: Bundle) -> bool:
    return any(re.match(expression, key) for key in bundle.tensors for expression in CANONICAL)


SCHEME: Final = MegatronReader(
    name="megatron_canonical",
    title="NeMo and Megatron-Bridge, canonical LoRA: factors for each of q, k, v, gate and up",
    rows=ROWS,
    naming=PlainNaming(),
    scale=ArchiveScale(),
    holds=HOLDS,
    marks=Marks(keys=KEYS, asks=(_is_canonical,)),
    names="megatron_canonical",
    aliases=ALIASES,
)
