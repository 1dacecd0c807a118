"""What is known of the scale of files that do not state it: whose adapters they are, and what their authors used.

It is said to the user, never taken: a file that looks like one of these may be another run.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

_LORALIB: Final = "the scripts of microsoft/LoRA"


@dataclass(frozen=True, slots=True)
class KnownScale:
    """The scale of one family of files.

    Attributes:
        name: whose they are.
        key: an expression that is found in names of their factors.
        shapes: what shapes these factors have; empty for any.
        said: what their authors used, and the flag that says it.
    """

    name: str
    key: str
    said: str
    shapes: frozenset[tuple[int, ...]] = frozenset()


KNOWN: Final = (
    KnownScale(
        "RoBERTa base, rank 8",
        r"roberta\.encoder\.layer\.\d+\.attention\.self\.\w+\.lora_A$",
        f"{_LORALIB} used --alpha 16 for it (GLUE)",
        frozenset({(8, 768)}),
    ),
    KnownScale(
        "RoBERTa large, rank 8",
        r"roberta\.encoder\.layer\.\d+\.attention\.self\.\w+\.lora_A$",
        f"{_LORALIB} used --alpha 16 for it (GLUE)",
        frozenset({(8, 1024)}),
    ),
    KnownScale(
        "DeBERTa XXL, rank 16",
        r"deberta\.encoder\.layer\.\d+\.attention\.self\.\w+\.lora_A$",
        f"{_LORALIB} used --alpha 32 for it (GLUE)",
        frozenset({(16, 1536)}),
    ),
    KnownScale(
        "GPT-2, rank 4 for query and value",
        r"h\.\d+\.attn\.c_attn\.lora_A$",
        f"{_LORALIB} used --alpha 32 for it (E2E, WebNLG, DART)",
        frozenset({(8, 1024), (8, 1280)}),
    ),
    KnownScale(
        "FLUX by XLabs",
        r"_blocks\.\d+\.processor\.(?:qkv|proj)_lora[12]?\.down\.weight$",
        "x-flux trains with --scale 1 and asks for a strength when it is used",
    ),
    KnownScale(
        "mlx-vlm",
        r"\.(?:layers|blocks|h)\.\d+\..+\.[AB]$",
        "the alpha of its adapter_config.json was --scale until its pull request 986, and is --alpha since",
    ),
    KnownScale(
        "DeepSpeed-Chat",
        r"\.lora_(?:right|left)_weight$",
        "its scripts use --alpha 1 unless their user says otherwise",
    ),
    KnownScale(
        "cloneofsimo/lora",
        r"^(?:unet|text_encoder):\d+:down$",
        "its files act with --scale 1 unless their user says otherwise",
    ),
)


def find_scale(shapes: Mapping[str, tuple[int, ...]]) -> KnownScale | None:
    """Return what is known of a file's scale, from the names and shapes of its tensors."""
    return next((known for known in KNOWN if _fits(known, shapes.items())), None)


def _fits(known: KnownScale, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> bool:
    matching = [shape for name, shape in tensors if re.search(known.key, name)]
    return bool(matching) and (not known.shapes or set(matching) <= known.shapes)
