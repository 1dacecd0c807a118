"""What a merge will do, as plain data: printable, serialisable, hashable. `planning` makes it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, cast

from loraformat.adapter import Adapter
from loraformat.bases import AddedBias, WeightCopy, WeightFloats
from loraformat.dtypes import BY_NAME
from loraformat.frozen_mapping import FrozenMapping
from loraformat.plan.weights import PlannedWeight
from loraformat.problems import Problem, count_problems, escape_surrogates
from loraformat.strict_json import JsonValue, as_object, write_canonical

SHARE: Final = "share"


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """An adapter and how strongly the user wants it.

    Attributes:
        adapter: the adapter.
        weight: factor on its delta.
        name: file or folder name, for the plan and the receipt.
    """

    adapter: Adapter
    weight: float
    name: str


@dataclass(frozen=True, slots=True)
class PlannedAdapter:
    """One adapter of a plan, as the receipt will name it."""

    name: str
    sha256: str
    weight: float
    targets: int


@dataclass(frozen=True)  # No slots: the digest is kept, once asked for.
class Plan:
    """What a merge will do.

    Attributes:
        base: name, size and structure digest of the base.
        format: what kind of base it is.
        output: where the merged model will stand; not part of the digest.
        adapters: the adapters, in order.
        weights: the weights to rewrite, sorted by name.
        unmatched: targets that the user allowed to be left out.
        problems: warnings and notes.
        config_changes: members of the model's `config.json` that follow from the changes, and their new values.
        rewritten: whether the output is written anew, in safetensors, rather than copied with its spans changed.
        options: what the user asked for beyond the usual: `SettledWishes`.
    """

    base: Mapping[str, Any]
    format: str
    output: Path
    adapters: tuple[PlannedAdapter, ...]
    weights: tuple[PlannedWeight, ...]
    unmatched: tuple[str, ...]
    problems: tuple[Problem, ...]
    config_changes: Mapping[str, JsonValue] = field(default_factory=FrozenMapping)
    rewritten: bool = False
    options: Mapping[str, JsonValue] = field(default_factory=FrozenMapping)

    def __repr__(self) -> str:
        """Say what it is in one line."""
        names = ", ".join(
            f"{each.name!r}" + (f" * {each.weight:g}" if each.weight != 1 else "") for each in self.adapters
        )
        said = count_problems(self.problems)
        whose = self.base["name"]
        return f"<Plan: {names} into {len(self.weights)} weights of {whose!r}, to {str(self.output)!r}; {said}>"

    @property
    def copies(self) -> list[WeightCopy]:
        """Tensors that some sites of a weight get for themselves."""
        return [
            WeightCopy(weight.new.name, weight.key, weight.new.readers, weight.copied_roles)
            for weight in self.weights
            if weight.new is not None and weight.is_copy and not weight.is_dequantised
        ]

    @property
    def floats(self) -> list[WeightFloats]:
        """Weights that the base has in codes and the output in floats."""
        found = ((w.new, w.key) for w in self.weights if w.new is not None and w.is_dequantised)
        return [WeightFloats(new.name, key, new.readers) for new, key in found]

    @property
    def biases(self) -> list[AddedBias]:
        """Biases that a graph is given."""
        found = (weight.new for weight in self.weights if weight.new is not None and weight.is_added)
        return [AddedBias(new.name, new.shape[0], BY_NAME[new.dtype], new.readers) for new in found]

    @property
    def graphs(self) -> list[str]:
        """Patterns of the graphs that it is about; none for all."""
        stated = self.options.get("graphs")
        return [str(pattern) for pattern in stated] if isinstance(stated, list) else []

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Ranges of activations that the output has, where they are not the base's, by the names of their scales."""
        stated = self.options.get("ranges")
        pairs = stated.items() if isinstance(stated, Mapping) else ()
        return {name: (cast(Any, ends)[0], cast(Any, ends)[1]) for name, ends in pairs}

    @property
    def changes_graph(self) -> bool:
        """Whether tensors or nodes of a copied file come, go or change their size."""
        return bool(self.copies or self.floats or self.ranges or self.biases)

    @property
    def is_sharing(self) -> bool:
        """Whether the output refers to the base's data files for what does not change."""
        return self.options.get("external_data") == SHARE

    @cached_property
    def sha256(self) -> str:
        """Digest of everything that decides the merged bytes, and not of how targets were found."""
        return hashlib.sha256(write_canonical(self._decisive())).hexdigest()

    def _decisive(self) -> dict[str, Any]:
        return {
            "base": dict(self.base),
            "format": self.format,
            "adapters": [as_object(adapter) for adapter in self.adapters],
            "weights": [_describe_work(weight) for weight in self.weights],
            "unmatched": list(self.unmatched),
            "config_changes": dict(self.config_changes),
            "rewritten": self.rewritten,
            "options": dict(self.options),
        }

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        problems = [dict(problem.as_json()) for problem in self.problems]
        weights = [as_object(weight) for weight in self.weights]
        told = {"weights": weights, "output": str(self.output), "problems": problems}
        return self._decisive() | told | {"sha256": self.sha256}


def _describe_work(weight: PlannedWeight) -> dict[str, Any]:
    """Return what is done to a weight: a map, a checkpoint and a name that find the same give the same bytes."""
    record = as_object(weight)
    del record["evidence"]
    record["file"] = escape_surrogates(weight.file)
    return record
