"""The fields that PEFT's configurations have: those that are heeded, and those that change no number.

What of a type is its own stands in its row of the table in `types.py`. What is in neither list, and set, is a field of
a newer PEFT or of somebody else. PEFT leaves such a field out, with a warning, when it loads a configuration; what a
newer one computes by it no one here can know. Source: the dataclasses of huggingface/peft 0.21.2, and what its layers
read of them; ms-swift, vLLM and Unsloth for what is theirs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from loraformat.problems import Problem
from loraformat.strict_json import JsonValue

NEWEST: Final = (0, 21, 2)
"""The PEFT whose fields these are."""
_VERSION: Final = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")

_HEEDED: Final = (
    "peft_type peft_version base_model_name_or_path revision modules_to_save target_modules fan_in_fan_out bias"
)
_IGNORED: Final = (
    "task_type auto_mapping inference_mode exclude_modules layers_to_transform layers_pattern init_weights"
)
_OTHERS: Final = (
    "merge_weights lora_dtype lorap_lr_ratio lorap_emb_lr vllm_lora_scaling_factor vllm_max_position_embeddings "
    "vllm_long_context_scaling_factor lora_plus_lr_ratio"
)
"""Fields by which training or serving goes: of PEFT 0.2, ms-swift, vLLM, and those who train with LoRA+."""
LORA_IGNORED: Final = (
    "lora_dropout megatron_config megatron_core eva_config corda_config lora_ga_config velora_config monteclora_config "
    "qalora_group_size runtime_config"
)
LORA_HEEDED: Final = (
    "lora_alpha r rank_pattern alpha_pattern use_rslora use_dora lora_bias trainable_token_indices target_parameters "
    "use_bdlora kasa_config enable_lora ensure_weight_tying init_lora_weights loftq_config layer_replication "
    "arrow_config alora_invocation_tokens use_qalora lora_B_layout unsloth_fused_expert_lora swift_type"
)


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields that configurations of a type have.

    Attributes:
        heeded: those that say how tensors become a change, or stand against it.
        ignored: those that change no number of a trained adapter.
    """

    heeded: frozenset[str]
    ignored: frozenset[str]


def name_fields(heeded: str, ignored: str) -> Fields:
    """Return the fields of a type: its own, by their names with spaces between, and those that all types have."""
    own = frozenset(f"{_HEEDED} {heeded}".split())
    return Fields(own, frozenset(f"{_IGNORED} {_OTHERS} {ignored}".split()) - own)


OF_LORA: Final[Mapping[str, Fields]] = {
    "LORA": name_fields(LORA_HEEDED, LORA_IGNORED),
    "TRAINABLE_TOKENS": name_fields("token_indices", ""),
}
"""Of the types that are not rows of the table in `types.py`."""


def find_unknown(fields: Mapping[str, JsonValue], where: str, own: Fields) -> list[Problem]:
    """Return the fields that are set and that neither list has.

    Of a PEFT newer than the lists, a switch (`true`, a list, an object, text) may change what its layers compute: an
    error. A number qualifies some switch. PEFT of the versions that the lists are of would leave the field out, as it
    is left out here: a warning.
    """
    unknown = {name: value for name, value in fields.items() if value and name not in own.heeded | own.ignored}
    version = fields.get("peft_version")
    newer = _is_newer(version)
    stopping = {name for name, value in unknown.items() if newer and (value is True or not _is_number(value))}
    return [
        Problem("LF240", f"{where}: {name}", f"{value!r:.80}, of PEFT {version}", f"a field of PEFT {_spell(NEWEST)}")
        if name in stopping
        else Problem("LF241", f"{where}: {name}", f"{value!r:.80}, left out", severity="warning")
        for name, value in unknown.items()
    ]


def _is_newer(version: JsonValue) -> bool:
    found = _VERSION.match(version) if isinstance(version, str) else None
    return found is not None and tuple(int(part or 0) for part in found.groups()) > NEWEST


def _is_number(value: JsonValue) -> bool:
    return isinstance(value, int | float)


def _spell(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
