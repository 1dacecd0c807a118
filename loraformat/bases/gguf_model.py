"""A GGUF model of llama.cpp as a base: weights of float32, float16, bfloat16 and Q8_0 are merged in place.

Those of fewer bits are decoded, and stand in float16 where the merge is told so (`--on-quantized dequantize`).

Modules are known by llama.cpp's names and, by the tables of `spec/names/`, by transformers'. Where the architecture has
interleaved rotary rows, q and k of a PEFT adapter are applied to the rows that they are of. The output is the same file
with spans rewritten, and the receipt in a file beside it.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from loraformat.adapter import SlotKind
from loraformat.bases import TENSOR_NAME, BaseModel, FloatForm, Rewriter, Site, Weight, WeightFloats
from loraformat.bases._single_file import SingleFile
from loraformat.containers import TensorFile
from loraformat.containers.gguf import CONTAINER, describe_retyped
from loraformat.dtypes import BY_NAME, BlockDtype, Dtype
from loraformat.encodings import Coding
from loraformat.images import FileImage, NewOutput
from loraformat.limits import MAX_EXPERTS
from loraformat.problems import Problem
from loraformat.row_orders import Permute
from loraformat.spans import Part, StoredTensor
from loraformat.spellings import Order, Place, SpellingTable, all_tables
from loraformat.strict_json import JsonValue

_ARCHITECTURE: Final = "general.architecture"
_SPELLINGS: Final = ("transformers", "transformers-5")
_OWN: Final = "gguf"
_INTERLEAVED: Final = "rotary-interleaved"
_HEADS: Final = {"heads": "attention.head_count", "kv_heads": "attention.head_count_kv"}
_MATRIX: Final = {SlotKind.LINEAR: False, SlotKind.LINEAR_TRANSPOSED: False, SlotKind.EMBEDDING: True}
_ENCODINGS: Final = {"q8_0": "ggml_q8_0"} | dict.fromkeys(
    (
        *("q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
        *("iq4_nl", "iq4_xs", "mxfp4", "tq2_0"),
    ),
    "ggml_blocks",
)
"""Forms of blocks, and what reads them."""
_FLOATS: Final = BY_NAME["float16"]
"""What stands in the place of codes: llama.cpp's own choice for models that are not quantised."""
_EXPERTS_DIMS: Final = 3
_MEND: Final = "Merge into the model that it was quantised from (F16, BF16 or Q8_0), and quantise the merged one."


class GgufModel(SingleFile):
    """An opened model; the attributes are those of `BaseModel`."""

    format = "gguf"
    suffix = ".gguf"

    def __init__(self, path: Path) -> None:
        super().__init__(path, CONTAINER.open(path))
        self._floats: Mapping[str, Dtype] = {}
        self.sites: Sequence[Site] = list(_list_sites(self._opened))

    @property
    def rewriter(self) -> Rewriter | None:
        """Nothing: only copies are written, some of their tensors in floats."""
        return None

    def find_float_form(self, wanted: WeightFloats) -> FloatForm | Problem:
        """Return how a quantised tensor stands in floats."""
        return FloatForm(wanted.name, _FLOATS, self._opened.tensors[wanted.name].shape, False, 0)

    def list_joint_floats(self, keys: Set[str]) -> Sequence[Weight | Problem]:
        """Return nothing: each tensor says of itself what it is."""
        return ()

    def tell_floats(self) -> Mapping[str, JsonValue]:
        """Return nothing: there is no configuration."""
        return {}

    def with_floats(self, floats: Sequence[WeightFloats]) -> "GgufModel":
        """Return the model, whose outputs have these tensors in floats."""
        changed = copy.copy(self)
        changed._floats = {each.name: _FLOATS for each in floats}
        return changed

    def describe_images(self, output: NewOutput) -> list[FileImage]:
        """Return the file, with room for the tensors in floats, and last the receipt beside it."""
        whole, *others = super().describe_images(output)
        if not self._floats:
            return [whole, *others]
        return [FileImage(output.path, list(describe_retyped(self._opened.file, self._floats))), *others]


