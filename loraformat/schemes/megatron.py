"""NeMo and Megatron-Bridge: one pair of factors for each weight, fused ones in the rows of Megatron; no scale."""

from typing import Final

from loraformat.schemes._engine import TableReader
from loraformat.schemes._marks import Marks
from loraformat.schemes._megatron import ALIASES, CANONICAL, HOLDS, KEYS, ROWS
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._scales import StatedAlone

SCHEME: Final = TableReader(
    name="megatron",
    title="NeMo and Megatron-Bridge: linear_in and linear_out of fused weights, without a scale",
    rows=ROWS,
    naming=PlainNaming(),
    scale=StatedAlone(),
    holds=HOLDS,
    marks=Marks(keys=KEYS, others=CANONICAL),
    names="megatron",
    aliases=ALIASES,
)
