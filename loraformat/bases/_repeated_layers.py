"""A state dict whose layers stand in another order, or several times: the same bytes under the names of several layers.

PEFT's `layer_replication` trains an adapter on a model that shares the weights of repeated layers and numbers them
anew (huggingface/peft 0.21, `replicate_layers`: the list called `layers`, `encoder.layer` or `h`, of Llama, Bert and
Falcon and what is built alike). Merged, the layers differ, so that each must stand in the checkpoint for itself.
"""

import copy
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Self

from loraformat.bases._model import Site, Weight
from loraformat.bases._tied_tables import INNER_CONFIGS
from loraformat.problems import Problem
from loraformat.spans import StoredTensor
from loraformat.strict_json import JsonValue

_LAYER: Final = re.compile(r"((?:model\.)*(?:(?:bert\.)?encoder\.layer|layers|(?:transformer\.)?h))\.(\d+)(?=\.)")
_COUNTS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configurations call the number of layers."""
_BY_NUMBER: Final = (
    *("first_k_dense_replace", "moe_layer_freq", "decoder_sparse_step", "interleave_moe_layer_step"),
    *("sliding_window_pattern", "full_attention_interval", "no_rope_layer_interval", "num_kv_shared_layers"),
    *("attn_layer_period", "expert_layer_period", "attn_layer_offset", "expert_layer_offset"),
)
"""Fields that say by a layer's number what it is made of, and so of another one where it stands elsewhere."""
_ALIKE: Final = (None, False, 0, 1)
"""Values under which they tell no layer from another."""
_FEW: Final = 4
"""A list of more entries, as many as there are layers, is one of layers."""
_COMPARED_BYTES: Final = 64 << 10
_CODE: Final = "LF245"
_BESIDE: Final = "Write the model with its layers repeated yourself, remove layer_replication, and merge into that."


class LayeredState:
    """What makes a state dict a `LayeredBase`."""

    path: Path
    sites: Sequence[Site]
    problems: Sequence[Problem]
    sources: Sequence[int] = ()
    _config: Mapping[str, JsonValue]

    @abstractmethod
    def list_tensors(self) -> Sequence[StoredTensor]:
        """Return every stored tensor."""

    @abstractmethod
    def _rename_tensors(self, names: Mapping[str, str]) -> None:
        """Have these tensors and no others, each under a new name: new name to stored one."""

    def count_layers(self) -> int | Problem:
        """Return how many layers there are, or why they cannot be repeated."""
        matches = [match for tensor in self.list_tensors() if (match := _LAYER.match(tensor.name))]
        numbers, lists = {int(match[2]) for match in matches}, {match[1] for match in matches}
        if len(lists) != 1 or numbers != set(range(len(numbers))):
            found = f"layers in {', '.join(sorted(lists))}" if len(lists) > 1 else f"the layers {sorted(numbers)!r:.80}"
            return Problem(_CODE, str(self.path), found, "one list of layers, as Llama, Bert and Falcon have it")
        coded = next((site for site in self.sites if site.weight is not None and site.weight.coding is not None), None)
        if coded is not None:
            return Problem(_CODE, coded.module, "quantised layers", "floats", "Write the base in floats first.")
        return self._check_config(len(numbers)) or len(numbers)

    def is_repeated(self, sources: Sequence[int]) -> bool:
        """Say whether the layers are already as `sources` would have them: those of one source have the same bytes."""
        layers: dict[int, dict[str, StoredTensor]] = defaultdict(dict)
        for tensor in self.list_tensors():
            if found := _LAYER.match(tensor.name):
                layers[int(found[2])][tensor.name[found.end() :]] = tensor
        first = {source: place for place, source in reversed([*enumerate(sources)])}
        pairs = [(first[source], place) for place, source in enumerate(sources) if first[source] != place]
        return bool(pairs) and all(_begin_alike(layers[one], layers[other]) for one, other in pairs)

    def with_layers(self, sources: Sequence[int]) -> Self:
        """Return the base with layers that stand where `sources` says, for an output that is written anew."""
        base = copy.copy(self)
        places: dict[int, list[int]] = defaultdict(list)
        for place, source in enumerate(sources):
            places[source].append(place)
        base.sources = tuple(sources)
        base.sites = [moved for site in self.sites for moved in _move_site(site, places)]
        stored = [tensor.name for tensor in self.list_tensors()]
        base._rename_tensors({new: name for name in stored for new in _move(name, places).values()})
        found = f"{len(sources)} layers, of {len(places)} of the base's"
        base.problems = [*self.problems, Problem("LF244", str(self.path), found, severity="note")]
        return base

    def tell_layers(self) -> Mapping[str, JsonValue]:
        """Return the members of `config.json` that follow from where the layers stand."""
        configs = list(_list_configs(self._config))
        counts = [name for name in _COUNTS if any(name in config for config in configs)] or [_COUNTS[0]]
        changes: dict[str, JsonValue] = dict.fromkeys(counts, len(self.sources))
        for name, values in _list_by_layer(configs, 1 + max(self.sources)):
            changes[name] = [values[source] for source in self.sources]
        return changes

    def _check_config(self, layers: int) -> Problem | None:
        """Return why a configuration speaks against it: what a layer is may follow from its number."""
        configs = list(_list_configs(self._config))
        for name, value in (item for config in configs for item in config.items()):
            where = f"{self.path}: config.json: {name}"
            if name in _COUNTS and value != layers:
                return Problem(_CODE, where, f"{value!r:.80}, and {layers} layers are stored", "as many")
            if name in _BY_NUMBER and not any(value is each or value == each for each in _ALIKE):
                return Problem(_CODE, where, f"{value!r:.80}, which counts layers", "layers that are alike", _BESIDE)
            if isinstance(value, list | tuple) and "layer" in name and len(value) not in (0, layers):
                return Problem(_CODE, where, f"{value!r:.80}, which numbers layers", "an entry for each", _BESIDE)
        return None


