"""XLabs' FLUX adapters (x-flux): attention processors with `qkv_lora1`, `proj_lora2` and their like.

1 is the image stream, 2 the text stream. In single blocks `qkv_lora` covers the first 3 of the 7 parts of `linear1`, so
that its B gets rows of zeros for the rest. Nothing says how strongly it acts. Source: XLabs-AI/x-flux, src/flux.
"""

from typing import Final

from loraformat.adapter import Factor, SlotKind
from loraformat.derived import derive
from loraformat.operations import Pad, Take
from loraformat.schemes import PIPELINES, Holds
from loraformat.schemes._engine import TableReader
from loraformat.schemes._marks import NOISE, Alias, Marks
from loraformat.schemes._naming import ComponentNaming
from loraformat.schemes._scales import StatedAlone
from loraformat.schemes._table import NameTable, Row, Turn


def _widen(factor: Factor) -> Factor:
    """Return rows of q, k and v with those of the MLP below, as zeros."""
    return derive(Pad(0, factor.shape[0] // 3 * 4), factor)


def _narrow(factor: Factor) -> Factor:
    return derive(Take(0, factor.shape[0] // 7 * 3), factor)


_FIRST_OF_LINEAR1: Final = Turn(_widen, _narrow)

SCHEME: Final = TableReader(
    name="xlabs",
    title="XLabs: FLUX attention processors, without a scale",
    rows=NameTable(
        [
            Row("down.weight", "lora", "lora_A.weight"),
            Row("up.weight", "lora", "lora_B.weight"),
            Row("first.down.weight", "lora", "lora_A.weight"),
            Row("first.up.weight", "lora", "lora_B.weight", _FIRST_OF_LINEAR1),
        ]
    ),
    naming=ComponentNaming("dotted", {"diffusion_model": "transformer", "": "transformer"}),
    scale=StatedAlone(),
    holds=Holds(kinds=frozenset({"lora"}), slots=frozenset({SlotKind.LINEAR}), scale="not stored", models=PIPELINES),
    marks=Marks(keys=(r".*(?:double|single)_blocks\.\d+\.processor\.(?:qkv|proj)_lora[12]?\.(?:down|up)\.weight$",)),
    names="dotted",
    aliases=(
        *NOISE,
        Alias(r"^(.*double_blocks\.\d+)\.processor\.(qkv|proj)_lora1\.", r"\1.img_attn.\2."),
        Alias(r"^(.*double_blocks\.\d+)\.processor\.(qkv|proj)_lora2\.", r"\1.txt_attn.\2."),
        Alias(r"^(.*single_blocks\.\d+)\.processor\.qkv_lora\.", r"\1.linear1.first."),
        Alias(r"^(.*single_blocks\.\d+)\.processor\.proj_lora\.", r"\1.linear2."),
    ),
)
