"""The names of NeMo and Megatron-Bridge: `...self_attention.linear_qkv.adapter.linear_in.weight`, and NeMo 1's.

linear_in is A, linear_out is B; the rows of linear_qkv are interleaved by groups of heads, those of linear_fc1 are gate
above up. Scale: alpha / dim of the training's configuration, which is not in these files. Source: NVIDIA-NeMo/
Megatron-Bridge 0.3, peft; NVIDIA/NeMo, export/utils/lora_converter.py.
"""

from typing import Final

from loraformat.adapter import SlotKind
from loraformat.schemes import DECODERS, Holds
from loraformat.schemes._marks import NOISE, Alias
from loraformat.schemes._table import NameTable, Row

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
