"""Tinker (Thinking Machines): PEFT's file names and keys, but for the head and for experts, which are one tensor.

`experts.w1` has A `(experts, rank, in)` and B `(experts, out, rank)`, either of which may be one for all experts; w1,
w2, w3 are gate, down, up. The head is `model.unembed_tokens`. Source: tinker-cookbook 0.6, weights/_adapter.py.
"""

import re
from dataclasses import replace
from typing import Final

from loraformat.adapter import Adapter, Factor, ScalingRule, SlotKind
from loraformat.derived import LastRead
from loraformat.errors import refuse
from loraformat.schemes import DECODERS, Bundle, Holds, StatedScale
from loraformat.schemes._engine import TableReader
from loraformat.schemes._experts import take_expert
from loraformat.schemes._marks import NOISE, Alias, Marks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._one_scale import ConfigScale
from loraformat.schemes._table import NameTable, Row

_EXPERTS: Final = re.compile(r"(.+\.experts)\.(w[123])\.lora_A\.weight")
_PROJECTIONS: Final = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_OWN: Final = re.compile(r".+\.(?:experts\.w[123]|unembed_tokens)\.lora_[AB]\.weight$")


def _has_own_names(bundle: Bundle) -> bool:
    return any(map(_OWN.match, bundle.tensors))


class _Tinker(TableReader):
    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; every expert is a target of its own."""
        tensors = dict(bundle.tensors)
        for key in bundle.tensors:
            match = _EXPERTS.fullmatch(key)
            if match is not None and f"{match[1]}.{match[2]}.lora_B.weight" in tensors:
                down, up = tensors.pop(key), tensors.pop(f"{match[1]}.{match[2]}.lora_B.weight")
                tensors |= _part_experts(match[1], _PROJECTIONS[match[2]], down, up)
        return super().read(replace(bundle, tensors=tensors), stated)


def _part_experts(module: str, projection: str, down: Factor, up: Factor) -> dict[str, Factor]:
    """Return the factors of every expert; a factor that all share is one of each."""
    counts = {factor.shape[0] for factor in (down, up)} - {1}
    if len(down.shape) != 3 or len(up.shape) != 3 or len(counts) > 1:
        found = f"shapes {down.shape} and {up.shape}"
        raise refuse("LF203", f"{module}.{projection}", found, "(experts, rank, in) and (experts, out, rank)")
    last = LastRead()
    return {
        f"{module}.{expert}.{projection}.lora_{letter}.weight": take_expert(factor, expert, last)
        for expert in range(max(counts, default=1))
        for letter, factor in (("A", down), ("B", up))
    }


SCHEME: Final = _Tinker(
    name="tinker",
    title="Tinker: PEFT's files, with experts in one tensor",
    rows=NameTable([Row("lora_A.weight", "lora", "lora_A.weight"), Row("lora_B.weight", "lora", "lora_B.weight")]),
    naming=PlainNaming("base_model.model."),
    scale=ConfigScale(
        lambda config: config.get("lora_alpha"), ScalingRule.ALPHA_OVER_RANK, lambda targets, before: dict(before)
    ),
    holds=Holds(kinds=frozenset({"lora"}), slots=frozenset({SlotKind.LINEAR}), scale="one for all", models=DECODERS),
    marks=Marks(keys=(r"base_model\.model\..+\.lora_[AB]\.weight$",), asks=(_has_own_names,)),
    names="peft",
    aliases=(*NOISE, Alias(r"^(base_model\.model\.)(?:model\.)?unembed_tokens\.", r"\1lm_head.")),
)
