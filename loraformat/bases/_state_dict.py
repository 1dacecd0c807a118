"""Sites of a PyTorch state dict, in however many files it lies.

A state dict does not say which module applies a weight, only its name and shape: a matrix may be a Linear, a Conv1D or
an embedding table, and the adapter's target says which it expects.
"""

import hashlib
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from loraformat.adapter import SlotKind
from loraformat.bases import TENSOR_NAME, FreeBias, Site, Weight
from loraformat.bases._aliases import Group, group_aliases
from loraformat.bases._coded_state import CodedState, CodedTensor, list_unknown
from loraformat.bases._other_sites import list_other_sites
from loraformat.bases._recipes_floats import RECIPES as FLOATS
from loraformat.bases._recipes_packed import RECIPES as PACKED
from loraformat.bases._renamed_sites import list_renamed_sites
from loraformat.bases._tied_tables import grows, read_tie, tie_sites
from loraformat.problems import Problem
from loraformat.spans import StoredTensor, read_small
from loraformat.strict_json import JsonValue, parse_json_object, write_canonical

CONFIG_NAME: Final = "config.json"

_WEIGHT: Final = "weight"
_BIAS: Final = "bias"

_CONV1D_FAMILIES: Final = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
"""`model_type`s of transformers whose blocks store matrices `(in, out)` (`transformers.pytorch_utils.Conv1D`)."""

_CONV1D_MODULES: Final = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})

_TIED_MODULES: Final = frozenset(
    {"lm_head", "embed_tokens", "wte", "word_embeddings", "embed_in", "embed_out", "shared"}
)
"""Last parts of the names of modules that `tie_word_embeddings` ties together."""

_MATRIX_AXES: Final = 2
_MATRIX: Final[Mapping[SlotKind, bool]] = {
    SlotKind.LINEAR: False,
    SlotKind.LINEAR_TRANSPOSED: True,
    SlotKind.EMBEDDING: True,
    SlotKind.PARAMETER: False,
}
_CONV1D: Final[Mapping[SlotKind, bool]] = {
    SlotKind.LINEAR: True,
    SlotKind.LINEAR_TRANSPOSED: True,
    SlotKind.PARAMETER: False,
}
_CONV: Final[Mapping[SlotKind, bool]] = {SlotKind.CONV: False, SlotKind.PARAMETER: False}
_VECTOR: Final[Mapping[SlotKind, bool]] = {SlotKind.PARAMETER: False}


def list_sites(tensors: Collection[StoredTensor], config: Mapping[str, JsonValue]) -> list[Site]:
    """Return the sites of a state dict.

    Tensors that are one and the same (tied in torch) are sites of one weight; those that overlap otherwise are
    consumers of one another.

    Args:
        tensors: its tensors.
        config: transformers' `config.json` beside it, empty where there is none.
    """
    coded = read_codes(tensors, config)
    plain = [tensor for tensor in tensors if tensor.name not in coded.owned and tensor.name not in coded.found]
    adaptable = [tensor for tensor in plain if _is_adaptable(tensor)]
    names = {tensor.name for tensor in adaptable}
    weights = {tensor.name: weight for group in group_aliases(tensors) for tensor, weight in _share(group)}
    own = [_make_site(tensor, weights.get(tensor.name), config, names) for tensor in adaptable]
    own += [_make_coded_site(name, each, weights.get(name), names) for name, each in coded.found.items()]
    own += [Site(module, module, TENSOR_NAME, _MATRIX, None, obstacle=why) for module, why in list_unknown(coded)]
    own = tie_sites(own, config)
    # A parameter of the model itself is a site only under a name that says of which module it is, or its whole one.
    bare = [_make_site(tensor, weights.get(tensor.name), config, names) for tensor in tensors if _is_bare(tensor)]
    own += list_renamed_sites([*own, *bare], config)
    return own + list_other_sites(own, bare, config)


def read_codes(tensors: Iterable[StoredTensor], config: Mapping[str, JsonValue]) -> CodedState:
    """Return the quantised weights of a state dict."""
    return CodedState({tensor.name: tensor for tensor in tensors}, config, (*PACKED, *FLOATS))


def is_conv1d(module: str, config: Mapping[str, JsonValue]) -> bool:
    """Say whether a module's weight is `(in, out)` in floats."""
    family = config.get("model_type")
    return isinstance(family, str) and family in _CONV1D_FAMILIES and module.rsplit(".", 1)[-1] in _CONV1D_MODULES


