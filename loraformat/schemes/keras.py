"""KerasHub's `.lora.h5`: `lora/<number>/vars/lora_kernel_a`, the number being a layer's place among those with weights.

Which layer that is follows from the family of the base and is held here as a table; the base must be given. A kernel of
queries, keys or values has an axis for the heads, in Gemma before that of the inputs: A is `(hidden, heads, rank)` or
`(heads, hidden, rank)`, B `(rank, head_dim)` for all heads alike, which as a matrix is one block for every head. Of the
output A is `(heads, head_dim, rank)`. Scale: 1, since a backbone's `enable_lora` takes the rank as alpha. Source:
keras-hub 0.32, models/backbone.py and utils/transformers/convert_*.py; keras 3.15, layers/core/einsum_dense.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from loraformat.adapter import Adapter, Factor, SlotKind
from loraformat.base_facts import BaseFacts
from loraformat.derived import derive
from loraformat.errors import refuse
from loraformat.operations import BlockDiagonal, Reshape, Transpose
from loraformat.schemes import DECODERS, Bundle, Holds, StatedScale
from loraformat.schemes._engine import TableReader
from loraformat.schemes._marks import Marks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._one_scale import Folded
from loraformat.schemes._table import NameTable, Row

_KEY: Final = re.compile(r"lora/(?P<number>\d{1,6})/vars/lora_kernel_(?P<letter>[ab])")
_RANK: Final = "lora/vars/rank"
_MODULES: Final = {
    **{role: f"self_attn.{role}_proj" for role in "qkvo"},
    **{role: f"mlp.{role}_proj" for role in ("gate", "up", "down")},
}


@dataclass(frozen=True, slots=True)
class _Family:
    """How KerasHub lays out a decoder.

    Attributes:
        period: layers with weights in a block.
        places: role to its place, in the first block.
        heads_first: whether kernels have the heads before the inputs.
    """

    period: int
    places: Mapping[str, int]
    heads_first: bool = False


def _places(down: int, one: str, other: str, attention: Sequence[int]) -> dict[str, int]:
    return {"down": down, one: down + 1, other: down + 2} | dict(zip("ovkq", attention, strict=True))


_LLAMA: Final = _Family(11, _places(3, "gate", "up", (8, 9, 10, 11)))
_FAMILIES: Final[Mapping[str, _Family]] = {
    "gemma": _Family(11, _places(2, "up", "gate", (7, 8, 9, 10)), heads_first=True),
    "gemma2": _Family(13, _places(2, "up", "gate", (8, 9, 10, 11)), heads_first=True),
    "gemma3_text": _Family(15, _places(2, "up", "gate", (8, 11, 12, 13)), heads_first=True),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _Family(13, _places(3, "gate", "up", (8, 9, 11, 13))),
}
"""What transformers calls a family, and its layout; a block's first layer with weights has the number 1."""


