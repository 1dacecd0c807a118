"""mistral-finetune: `lora.safetensors` with Meta's names and interleaved rotary rows, beside `params.json`.

One rank and one `scaling` for all modules, the multiplier itself, in `params.json` under `lora`. Source:
mistralai/mistral-finetune, mistral-inference (lora.py).
"""

from collections.abc import Mapping, Sequence
from typing import Final

from loraformat.adapter import ScalingRule, SlotKind, Target
from loraformat.base_facts import BaseFacts, read_facts
from loraformat.schemes import DECODERS, Bundle, Holds, Layout
from loraformat.schemes._files import FiledScheme, level_multipliers, multiplier_of, pad_ranks
from loraformat.schemes._marks import Marks
from loraformat.schemes._one_scale import ConfigScale, inner
from loraformat.schemes._patterned import PatternedNaming
from loraformat.schemes._table import NameTable, Row
from loraformat.strict_json import JsonValue

_BLOCK: Final = r"layers\.\d+\.(?:attention\.w[qkvo]|feed_forward\.(?:experts\.\d+\.)?w[123]|feed_forward\.gate)"


def _write_config(targets: Sequence[Target], before: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return `params.json`, of which only the part about the adapter is ours."""
    known = before.get("lora")
    lora: dict[str, JsonValue] = dict(known) if isinstance(known, Mapping) else {"dropout": 0.0, "enable": True}
    lora["rank"] = max((target.rank for target in targets), default=0)
    lora["scaling"] = multiplier_of(targets[0]) if targets else 1.0
    return dict(before) | {"lora": lora}


def _find_scaling(config: Mapping[str, JsonValue]) -> JsonValue:
    found: JsonValue = inner(config, "lora", "scaling")
    return found


class _Mistral(FiledScheme):
    layout = Layout(("lora.safetensors",), ("params.json",))

    def find_facts(self, bundle: Bundle) -> BaseFacts:
        """Return the counts of heads, which `params.json` states beside the adapter's own fields."""
        return read_facts(bundle.config or {}, str(bundle.path))


SCHEME: Final = _Mistral(
    name="mistral",
    title="mistral-finetune: lora.safetensors and params.json, Meta's names",
    rows=NameTable([Row("lora_A.weight", "lora", "lora_A.weight"), Row("lora_B.weight", "lora", "lora_B.weight")]),
    naming=PatternedNaming(rf"{_BLOCK}|output|tok_embeddings", "mistral-inference"),
    scale=ConfigScale(_find_scaling, ScalingRule.MULTIPLIER, _write_config),
    marks=Marks(keys=(rf"{_BLOCK}\.lora_[AB]\.weight$",)),
    holds=Holds(
        kinds=frozenset({"lora"}),
        slots=frozenset({SlotKind.LINEAR}),
        scale="one for all",
        needs="the counts of heads, for the interleaved rows of q and k",
        models=DECODERS,
    ),
    names="mistral",
    fits=(level_multipliers, pad_ranks),
    file_name="lora.safetensors",
    config_name="params.json",
)
