"""The tensors of one module in a PEFT file, and what they are together."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from loraformat.adapter import Factor
from loraformat.problems import Problem

BASE: Final = "base"
"""Marks what is the base's own, saved beside factors or alone."""
COPY: Final = "copy"
"""Marks the second name under which PEFT saves a module that was trained whole."""
LORA: Final = "lora"
TOKENS: Final = "tokens"
REPLACE: Final = "replace"
SHARED: Final = "base_model"
"""The module below which factors of all targets stand: `base_model.vera_A`."""

_OWN: Final = {"weight": "base_layer.weight", "bias": "base_layer.bias"}
_ORIGINAL: Final = re.compile(r"\.original_module(?=\.|$)")
_OF_THE_BASE: Final = frozenset({BASE, REPLACE, COPY})
_ADDED: Final = _OF_THE_BASE | {LORA, TOKENS}
"""Kinds that have a place for the base's own values."""
_BUFFERS: Final = re.compile(
    r"\.lora_(?:velora|monteclora)_\w+(?:\.|$)|\.ranknum(?:\.|$)|\.boft_P(?:\.|$)|\.rotary_emb\.inv_freq$|\.position_ids$"
)
"""Tensors of the training run: VeLoRA's and MonteCLoRA's (the merged weight is that of plain LoRA), AdaLoRA's count of
ranks, the permutations that BOFT of PEFT 0.11 saved and its sizes tell, and what a model computes when it is made."""
_QUANTISED: Final = re.compile(
    r"(?P<weight>.+\.weight)\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)"
    r"|(?P<module>.+)\.(?:SCB|weight_format|qweight|qzeros|scales|g_idx)"
)
"""What lies beside a weight of the base that bitsandbytes, GPTQ or AWQ quantised, where a whole model was saved."""
_LISTED: Final = 4
_TABLES: Final = 2
"""So many modules PEFT saves with the base's own weight: the tables of tokens."""


@dataclass(frozen=True, slots=True)
class Group:
    """The tensors of one target, and the kinds that they speak for."""

    factors: dict[str, Factor]
    kinds: set[str]


def list_buffers(keys: Collection[str]) -> list[str]:
    """Return the tensors that belong to the training run alone, and the base's own that were quantised for it."""
    quantised = [match for key in keys if (match := _QUANTISED.fullmatch(key))]
    weights = {match["weight"] or f"{match['module']}.weight" for match in quantised}
    beside = {match[0] for match in quantised}
    return [key for key in keys if key in beside or key in weights or _BUFFERS.search(key)]


def compose(groups: Mapping[str, Group], *, is_named: bool) -> tuple[dict[str, Group], list[Problem]]:
    """Return the groups with each tensor in the role that it has beside the others, and notes on what is left out.

    Args:
        groups: the tensors by module.
        is_named: whether the adapter's name stands in keys, as in the state dict of a model.
    """
    left_out: list[str] = []
    composed: dict[str, Group] = {}
    adapted = [group for name, group in groups.items() if name != SHARED and group.kinds - _OF_THE_BASE]
    is_dump = all(_has_own_weight(group) for group in adapted) and (is_named or len(adapted) > _TABLES)
    for name, group in groups.items():
        owner = groups.get(_ORIGINAL.sub("", name)) if _ORIGINAL.search(name) else None
        if owner is not None and owner.kinds & {REPLACE, COPY}:
            left_out.append(name)
        else:
            composed[name] = _compose_one(name, group, left_out)
            if is_dump:
                _leave_base(name, composed[name], left_out)
    return composed, note_left_out(left_out)


def _has_own_weight(group: Group) -> bool:
    return "weight" in group.factors or "base_layer.weight" in group.factors


def _leave_base(name: str, group: Group, left_out: list[str]) -> None:
    """Leave out what the state dict of a whole model has of the base, beside a change that is not added to it."""
    if group.kinds - _ADDED:
        own = [role for role in _OWN.values() if role in group.factors]
        left_out += [f"{name}.{role}" for role in own]
        for role in own:
            del group.factors[role]


def note_left_out(names: list[str]) -> list[Problem]:
    """Return a note on tensors that have no part in the merged weight; nothing for none."""
    if not names:
        return []
    listed = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    return [Problem("LF226", listed, "kept by the training run, left out", severity="note")]


def _compose_one(name: str, group: Group, left_out: list[str]) -> Group:
    factors, kinds = dict(group.factors), set(group.kinds)
    copies = {role: factors.pop(role) for role in list(factors) if role.startswith("modules_to_save.")}
    for role, factor in copies.items():
        plain = role.rpartition(".")[2]
        if plain in factors:
            left_out.append(f"{name}.{role}")
        else:
            factors[plain] = factor
            kinds.add(REPLACE)
    changes = kinds - _OF_THE_BASE
    if not changes:
        own = {whole: plain for plain, whole in _OWN.items()}
        return Group({own.get(role, role): factor for role, factor in factors.items()}, {REPLACE})
    # Beside factors, a weight or a bias is the base's own, as it was saved or trained.
    twice = [role for role, whole in _OWN.items() if role in factors and whole in factors]
    if twice:
        return Group(factors, kinds)
    return Group({_OWN.get(role, role): factor for role, factor in factors.items()}, changes)
