"""A state dict whose quantised weights are to stand in floats: what each becomes, and what goes."""

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from typing import Final, Self

from loraformat.bases import FloatForm, Site, Weight, WeightFloats
from loraformat.bases._coded_state import QUANTISATION, CodedState, CodedTensor
from loraformat.bases._state_dict import is_conv1d, read_codes
from loraformat.problems import Problem
from loraformat.spans import StoredTensor
from loraformat.strict_json import JsonValue

FILES_OF_CODES: Final = frozenset(
    {"quantize_config.json", "quant_config.json", "hf_quant_config.json", "quanto_qmap.json"}
)
"""Files beside a model that say how it is quantised, which readers believe."""

_MARKS: Final = frozenset({"scaled_fp8"})
"""Tensors that say so, of ComfyUI."""


class FloatingState:
    """What makes a state dict a `DequantisingBase`."""

    sites: Sequence[Site]
    _config: Mapping[str, JsonValue]
    _gone: frozenset[str] = frozenset()

    @abstractmethod
    def list_tensors(self) -> Sequence[StoredTensor]:
        """Return every stored tensor."""

    def find_float_form(self, wanted: WeightFloats) -> FloatForm | Problem:
        """Return how a quantised weight would stand in floats."""
        state = self._codes
        coded = state.found[wanted.key]
        assert isinstance(coded, CodedTensor), "only what can be read has a weight"
        turned = coded.turned != is_conv1d(coded.name.rpartition(".")[0], self._config)
        *several, rows, columns = coded.tensor.shape
        shape = (*several, columns, rows) if turned else coded.tensor.shape
        return FloatForm(coded.name, state.float_form(), shape, turned, 0)

    def list_joint_floats(self, keys: Set[str]) -> Sequence[Weight | Problem]:
        """Return all quantised weights: the configuration's word is of all of them."""
        odd = [outcome for outcome in self._codes.found.values() if isinstance(outcome, Problem)]
        odd += [site.obstacle for site in self.sites if site.obstacle is not None and site.obstacle.code == "LF470"]
        weights = {site.weight.key: site.weight for site in self.sites if site.weight and site.weight.coding}
        return [*weights.values(), *dict.fromkeys(odd)]

    def tell_floats(self) -> Mapping[str, JsonValue]:
        """Return the members of `config.json` that say how the model is quantised: they go."""
        inner = [part for part in self._config.values() if isinstance(part, Mapping)]
        return dict.fromkeys(name for name in QUANTISATION if any(name in part for part in (self._config, *inner)))

    def with_floats(self, floats: Sequence[WeightFloats]) -> Self:
        """Return the base without codes, and what belongs to them."""
        state, base = self._codes, copy.copy(self)
        keys = {each.key for each in floats}
        base._gone = frozenset({*keys, *(name for name, codes in state.owned.items() if codes in keys), *_MARKS})
        return base

    @cached_property
    def _codes(self) -> CodedState:
        return read_codes(self.list_tensors(), self._config)