def _list_configs(config: Mapping[str, JsonValue]) -> Iterator[Mapping[str, JsonValue]]:
    """Yield a configuration, and those of language models in it."""
    yield config
    for name in INNER_CONFIGS:
        inner = config.get(name)
        if isinstance(inner, Mapping):
            yield inner


def _list_by_layer(configs: Iterable[Mapping[str, JsonValue]], least: int) -> Iterator[tuple[str, Sequence[JsonValue]]]:
    """Yield the fields that have an entry for each layer."""
    for config in configs:
        layers = next((count for name in _COUNTS if isinstance(count := config.get(name), int)), least)
        for name, value in config.items():
            if isinstance(value, list | tuple) and len(value) == layers and ("layer" in name or layers > _FEW):
                yield name, value


def _begin_alike(one: Mapping[str, StoredTensor], other: Mapping[str, StoredTensor]) -> bool:
    """Say whether all tensors of two layers have the same form and first bytes."""
    return one.keys() == other.keys() and all(_begin(one[name]) == _begin(other[name]) for name in one)


def _begin(tensor: StoredTensor) -> tuple[object, ...]:
    extent = tensor.extent
    head = tensor.file.read(extent.offset, min(_COMPARED_BYTES, extent.length))
    return tensor.dtype, tensor.shape, head


def _move(name: str, places: Mapping[int, Sequence[int]]) -> Mapping[int, str]:
    """Return a name at each place where its layer stands; what is of no layer keeps its name, at -1."""
    found = _LAYER.match(name)
    if found is None:
        return {-1: name}
    return {place: f"{found[1]}.{place}{name[found.end() :]}" for place in places.get(int(found[2]), ())}


def _move_site(site: Site, places: Mapping[int, Sequence[int]]) -> Iterator[Site]:
    """Yield a site at each place where its layer stands; one that is known under another name of its list is gone."""
    modules, ids = _move(site.module, places), _move(site.id, places)
    for place in modules.keys() & ids.keys():
        bias, weight = site.free_bias, site.weight
        yield replace(
            site,
            id=ids[place],
            module=modules[place],
            weight=_move_weight(weight, place, places) if weight is not None else None,
            free_bias=replace(bias, name=_at(bias.name, place, places)) if bias is not None else None,
        )


def _move_weight(weight: Weight, place: int, places: Mapping[int, Sequence[int]]) -> Weight:
    consumers = frozenset(_at(each, place, places) for each in weight.consumers)
    return replace(
        weight, key=_at(weight.key, place, places), name=_at(weight.name, place, places), consumers=consumers
    )


def _at(name: str, place: int, places: Mapping[int, Sequence[int]]) -> str:
    return _move(name, places).get(place, name)
