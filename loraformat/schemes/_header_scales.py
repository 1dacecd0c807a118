"""A scale that stands in a file's own annotations, for files without tensors that hold it.

diffusers writes the fields of LoraConfig, component by component, as `lora_adapter_metadata`; and its loader heeds them
whatever the tensors are called. Others write a number: `lora_alpha`, `network_alpha` or `alpha` (LightX2V, SimpleTuner;
sgl-project/sglang #36082 heeds all three). kohya's `ss_network_alpha` is no such number: converters that multiply it
into the factors leave it in place, and no reader takes it.
"""

import math
from collections.abc import Mapping
from typing import Final

from loraformat.adapter import Scaling, ScalingRule
from loraformat.errors import LoraformatError, refuse
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes._naming import COMPONENTS, split_component
from loraformat.schemes._peft.config import PeftConfig
from loraformat.strict_json import JsonValue, parse_json_object

ADAPTER_METADATA: Final = "lora_adapter_metadata"
_NUMBERS: Final = ("lora_alpha", "network_alpha", "alpha")
_PATTERNS: Final = ("rank_pattern", "alpha_pattern")
_LISTED: Final = 4


def read_adapter_metadata(bundle: Bundle) -> dict[str, PeftConfig]:
    """Return component to LoraConfig's fields; those of a file without components hold for all."""
    text = bundle.metadata.get(ADAPTER_METADATA)
    if text is None:
        return {}
    where = f"{bundle.path}: {ADAPTER_METADATA}"
    try:
        fields = parse_json_object(text.encode("utf-8", "surrogatepass"), where)
    except LoraformatError:
        return {}
    parts: dict[str, dict[str, JsonValue]] = {}
    for name, value in fields.items():
        component, dot, field = name.rpartition(".")
        for each in (component,) if dot else ("", *COMPONENTS):
            parts.setdefault(each, {})[field] = value
    return {component: PeftConfig(each, where, True) for component, each in parts.items()}


def find_scaling(target: str, configs: Mapping[str, PeftConfig], bundle: Bundle) -> Scaling | None:
    """Return the scaling that diffusers' annotation gives a target of any scheme, or None.

    Raises:
        FindingError: LF327 where it differs from module to module, by names that the file does not use.
    """
    config = configs.get(split_component(target)[0])
    if config is None or not config.fields.get("lora_alpha"):
        return None
    patterns = [name for name in _PATTERNS[1:] if config.fields.get(name)]
    if patterns:
        raise refuse("LF327", config.where, f"{patterns[0]}, by diffusers' names", "one alpha for all modules")
    return config.scaling_of(target, NOT_STATED, bundle.path)


def find_header_alpha(metadata: Mapping[str, str]) -> tuple[Scaling, str] | None:
    """Return the scaling that a number among the annotations gives, and the number as it stands there.

    Raises:
        FindingError: LF327 two annotations say different numbers.
    """
    found = {key: number for key, text in metadata.items() if (number := _read_alpha(key, text)) is not None}
    listed = ", ".join(f"{key} {metadata[key]:.40}" for key in sorted(found)[:_LISTED])
    if len(set(found.values())) > 1:
        raise refuse("LF327", "annotations", listed, "one alpha")
    return (Scaling(ScalingRule.ALPHA_OVER_RANK, next(iter(found.values()))), listed) if found else None


def _read_alpha(key: str, text: str) -> float | None:
    """Return the number of an annotation that is about the alpha, None for any other."""
    component, _, name = key.rpartition(".")
    if name not in _NUMBERS or component not in ("", *COMPONENTS):
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
