"""The names of NeMo and Megatron-Bridge: `...self_attention.linear_qkv.adapter.linear_in.weight`, and NeMo 1's.

linear_in is A, linear_out is B; the rows of linear_qkv are interleaved by groups of heads, those of linear_fc1 are gate
above up. Scale: alpha / dim of the training's configuration, which is in NeMo 1's archives alone
(`peft.lora_tuning`). Source: NVIDIA-NeMo/Megatron-Bridge 0.3, peft; NVIDIA/NeMo, export/utils/lora_converter.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.base_facts import BaseFacts, read_facts
from loraformat.errors import refuse
from loraformat.schemes import DECODERS, NOT_STATED, Bundle, Holds, StatedScale
from loraformat.schemes._beside import Module
from loraformat.schemes._engine import TableReader
from loraformat.schemes._marks import NOISE, Alias
from loraformat.schemes._scales import UNIT, ScalesRead, ScalesWritten, StatedAlone
from loraformat.schemes._table import NameTable, Row
from loraformat.strict_json import JsonValue

_LAYER: Final = r"^((?:.*\.)?decoder\.layers\.\d+)"
_OLD: Final = (
    (r"self_attention\.adapter_layer\.lora_kqv_adapter", "self_attention.linear_qkv.adapter"),
    (r"self_attention\.adapter_layer\.lora_dense_attention_adapter", "self_attention.linear_proj.adapter"),
    (r"mlp\.adapter_layer\.lora_hto4h_adapter", "mlp.linear_fc1.adapter"),
    (r"mlp\.adapter_layer\.lora_4htoh_adapter", "mlp.linear_fc2.adapter"),
)
"""NeMo 1's names of adapters, and what they adapt."""
_UNFUSED: Final = (
    (
        r"self_attention\.adapter_layer\.lora_unfused_kqv_adapter\.([qkv])_adapter",
        r"self_attention.linear_qkv.adapter_\2",
    ),
    (r"mlp\.adapter_layer\.lora_unfused_hto4h_adapter\.(gate|up)_adapter", r"mlp.linear_fc1.adapter_\2"),
)

ROWS: Final = NameTable(
    [
        Row("adapter.linear_in.weight", "lora", "lora_A.weight"),
        Row("adapter.linear_out.weight", "lora", "lora_B.weight"),
        Row("linear_in.weight", "lora", "lora_A.weight"),
        Row("linear_out.weight", "lora", "lora_B.weight"),
    ]
)
HOLDS: Final = Holds(kinds=frozenset({"lora"}), slots=frozenset({SlotKind.LINEAR}), scale="not stored", models=DECODERS)
KEYS: Final = (
    r".*(?:adapter_layer\.lora_\w+_adapter\.(?:\w+_adapter\.)?|\.adapter(?:_\w+)?\.)linear_(?:in|out)\.weight$",
)
CANONICAL: Final = (r".*\.linear_\w+\.adapter_\w+\.linear_", r".*adapter_layer\.lora_unfused_\w+_adapter\.")
"""Keys of files in which each part of a fused weight has factors of its own."""
ALIASES: Final = (
    *NOISE,
    Alias(r"^(?:module\.|model\.)+(decoder\.)", r"\1"),
    *(Alias(rf"{_LAYER}\.{old}\.", rf"\1.{new}.") for old, new in (*_OLD, *_UNFUSED)),
)

_SETTING: Final = "nemo."
_TUNING: Final = f"{_SETTING}peft.lora_tuning."


@dataclass(frozen=True, slots=True)
class ArchiveScale:
    """The alpha of an archive's settings, where the rank there is that of the factors; else what the user states."""

    def read(self, modules: Sequence[Module], bundle: Bundle, stated: StatedScale) -> ScalesRead:
        """Return the one scaling; raises LF203 where the factors have another rank than the settings say."""
        alpha, dim = (_read_number(bundle, f"{_TUNING}{name}") for name in ("alpha", "adapter_dim"))
        if stated != NOT_STATED or alpha is None or dim is None:
            return StatedAlone().read(modules, bundle, stated)
        other = next((module for module in modules if module.rank not in (0, dim)), None)
        if other is not None:
            raise refuse("LF203", f"{bundle.path}: {other.name}", f"rank {other.rank}", f"{dim:g}, as the settings say")
        scaling = Scaling(ScalingRule.ALPHA_OVER_RANK, alpha)
        return ScalesRead({module.name: scaling if module.rank else UNIT for module in modules})

    def write(self, targets: Sequence[Target], remembered: Mapping[str, JsonValue]) -> ScalesWritten:
        """Return nothing: it is only read."""
        return ScalesWritten()


class MegatronReader(TableReader):
    """A reader of these names, which knows what an archive says of its base."""

    def find_facts(self, bundle: Bundle) -> BaseFacts:
        """Return the counts of heads and layers."""
        names = (key.removeprefix(_SETTING) for key in bundle.metadata if key.startswith(_SETTING))
        counts = {
            name: int(value) for name in names if (value := _read_number(bundle, f"{_SETTING}{name}")) is not None
        }
        return read_facts(counts, str(bundle.path)) if counts else BaseFacts()


def _read_number(bundle: Bundle, key: str) -> float | None:
    try:
        value = float(bundle.metadata[key])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None
