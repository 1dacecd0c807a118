"""NeMo and Megatron-Bridge: one pair of factors for each weight, fused ones in the rows of Megatron; no scale."""

from typing import Final

from loraformat.schemes._marks import Marks
from loraformat.schemes._megatron import ALIASES, CANONICAL, HOLDS, KEYS, ROWS, ArchiveScale, MegatronReader
from loraformat.schemes._naming import PlainNaming

SCHEME: Final = MegatronReader(
    name="megatron",
    title="NeMo and Megatron-Bridge: linear_in and linear_out of fused weights, without a scale",
    rows=ROWS,
    naming=PlainNaming(),
    scale=ArchiveScale(),
    holds=HOLDS,
    marks=Marks(keys=KEYS, others=CANONICAL),
    names="megatron",
    aliases=ALIASES,
)
