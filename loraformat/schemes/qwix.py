"""qwix, the LoRA of Tunix (JAX): `layers.0.attn.q_proj.w_lora_a`, with every axis of the weight that a module has.

A is stored `(in..., rank)` and B `(rank, out...)`: heads and the sizes of heads are axes of their own. A weight of
Gemma that is several in transformers has the parts on the first of its `out` axes. Files are trees of parameters
flattened with dots or slashes; what Tunix saves by itself is an orbax checkpoint. Tunix's models are transformers'
under slightly other names, which are read as transformers', as Tunix's own merge does. Scale: alpha / rank of the
provider, which is not in these files. Source: google/qwix 0.1, providers/lora.py; google/tunix 0.1,
models/safetensors_saver.py and models/gemma3/params.py.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from loraformat.adapter import Adapter, Factor, SlotKind
from loraformat.derived import derive
from loraformat.errors import refuse
from loraformat.operations import Reshape, Take
from loraformat.schemes import Bundle, Holds, StatedScale
from loraformat.schemes._engine import TableReader
from loraformat.schemes._marks import NOISE, Alias, Marks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._scales import StatedAlone
from loraformat.schemes._table import TRANSPOSED, NameTable, Row

_PAIR: Final = re.compile(r"(?P<module>.+[./])(?P<parameter>\w+_lora_)a(?P<rest>(?:[./]value)?)")
_FUSED: Final = re.compile(r"(?P<owner>.+[./])(?P<parts>kv|qkv)_einsum[./]")


class _Qwix(TableReader):
    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; parts of a fused weight are targets of their own, with one A."""
        tensors = dict(bundle.tensors)
        for key in bundle.tensors:
            match = _PAIR.fullmatch(key)
            other = f"{match['module']}{match['parameter']}b{match['rest']}" if match else ""
            if match is not None and other in tensors:
                tensors |= _flatten(match, tensors.pop(key), tensors.pop(other))
        return super().read(replace(bundle, tensors=tensors), stated)


def _flatten(match: re.Match[str], down: Factor, up: Factor) -> Mapping[str, Factor]:
    """Return A `(in, rank)` and B `(rank, out)` by name; raises LF203 where they are of several experts at once."""
    module, parameter = match["module"], match["parameter"]
    shapes = f"shapes {down.shape} and {up.shape}"
    if min(len(down.shape), len(up.shape)) < 2 or (len(down.shape) > 2 < len(up.shape)):
        raise refuse("LF203", module.rstrip("./"), shapes, "(in..., rank) and (rank, out...), of one weight")
    flat = down if len(down.shape) == 2 else derive(Reshape((math.prod(down.shape[:-1]), down.shape[-1])), down)
    fused = _FUSED.fullmatch(module)
    if fused is None:
        return {f"{module}{parameter}a": flat, f"{module}{parameter}b": _join_axes(up)}
    if len(up.shape) != 4 or up.shape[1] != len(fused["parts"]):
        raise refuse("LF203", module.rstrip("./"), shapes, f"B (rank, {len(fused['parts'])}, heads, head_dim)")
    named = {letter: f"{fused['owner']}{letter}_einsum.{parameter}" for letter in fused["parts"]}
    parts = {letter: derive(Take(index, index + 1, axis=1), up) for index, letter in enumerate(fused["parts"])}
    ups = {f"{name}b": _join_axes(parts[letter]) for letter, name in named.items()}
    return {f"{name}a": flat for name in named.values()} | ups


def _join_axes(up: Factor) -> Factor:
    return up if len(up.shape) == 2 else derive(Reshape((up.shape[0], math.prod(up.shape[1:]))), up)


SCHEME: Final = _Qwix(
    name="qwix",
    title="qwix, Tunix (JAX): w_lora_a and kernel_lora_a, without a scale",
    rows=NameTable(
        [
            Row("{adapter}_lora_a", "lora", "lora_A.weight", TRANSPOSED),
            Row("{adapter}_lora_b", "lora", "lora_B.weight", TRANSPOSED),
        ]
    ),
    naming=PlainNaming(),
    scale=StatedAlone(),
    holds=Holds(kinds=frozenset({"lora"}), slots=frozenset({SlotKind.LINEAR}), scale="not stored"),
    marks=Marks(keys=(r".+[./]\w+_lora_[ab](?:[./]value)?$",)),
    aliases=(
        Alias(r"/", "."),
        Alias(r"\.value$", ""),
        Alias(r"^params\.", ""),
        *NOISE,
        Alias(r"^layers\.(\d+)\.attn\.", r"model.layers.\1.self_attn."),
        Alias(r"^layers\.(\d+)\.mlp\.", r"model.layers.\1.mlp."),
        Alias(r"\.self_attn\.([qkv])_einsum\.", r".self_attn.\1_proj."),
        Alias(r"\.self_attn\.attn_vec_einsum\.", r".self_attn.o_proj."),
    ),
)
