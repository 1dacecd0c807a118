"""Quantised weights of a state dict: which tensors make one, what they stand for, and what the model calls it.

Quantisers give a weight up to eight tensors, with names of their own. A `Recipe` is one way of doing that; the modules
`_recipes_*` have them. What is recognised has a `Coding`; what is not, or not sound, says so where it is adapted.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, TypeAlias

from loraformat.dtypes import BY_NAME, Dtype
from loraformat.encodings import Coding
from loraformat.problems import Problem
from loraformat.spans import StoredTensor
from loraformat.strict_json import JsonValue

QUANTISATION: Final = ("quantization_config", "quantization", "compression_config")
"""Members of `config.json` that say how a model is quantised; MLX has the second, old compressed-tensors the third."""

_FLOATS: Final = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of one weight.

    Attributes:
        stem: what their names have in common.
        codes: the codes, as they are stored.
        beside: the others, by what follows the stem.
        settings: what the configuration says about how the model is quantised.
    """

    stem: str
    codes: StoredTensor
    beside: Mapping[str, StoredTensor]
    settings: Mapping[str, JsonValue]

    def companions(self, roles: Mapping[str, str]) -> dict[str, StoredTensor]:
        """Return all tensors but the codes by their roles; those without a role of their own under their names."""
        return {roles.get(suffix, suffix.strip("._")): tensor for suffix, tensor in self.beside.items()}


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A quantised weight of a state dict.

    Attributes:
        name: what the weight is called in floats.
        tensor: its codes, in the shape that they stand for.
        coding: how they are read.
        turned: whether they are of the transpose of a Linear's `(out, in)`.
    """

    name: str
    tensor: StoredTensor
    coding: Coding
    turned: bool = False


Outcome: TypeAlias = CodedTensor | str
"""A weight, or words for what is odd about its tensors."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way of storing a quantised weight.

    Attributes:
        name: who does so, for messages.
        codes: ending of the codes' name.
        needs: endings of the names that must be beside it.
        takes: endings of the names that belong to it where they are.
        read: makes a weight of the tensors; None where they are another recipe's.
    """

    name: str
    codes: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    read: Callable[[Parts], Outcome | None]


@dataclass(frozen=True)  # No slots: what is found is kept.
class CodedState:
    """The quantised weights of a state dict.

    Attributes:
        tensors: all of its tensors, by name.
        config: its `config.json`, empty where there is none.
        recipes: the ways that are known, what is tried first first.
    """

    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, JsonValue]
    recipes: Sequence[Recipe]

    @cached_property
    def found(self) -> Mapping[str, CodedTensor | Problem]:
        """The weights by the names of their codes, or what stands against reading them (LF470)."""
        return {codes: outcome for codes, outcome, _ in self._recognised}

    @cached_property
    def owned(self) -> Mapping[str, str]:
        """Names of the tensors that mean nothing without codes, and the names of these."""
        return {name: codes for codes, _, names in self._recognised for name in names}

    @property
    def settings(self) -> Mapping[str, JsonValue]:
        """What the configuration says about how the model is quantised; empty where it says nothing."""
        inner = [part for part in self.config.values() if isinstance(part, Mapping)]
        stated = (place.get(name) for place in (self.config, *inner) for name in QUANTISATION)
        return next((each for each in stated if isinstance(each, Mapping)), {})

    @property
    def method(self) -> str:
        """What the configuration calls the way of quantising, for messages; empty where it says nothing."""
        named = self.settings.get("quant_method", self.settings.get("quant_algo"))
        return str(named) if named else ("an unnamed method" if self.settings else "")

    def float_form(self) -> Dtype:
        """Return the number form of the model's floats: what the configuration says, or what the other weights have."""
        inner = [part for part in self.config.values() if isinstance(part, Mapping)]
        stated = [place.get(name) for place in (self.config, *inner) for name in ("dtype", "torch_dtype")]
        known = next((str(each) for each in stated if each in _FLOATS), "")
        plain = (t.dtype.name for name, t in self.tensors.items() if name not in self.owned and t.dtype.name in _FLOATS)
        return BY_NAME[known or next(plain, _FLOATS[0])]

    @cached_property
    def _recognised(self) -> list[tuple[str, CodedTensor | Problem, tuple[str, ...]]]:
        settings = self.settings
        found = (self._recognise(name, settings) for name in self.tensors)
        return [each for each in found if each is not None]

    def _recognise(
        self, name: str, settings: Mapping[str, JsonValue]
    ) -> tuple[str, CodedTensor | Problem, tuple[str, ...]] | None:
        for recipe in self.recipes:
            stem = name.removesuffix(recipe.codes)
            if stem == name or any(stem + suffix not in self.tensors for suffix in recipe.needs):
                continue
            beside = {s: self.tensors[stem + s] for s in (*recipe.needs, *recipe.takes) if stem + s in self.tensors}
            read = recipe.read(Parts(stem, self.tensors[name], beside, settings))
            if read is None:
                continue
            odd = f"{recipe.name}: {read}"
            found = Problem("LF470", name, odd, "tensors that fit together") if isinstance(read, str) else read
            return name, found, tuple(tensor.name for tensor in beside.values())
        return None


