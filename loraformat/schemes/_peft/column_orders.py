"""In which order experts lie in the columns of a packed B: PEFT's, or that of Unsloth before 2026.9.6.

PEFT and all who read its files have the experts of one rank side by side. Unsloth's own forward took a block of columns
for each expert; both orders fit the same shape. Its later versions say in the configuration which one a file has
(`lora_B_layout`, and for each parameter `unsloth_fused_expert_lora`), and take a file of theirs that does not say it
for one of the old. Source: unsloth-zoo 2026.10, temporary_patches/moe_utils.py.
"""

from collections.abc import Mapping
from typing import Any, Final

from loraformat.problems import Problem
from loraformat.schemes._peft.config import PeftConfig
from loraformat.strict_json import JsonValue

RANK_MAJOR: Final = "rank_major"
BY_EXPERT: Final = "grouped_by_expert"
_FIELD: Final = "lora_B_layout"
_DETAIL: Final = "unsloth_fused_expert_lora"
_AUTO: Final = "auto_mapping"
_SEPARATED: Final = frozenset({"gate_up_proj", "down_proj"})
"""The parameters that Unsloth's own forward takes; any other is left to PEFT's."""


def find_order(parameter: str, config: PeftConfig) -> str | Problem:
    """Return the order of the columns of a parameter's B; a problem (LF647) where nothing tells."""
    fields = config.fields
    auto = fields.get(_AUTO)
    sources = [fields, auto] if isinstance(auto, Mapping) else [fields]
    stated = next((order for source in sources if (order := _read(source, parameter))), None)
    if stated is not None:
        known = stated in (RANK_MAJOR, BY_EXPERT)
        return stated if known else Problem("LF647", f"{config.where}: {_FIELD}", f"{stated:.60}", RANK_MAJOR)
    if parameter in _SEPARATED and isinstance(auto, Mapping) and auto.get("unsloth_fixed"):
        return Problem(
            "LF647", f"{config.where}: {_FIELD}", "nothing, in a file of Unsloth's", f"{RANK_MAJOR}, or {BY_EXPERT}"
        )
    return RANK_MAJOR


def _read(source: Mapping[str, Any], parameter: str) -> str | None:
    detail = source.get(_DETAIL)
    each = detail.get("parameters") if isinstance(detail, Mapping) else None
    if isinstance(each, Mapping):
        own = each.get(parameter)
        order = own.get(_FIELD) if isinstance(own, Mapping) else None
        return order if isinstance(order, str) else RANK_MAJOR
    order = source.get(_FIELD)
    return order if isinstance(order, str) else None


def state_rank_major(config: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the configuration of a file that is written as PEFT has it, where what it is made of said an order."""
    auto = config.get(_AUTO)
    own = auto if isinstance(auto, Mapping) else {}
    if not ({_FIELD, _DETAIL} & {*config, *own} or own.get("unsloth_fixed")):
        return config
    written = {name: value for name, value in config.items() if name != _DETAIL} | {_FIELD: RANK_MAJOR}
    kept = {name: value for name, value in own.items() if name not in (_FIELD, _DETAIL)}
    return written | ({_AUTO: kept} if own else {})
