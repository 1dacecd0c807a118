"""torchtune's own checkpoints: `layers.0.attn.q_proj.lora_a.weight`, with rotary rows as the model family has them.

One rank and one alpha for all, which stand in the recipe; a configuration in PEFT's form lies beside a checkpoint that
was exported as well. Source: pytorch/torchtune 0.6, models/convert_weights.py, training/checkpointing.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from loraformat.adapter import ScalingRule, SlotKind, Target
from loraformat.schemes import DECODERS, Holds
from loraformat.schemes._files import FiledScheme, alpha_of, level_multipliers, pad_ranks
from loraformat.schemes._marks import Marks
from loraformat.schemes._one_scale import ConfigScale
from loraformat.schemes._patterned import PatternedNaming
from loraformat.schemes._table import NameTable, Row
from loraformat.strict_json import JsonValue

_NAMES: Final = r"(?:decoder\.)?(?:layers\.\d+\.(?:attn\.(?:[qkv]|output)_proj|mlp\.w[123])|output|tok_embeddings)"


def _write_config(targets: Sequence[Target], before: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return rank and alpha as torchtune's checkpointer keeps them."""
    rank = max((target.rank for target in targets), default=0)
    alpha = alpha_of(targets[0]) if targets else 0.0
    modules = sorted({target.name.rpartition(".")[2] for target in targets})
    fields: dict[str, JsonValue] = {"peft_type": "LORA", "target_modules": list(modules)} | dict(before)
    return fields | {"r": rank, "lora_alpha": alpha}


SCHEME: Final = FiledScheme(
    name="torchtune",
    title="torchtune: adapter_model.pt in its own names",
    rows=NameTable(
        [
            Row("lora_a.weight", "lora", "lora_A.weight"),
            Row("lora_b.weight", "lora", "lora_B.weight"),
            Row("magnitude", "dora", "lora_magnitude_vector"),
        ]
    ),
    naming=PatternedNaming(_NAMES, "torchtune"),
    scale=ConfigScale(lambda config: config.get("lora_alpha"), ScalingRule.ALPHA_OVER_RANK, _write_config),
    marks=Marks(keys=(rf"{_NAMES}\.lora_[ab]\.weight$",), neutral=(r".+\.magnitude$",)),
    holds=Holds(
        kinds=frozenset({"lora", "dora"}),
        slots=frozenset({SlotKind.LINEAR}),
        scale="one for all",
        needs="the counts of heads where rotary rows are interleaved",
        models=DECODERS,
    ),
    names="torchtune",
    fits=(level_multipliers, pad_ranks),
    container="torch_zip",
    file_name="adapter_model.pt",
    config_name="adapter_config.json",
    annotates=False,
)