def reform(tensor: StoredTensor, shape: tuple[int, ...], bits: int) -> StoredTensor | None:
    """Return codes as a tensor of the shape that they stand for; None where they are not so many."""
    if min(shape) <= 0 or not tensor.is_contiguous:
        return None
    form = BY_NAME[f"uint{bits}"]
    count = math.prod(shape)
    if count * bits % 8 or form.count_bytes(count) != tensor.span.length:
        return None
    return replace(tensor, dtype=form, shape=shape)


def count_groups(columns: int, scales: Sequence[int]) -> int:
    """Return how many columns share a scale, of `(rows, groups)` scales; 0 where that is no whole number."""
    groups = scales[1] if len(scales) > 1 else 1
    return columns // groups if groups and columns % groups == 0 else 0


def describe(tensors: Mapping[str, StoredTensor]) -> str:
    """Return forms and shapes of tensors, for messages."""
    return ", ".join(f"{name.lstrip('._')} {each.dtype.name} {list(each.shape)}" for name, each in tensors.items())


_SIGNS: Final = (
    ("HQQ", "W_q", "scale"),
    ("AQLM", "codebooks", "codes"),
    ("VPTQ", "centroids", "indices"),
    ("SpQR", "dense_weights", "row_offsets"),
    ("EXL2", "q_weight", "q_scale"),
    ("EXL3", "trellis", "svh"),
    ("Marlin", "B", "s"),
    ("QQQ", "B", "s_channel"),
    ("SVDQuant", "qweight", "wscales"),
    ("FP-Quant", "qweight", "forward_hadamard_matrix"),
    ("blocks of GGUF", "qweight", "qweight_type"),
    ("torchao", "_weight_qdata", "_weight_qdata"),
    ("Quanto's codes of few bits", "weight._data._data", "weight._scale"),
)
"""Quantisers whose codes are not read, and two tensors by which each is known, whatever the configuration says."""


def _list_signed(state: CodedState) -> Iterator[tuple[str, str]]:
    """Yield modules that have a quantiser's tensors, and its name."""
    for who, first, other in _SIGNS:
        for name in state.tensors:
            module = name.removesuffix(f".{first}")
            if module != name and name not in state.found and f"{module}.{other}" in state.tensors:
                yield module, who


def list_unknown(state: CodedState) -> Iterator[tuple[str, Problem]]:
    """Yield modules without a weight of their own, in a model that is quantised in a way that is not known."""
    signed = dict(_list_signed(state))
    for module, who in signed.items():
        held = [name for name in state.tensors if name.startswith(f"{module}.")]
        found = f"{state.method or who}, with the tensors {', '.join(held)[:120]}"
        yield module, Problem("LF470", module, found, "a form of quantisation that is known")
    if not state.settings:
        return
    known = {name.rpartition(".")[0] for name in (*state.found, *state.tensors) if name.endswith(".weight")}
    known |= {*signed, *(name.rpartition(".")[0] for name in (*state.found, *state.owned))}
    modules = dict.fromkeys(name.rpartition(".")[0] for name in state.tensors if not name.endswith(".bias"))
    for module in modules:
        if module and module not in known:
            held = [name for name in state.tensors if name.rpartition(".")[0] == module]
            found = f"{state.method}, with the tensors {', '.join(held)[:120]}"
            yield module, Problem("LF470", module, found, "a form of quantisation that is known")