class _Keras(TableReader):
    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter, its layers named; raises LF311 without a base, LF646 for one of another family."""
        family = _find_family(bundle)
        tensors: dict[str, Factor] = {}
        for key, factor in bundle.tensors.items():
            match = _KEY.fullmatch(key)
            if key == _RANK or (match is not None and match["letter"] == "b"):
                continue
            other = bundle.tensors.get(f"{key.removesuffix('a')}b")
            if match is None or other is None:
                raise refuse(
                    "LF202", f"{bundle.path}: {key}", f"a tensor of shape {factor.shape}", "a and b of a layer"
                )
            role, module = _name_layer(int(match["number"]), family, bundle)
            down, up = _make_matrices(role, module, factor, other, family, bundle.facts)
            tensors |= {f"{module}.lora_A": down, f"{module}.lora_B": up}
        adapter = super().read(replace(bundle, tensors=tensors), _state_multiplier(bundle, stated))
        rank = [bundle.tensors[_RANK]] if _RANK in bundle.tensors else []
        return replace(adapter, absorbed=(*adapter.absorbed, *rank))


def _state_multiplier(bundle: Bundle, stated: StatedScale) -> StatedScale:
    """Return an alpha as the multiplier that it is: it is over the rank of the file, not over that of a matrix."""
    if stated.alpha is None:
        return stated
    rank = next((factor.shape[0] for key, factor in bundle.tensors.items() if key.endswith("_b") and factor.shape), 1)
    return StatedScale(multiplier=stated.alpha / max(rank, 1))


def _find_family(bundle: Bundle) -> _Family:
    facts = bundle.facts
    needed = ("heads", "kv_heads", "head_dim", "hidden")
    if not facts.architecture or any(facts.count(name) is None for name in needed):
        expected = "the base that it was trained on, with its config.json: its family and its heads"
        raise refuse("LF311", bundle.path, "layers by number, without names", expected)
    family = _FAMILIES.get(facts.architecture)
    if family is None:
        raise refuse("LF646", bundle.path, f"the family {facts.architecture!r:.60}", f"one of {', '.join(_FAMILIES)}")
    return family


def _name_layer(number: int, family: _Family, bundle: Bundle) -> tuple[str, str]:
    """Return the role of a layer in its block, and its module."""
    first = min(family.places.values())
    block = (number - first) // family.period
    role = next((role for role, place in family.places.items() if number - block * family.period == place), None)
    layers = bundle.facts.count("layers")
    if role is None or block < 0 or (layers is not None and block >= layers):
        found = f"layer {number}, where a {bundle.facts.architecture} of KerasHub has no matrix"
        raise refuse("LF646", bundle.path, found, "layers of the base that is given")
    return role, f"model.layers.{block}.{_MODULES[role]}"


def _make_matrices(
    role: str, module: str, down: Factor, up: Factor, family: _Family, facts: BaseFacts
) -> tuple[Factor, Factor]:
    """Return A `(rank, in)` and B `(out, rank)`; raises LF203 where the kernel is not that of the base."""
    counted = "kv_heads" if role in ("k", "v") else "heads"
    heads, size, hidden = (facts.counts[name] for name in (counted, "head_dim", "hidden"))
    rank = up.shape[0] if len(up.shape) == 2 else 0
    expected: tuple[tuple[int, ...], tuple[int, ...]] = ((*down.shape[:1], rank), up.shape)
    if role in ("q", "k", "v"):
        expected = ((heads, hidden, rank) if family.heads_first else (hidden, heads, rank), (rank, size))
    elif role == "o":
        expected = ((heads, size, rank), (rank, hidden))
    if not rank or (down.shape, up.shape) != expected or len(up.shape) != 2:
        found = f"{module} with a {down.shape} and b {up.shape}"
        raise refuse("LF203", module, found, f"{expected[0]} and {expected[1]}, as the base that is given has it")
    turned = derive(Transpose(), up)
    if role in ("q", "k", "v"):
        apart = derive(Transpose((0, 2, 1) if family.heads_first else (1, 2, 0)), down)
        return derive(Reshape((heads * rank, hidden)), apart), derive(BlockDiagonal(), *[turned] * heads)
    flat = derive(Reshape((heads * size, rank)), down) if role == "o" else down
    return derive(Transpose(), flat), turned


SCHEME: Final = _Keras(
    name="keras",
    title="KerasHub: a .lora.h5 of numbered layers",
    rows=NameTable([Row("lora_A", "lora", "lora_A.weight"), Row("lora_B", "lora", "lora_B.weight")]),
    naming=PlainNaming(),
    scale=Folded(),
    holds=Holds(
        kinds=frozenset({"lora"}),
        slots=frozenset({SlotKind.LINEAR}),
        scale="not stored",
        needs="the family and the counts of heads",
        models=DECODERS,
    ),
    marks=Marks(keys=(_KEY.pattern,), neutral=(_RANK,)),
    names="peft",
)