def is_tied(config: Mapping[str, JsonValue]) -> bool:
    """Say whether the configuration ties the output layer to the embedding; an inner one's word counts first."""
    return read_tie(config) is True


def is_tied_module(name: str) -> bool:
    """Say whether a parameter called `name` belongs to a module that `tie_word_embeddings` ties to another."""
    return name.rpartition(".")[0].rsplit(".", 1)[-1] in _TIED_MODULES


def _share(group: Group) -> list[tuple[StoredTensor, Weight]]:
    """Return each tensor of a group with the one weight that they are."""
    names = [tensor.name for tensor in group.tensors]
    consumers = frozenset({*names, *group.overlapping})
    return [(tensor, Weight(names[0], tensor.name, group.first, consumers)) for tensor in group.tensors]


def _is_adaptable(tensor: StoredTensor) -> bool:
    return "." in tensor.name and _has_numbers(tensor)


def _is_bare(tensor: StoredTensor) -> bool:
    return "." not in tensor.name and _has_numbers(tensor)


def _has_numbers(tensor: StoredTensor) -> bool:
    return 1 <= len(tensor.shape) <= 5 and tensor.elements > 0


def _make_site(
    tensor: StoredTensor, weight: Weight | None, config: Mapping[str, JsonValue], names: Container[str]
) -> Site:
    module, _, parameter = tensor.name.rpartition(".")
    obstacle, bias = _find_obstacle(tensor, module), f"{module}.{_BIAS}"
    return Site(
        id=tensor.name,
        module=module,
        evidence=TENSOR_NAME,
        transposed=_orient(module, tensor, config) if parameter == _WEIGHT else _VECTOR,
        parameter=parameter,
        weight=None if obstacle else weight,
        obstacle=obstacle,
        grows=grows(module),
        widens=parameter == _WEIGHT and len(tensor.shape) == _MATRIX_AXES and _is_alone(weight),
        free_bias=FreeBias(bias, tensor.dtype)
        if parameter == _WEIGHT and len(tensor.shape) > 1 and bias not in names
        else None,
    )


def _is_alone(weight: Weight | None) -> bool:
    return weight is not None and len(weight.consumers) == 1


def _make_coded_site(name: str, coded: CodedTensor | Problem, weight: Weight | None, names: Container[str]) -> Site:
    """Return the site of a quantised weight; one that cannot be read says why."""
    if isinstance(coded, Problem):
        module = name.rpartition(".")[0]
        return Site(name, module, TENSOR_NAME, _MATRIX, None, obstacle=replace(coded, where=module))
    module, _, parameter = coded.name.rpartition(".")
    assert weight is not None, "it has numbers"
    bias, turned = f"{module}.{_BIAS}", _CONV1D if coded.turned else _MATRIX
    return Site(
        id=name,
        module=module,
        evidence=TENSOR_NAME,
        transposed=turned if parameter == _WEIGHT else _VECTOR,
        parameter=parameter,
        weight=replace(weight, tensor=coded.tensor, coding=coded.coding),
        free_bias=FreeBias(bias, coded.tensor.dtype) if parameter == _WEIGHT and bias not in names else None,
    )


def _find_obstacle(tensor: StoredTensor, module: str) -> Problem | None:
    if tensor.dtype.family != "float":
        return Problem("LF403", module, f"numbers stored as {tensor.dtype.name}", "a floating-point form")
    if not tensor.is_contiguous:
        found = f"the tensor {tensor.name!r} is a view whose numbers do not lie one after another"
        return Problem("LF150", module, found, "a contiguous tensor")
    return None


def _orient(module: str, tensor: StoredTensor, config: Mapping[str, JsonValue]) -> Mapping[SlotKind, bool]:
    if len(tensor.shape) == 1:
        return _VECTOR
    if len(tensor.shape) > 2:
        return _CONV
    return _CONV1D if is_conv1d(module, config) else _MATRIX


def read_model_config(folder: Path) -> Mapping[str, JsonValue]:
    """Return the `config.json` of a folder, empty where there is none."""
    config = folder / CONFIG_NAME
    return parse_json_object(read_small(config), config) if config.is_file() else {}


def digest_structure(tensors: Iterable[StoredTensor], metadata: Mapping[str, str]) -> str:
    """Return the digest of a state dict without its numbers: names, forms, shapes and order."""
    listed: JsonValue = [[tensor.name, tensor.dtype.name, list(tensor.shape)] for tensor in tensors]
    return hashlib.sha256(write_canonical([dict(metadata), listed])).hexdigest()
