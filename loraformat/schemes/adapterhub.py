"""AdapterHub's `adapters`: `<module>.loras.<name>.lora_A` beside an `adapter_config.json` of its own form.

Scale: alpha / r of that configuration. Of a fused query, key and value, as GPT-2 has it, `attn_matrices` says which
parts have factors, one part below the other. (IA)³ has the same names and B alone, of which `composition_mode` tells;
it multiplies outputs, and with them the bias, as the library's layer does (its own merge leaves the bias). Source:
adapter-hub/adapters 1.3, methods/lora.py, configuration.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from loraformat.adapter import Adapter, Factor, ScalingRule, SlotKind, Target
from loraformat.errors import error_for, refuse
from loraformat.schemes import Bundle, Holds, Layout, StatedScale
from loraformat.schemes._engine import TableReader
from loraformat.schemes._grouped import Groups, place_rows
from loraformat.schemes._marks import Marks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._one_scale import ConfigScale, Folded, inner
from loraformat.schemes._several import keep_chosen, refuse_several
from loraformat.schemes._table import NameTable, Row

_NAMED: Final = re.compile(r"\.loras\.([^.]+)\.")
_DOWN: Final = re.compile(r"(?P<module>.+)(?P<name>\.loras\.[^.]+)\.lora_A")
_PARTS: Final = "qkv"
_TITLE: Final = "AdapterHub: LoRA and (IA)³ of the adapters library"
_HOLDS: Final = Holds(kinds=frozenset({"lora", "dora", "ia3"}), slots=frozenset({SlotKind.LINEAR}), scale="one for all")
_MARKS: Final = Marks(keys=(r".+\.loras\.[^.]+\.(?:lora_[AB]|m\.weight|gate\.)",))


class _AdapterHub(TableReader):
    layout = Layout(("adapter.safetensors", "pytorch_adapter.bin"), ("adapter_config.json",))

    def list_adapters(self, bundle: Bundle) -> list[str]:
        """Return the names that stand in the keys."""
        return sorted(set(_name_adapters(bundle).values()))

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; of several in a file the chosen one (LF238, LF242)."""
        chosen, notes = keep_chosen(bundle, _name_adapters(bundle))
        names = set(_name_adapters(chosen).values())
        if len(names) > 1:
            raise error_for([refuse_several(bundle, names)])
        adapter = _read_chosen(chosen, stated)
        return replace(adapter, problems=(*notes, *adapter.problems))


def _name_adapters(bundle: Bundle) -> dict[str, str]:
    matches = {key: _NAMED.search(key) for key in bundle.tensors}
    return {key: match[1] for key, match in matches.items() if match is not None}


def _read_chosen(bundle: Bundle, stated: StatedScale) -> Adapter:
    config = bundle.config or {}
    mode = inner(config, "config", "composition_mode")
    if mode == "scale":
        alpha = inner(config, "config", "alpha")
        if alpha not in (None, 1):
            mend = "Multiply every lora_B by alpha, and set alpha to 1."
            raise refuse(
                "LF209", bundle.path, f"(IA)³ with alpha {alpha!r:.40}", "alpha 1, as its authors have it", mend
            )
        return _SCALING.read(bundle, stated)
    if mode not in (None, "add"):
        raise refuse("LF209", bundle.path, f"the composition mode {mode!r:.40}", "add, which is LoRA, or scale, (IA)³")
    tensors, counts = _place_parts(bundle)
    adapter = TableReader.read(SCHEME, replace(bundle, tensors=tensors), stated)
    return replace(adapter, targets=tuple(_widen(target, counts.get(target.name, 1)) for target in adapter.targets))


def _place_parts(bundle: Bundle) -> tuple[Mapping[str, Factor], Mapping[str, int]]:
    """Return the tensors with B of fused weights on a diagonal, and how many parts these weights have factors of."""
    named = inner(bundle.config or {}, "config", "attn_matrices")
    present = tuple(index for index, part in enumerate(_PARTS) if isinstance(named, list | tuple) and part in named)
    tensors, counts = dict(bundle.tensors), {}
    for key, down in bundle.tensors.items():
        match = _DOWN.fullmatch(key)
        up = bundle.tensors.get(f"{key.removesuffix('A')}B")
        if match is None or up is None or len(down.shape) != 2 or len(up.shape) != 2 or len(present) < 2:
            continue
        if down.shape[0] == len(present) * up.shape[1] and not up.shape[0] % len(present):
            rows = up.shape[0] // len(present)
            tensors[f"{key.removesuffix('A')}B"] = place_rows(up, Groups((rows,) * len(_PARTS), present))
            counts[match["module"]] = len(present)
    return tensors, counts


def _widen(target: Target, parts: int) -> Target:
    """Return the target with the scale of one part: alpha is over its rank, not over the sum."""
    if target.scaling.rule is not ScalingRule.ALPHA_OVER_RANK:
        return target
    return replace(target, scaling=replace(target.scaling, value=target.scaling.value * parts))


SCHEME: Final = _AdapterHub(
    name="adapterhub",
    title=_TITLE,
    rows=NameTable(
        [
            Row("loras.{adapter}.lora_A", "lora", "lora_A.weight"),
            Row("loras.{adapter}.lora_B", "lora", "lora_B.weight"),
            Row("loras.{adapter}.m.weight", "dora", "lora_magnitude_vector"),
            Row("loras.{adapter}.gate.weight", "gated lora", "gate.weight"),
            Row("loras.{adapter}.gate.bias", "gated lora", "gate.bias"),
        ]
    ),
    naming=PlainNaming(),
    scale=ConfigScale(
        lambda config: inner(config, "config", "alpha"),
        ScalingRule.ALPHA_OVER_RANK,
        lambda targets, before: dict(before),
    ),
    holds=_HOLDS,
    marks=_MARKS,
    names="peft",
)
_SCALING: Final = TableReader(
    name=SCHEME.name,
    title=_TITLE,
    rows=NameTable([Row("loras.{adapter}.lora_B", "ia3", "ia3_l")]),
    naming=PlainNaming(),
    scale=Folded(),
    holds=_HOLDS,
    marks=_MARKS,
)
"""The same files where `composition_mode` is `scale`."""