def _list_sites(opened: TensorFile) -> Iterator[Site]:
    """Yield a site for each name of each matrix, and of each expert of a stack."""
    architecture = _read(opened.metadata, _ARCHITECTURE)
    tables = [table for table in all_tables() if architecture in table.architectures.values()]
    counts = {name: _read(opened.metadata, f"{architecture}.{key}") for name, key in _HEADS.items()}
    for tensor in opened.tensors.values():
        module, _, parameter = tensor.name.rpartition(".")
        if parameter != "weight" or len(tensor.shape) not in (2, _EXPERTS_DIMS) or not tensor.elements:
            continue
        for name, part in _list_parts(tensor, module):
            site = _make_site(tensor, name, part)
            yield site
            for table in tables:
                yield from _name_again(site, table, counts)


def _list_parts(tensor: StoredTensor, module: str) -> Iterator[tuple[str, Part | None]]:
    if len(tensor.shape) != _EXPERTS_DIMS:
        yield module, None
        return
    experts, rows, columns = tensor.shape
    for expert in range(min(experts, MAX_EXPERTS)):
        lines = (expert * rows, (expert + 1) * rows, 1)
        yield f"{module}.{expert}", Part((experts * rows, columns), lines, (0, columns, 1))


def _make_site(tensor: StoredTensor, name: str, part: Part | None) -> Site:
    """Return the site under llama.cpp's own name."""
    obstacle, coding = None, None
    if isinstance(tensor.dtype, BlockDtype):
        coding = _find_coding(tensor, tensor.dtype)
        if coding is None:
            found = f"numbers stored as {tensor.dtype.name}"
            expected = f"float32, float16, bfloat16 or one of {', '.join(_ENCODINGS)}"
            obstacle = Problem("LF403", name, found, expected, _MEND)
    weight = Weight(tensor.name, tensor.name, tensor, frozenset({tensor.name}), coding)
    held = None if obstacle is not None else weight
    return Site(tensor.name, name, TENSOR_NAME, _MATRIX, held, obstacle=obstacle, part=part)


def _find_coding(tensor: StoredTensor, form: BlockDtype) -> Coding | None:
    """Return how a quantised tensor is read; None for a form that is not."""
    encoding, columns = _ENCODINGS.get(form.name), tensor.shape[-1]
    if encoding is None:
        return None
    return Coding(encoding, (tensor.elements // columns, columns), (1, form.block_elements), {})


def _name_again(site: Site, table: SpellingTable, counts: Mapping[str, Any]) -> Iterator[Site]:
    """Yield the site under the names that transformers has for it, its rows in their order."""
    for place in table.find(site.module, _OWN):
        for spelling in _SPELLINGS:
            module = _spell(place, spelling)
            if module is not None and module != site.module:
                order = place.row.order(_OWN, place.part)
                yield _order(replace(site, module=module), order, counts)


def _spell(place: Place, spelling: str) -> str | None:
    """Return the module's path in another spelling; None where that has it fused, or in parts."""
    if len(place.row.paths.get(spelling, ())) != len(place.row.paths[_OWN]):
        return None
    return place.write(spelling)[place.part]


def _order(site: Site, order: Order | None, counts: Mapping[str, Any]) -> Site:
    if order is None or site.weight is None:
        return site
    rows, heads = site.stored_shape()[0], counts.get(order.heads)
    heads = counts.get("heads") if heads is None else heads  # Without a count of its own, all heads have keys.
    if order.rule != _INTERLEAVED or not isinstance(heads, int) or heads <= 0 or rows % (2 * heads):
        found = f"rows in the order {order.rule!r}, {heads!r} heads"
        return replace(site, weight=None, obstacle=Problem("LF403", site.module, found, "heads that divide the rows"))
    places = Permute((heads, 2, rows // heads // 2), (0, 2, 1), 0).apply([np.arange(rows)])
    return replace(site, row_order=tuple(places.tolist()))


def _read(metadata: Mapping[str, str], key: str) -> Any:
    return json.loads(metadata[key]) if key in metadata else None


def _is_adapter(opened: TensorFile) -> bool:
    named = opened.metadata.get("general.type") == '"adapter"'
    return named or any(name.endswith(".lora_a") for name in opened.tensors)


class GgufFormat:
    """The base format `gguf`."""

    name = "gguf"
    suffixes = (".gguf",)

    def accepts(self, path: Path, head: bytes, size_bytes: int) -> bool:
        """Recognise a GGUF file that does not say that it is an adapter."""
        return CONTAINER.sniff(head, size_bytes) and not _is_adapter(CONTAINER.open(path))

    def open(self, path: Path) -> BaseModel:
        """Index the model."""
        return GgufModel(path)


BASE: Final = GgufFormat()
