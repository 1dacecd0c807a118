"""The tensors of one module in a PEFT file, and what they are together."""

import re
from collections.abc import Mapping
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

_OWN: Final = {"weight": "base_layer.weight", "bias": "base_layer.bias"}
_ORIGINAL: Final = ".original_module"
_BUFFERS: Final = re.compile(r"\.lora_(?:velora|monteclora)_\w+(?:\.|$)")
"""VeLoRA's and MonteCLoRA's tensors of the training run; the merged weight is that of plain LoRA."""
_LISTED: Final = 4


@dataclass(frozen=True, slots=True)
class Group:
    """The tensors of one target, and the kinds that they speak for."""

    factors: dict[str, Factor]
    kinds: set[str]


def is_buffer(key: str) -> bool:
    """Say whether a tensor belongs to the training run alone."""
    return _BUFFERS.search(key) is not None


def compose(groups: Mapping[str, Group]) -> tuple[dict[str, Group], list[Problem]]:
    """Return the groups with each tensor in the role that it has beside the others, and notes on what is left out."""
    left_out: list[str] = []
    composed: dict[str, Group] = {}
    for name, group in groups.items():
        owner = groups.get(name.removesuffix(_ORIGINAL))
        if name.endswith(_ORIGINAL) and owner is not None and owner.kinds & {REPLACE, COPY}:
            left_out.append(name)
        else:
            composed[name] = _compose_one(name, group, left_out)
    return composed, note_left_out(left_out)


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
    changes = kinds - {BASE, REPLACE, COPY}
    if not changes:
        own = {whole: plain for plain, whole in _OWN.items()}
        return Group({own.get(role, role): factor for role, factor in factors.items()}, {REPLACE})
    # Beside factors, a weight or a bias is the base's own, as it was saved or trained.
    twice = [role for role, whole in _OWN.items() if role in factors and whole in factors]
    if twice:
        return Group(factors, kinds)
    return Group({_OWN.get(role, role): factor for role, factor in factors.items()}, changes)
