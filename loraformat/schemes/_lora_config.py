r"""The fields of PEFT's LoraConfig that hold ranks and scales, written for a list of targets.

A folder of PEFT has them in `adapter_config.json`, a file of diffusers in an annotation for each component. Exceptions
from the usual rank and alpha are patterns; each is an expression that fits one module alone: PEFT matches
`(.*\.)?(pattern)$`, and `^` keeps what may stand before it empty.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from loraformat.adapter import ScalingRule, SlotKind, Target
from loraformat.strict_json import JsonValue

_SQRT = ScalingRule.ALPHA_OVER_SQRT_RANK


def describe_lora(targets: Mapping[str, Target]) -> dict[str, JsonValue]:
    """Return the fields for targets by the name that the configuration is to call them."""
    root = Counter(target.scaling.rule is _SQRT for target in targets.values()).most_common(1)[0][0]
    ranks = {name: target.rank for name, target in targets.items()}
    alphas = {name: alpha_of(target, root=root) for name, target in targets.items()}
    rank, alpha = (_usual(list(values.values())) for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {exact_pattern(name): each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {exact_pattern(name): _whole(each) for name, each in alphas.items() if each != alpha},
        "target_modules": sorted(targets),
        "use_rslora": root,
        "use_dora": any("lora_magnitude_vector" in target.factors for target in targets.values()),
        "lora_bias": any("lora_B.bias" in target.factors for target in targets.values()),
        "fan_in_fan_out": all(target.slot is SlotKind.LINEAR_TRANSPOSED for target in targets.values()),
        "bias": "none",
    }


def alpha_of(target: Target, *, root: bool) -> float:
    """Return the alpha that has the target's effect under one of the two rules; exact where the rule is its own."""
    value, rank = target.scaling.value, target.rank
    if target.scaling.rule is (_SQRT if root else ScalingRule.ALPHA_OVER_RANK):
        return value
    return target.scale * (math.sqrt(rank) if root else rank)


def exact_pattern(name: str) -> str:
    """Return the expression that fits this module alone."""
    return "^" + re.sub(r"[^\w]", lambda match: f"\\{match[0]}", name)


def _usual(values: Sequence[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _whole(value: float) -> int | float:
    """Return a whole number as JSON writes it in configurations."""
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else value
