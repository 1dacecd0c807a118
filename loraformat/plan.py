"""What a merge will do, as plain data: printable, serialisable, hashable. `planning` makes it."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast

from loraformat.adapter import Adapter
from loraformat.bases import WeightCopy, WeightFloats
from loraformat.kinds import Nature
from loraformat.limits import TILE_BYTES
from loraformat.problems import Problem
from loraformat.spans import Part
from loraformat.strict_json import JsonValue, as_object, write_canonical

SHARE: Final = "share"
_FLOAT32_BYTES: Final = 4


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


@dataclass(frozen=True, slots=True)
class PlannedReference:
    """Where the base checkpoint has the float numbers of a weight that the base has in a few bits.

    Attributes:
        key: identifies the checkpoint's weight.
        name: its name, for people.
        file: name of the file that holds it.
        offset: bytes from the start of that file.
        dtype: number form.
        matrix: rows and columns of the stored tensor as a matrix: of packed experts, one under the other.
        rows: start, stop and step of the rows of the stored matrix that are the module's.
        columns: likewise.
        transposed: whether the stored matrix is the transpose of the canonical `(out, in * kernel)`.
        section: first and last canonical row, the latter excluded, that it holds; None for all.
        divisor: what the base's graph multiplies its weight by, so that it stores the checkpoint's divided.
    """

    key: str
    name: str
    file: str
    offset: int
    dtype: str
    matrix: tuple[int, int]
    rows: tuple[int, int, int]
    columns: tuple[int, int, int]
    transposed: bool
    section: tuple[int, int] | None
    divisor: float


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A weight of the base that a change of another one is computed from as well.

    Attributes:
        key: identifies it within the base.
        transposed: whether it is stored as the transpose of the canonical `(out, in * kernel)`.
    """

    key: str
    transposed: bool


@dataclass(frozen=True, slots=True)
class PlannedChange:
    """What one target of one adapter does to a weight.

    Attributes:
        adapter: position of the adapter in the plan.
        target: name of the target.
        parameter: which parameter of the target's module it changes: `weight`, `bias` ...
        kind: its kind.
        rank: its rank.
        nature: how it composes with others.
        scale: the whole multiplier: of what is added the target's own, the user's weight, and what the graph
            multiplies by; of the other natures how far to go from W to V or f(W).
        weight: the multiplier without the scale that is part of the change itself.
        transposed: whether the stored matrix is the transpose of the canonical `(out, in * kernel)`.
        section: first and last canonical row, the latter excluded, that this weight holds; None for all.
        part: the rows and columns of the stored matrix that it changes; None for all.
        row_factors: what each canonical row of the module's weight was multiplied by before it was stored, and its
            change with it; empty for nothing.
        row_order: which canonical row each stored one is; empty where they are in order.
        shape: canonical shape of the parameter, `(out, in, *kernel)` of a weight; empty where the factors tell it.
        references: where the float numbers are that it changes, where the base has them in a few bits.
        extent: the largest `(out, in)` of all weights that the adapter changes; empty where nothing follows from it.
        beside: the module's other weight that it is computed from as well; None for none.
    """

    adapter: int
    target: str
    parameter: str
    kind: str
    rank: int
    nature: Nature
    scale: float
    weight: float
    transposed: bool
    section: tuple[int, int] | None = None
    part: Part | None = None
    row_factors: tuple[float, ...] = ()
    row_order: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    references: tuple[PlannedReference, ...] = ()
    extent: tuple[int, ...] = ()
    beside: Neighbour | None = None


@dataclass(frozen=True, slots=True)
class NewForm:
    """How a weight stands in the output where it is not as in the base: for most of that, the file is written anew.

    Attributes:
        name: its name in the output.
        dtype: number form.
        shape: dimensions.
        encoding: the encoding that writes it.
        has_base: whether there are numbers of the base to start from; zeros otherwise.
        copied_from: name of the base's tensor that stays beside it; empty where it takes that one's place.
        readers: ids of the sites that read it, instead of the base's tensor.
        turned: of codes that become floats, whether these stand transposed.
        padding: of codes that become floats, how many columns at the end of a row are left out.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    has_base: bool = True
    copied_from: str = ""
    readers: tuple[str, ...] = ()
    turned: bool = False
    padding: int = 0


@dataclass(frozen=True, slots=True)
class PlannedCompanion:
    """A tensor without which the codes of a quantised weight mean nothing.

    Attributes:
        role: `scales` or `zero_points`.
        name: its name, for people.
        dtype: number form.
        nbytes: bytes.
        is_written: whether it changes with the codes.
        copy_name: its name beside a copy of the weight, where it changes there.
    """

    role: str
    name: str
    dtype: str
    nbytes: int
    is_written: bool
    copy_name: str = ""


@dataclass(frozen=True, slots=True)
class PlannedWeight:
    """One weight that will be rewritten.

    Attributes:
        key: identifies it within the base.
        name: its name, for people.
        file: name of the file that holds it.
        offset: bytes from the start of that file.
        nbytes: bytes.
        dtype: number form.
        shape: as stored.
        matrix: rows and columns of the output as a matrix.
        encoding: the encoding that reads it, and writes it where there is no new form.
        tile_rows: rows of the stored matrix that are computed at a time; part of the plan, since it can decide the
            last bits.
        changes: what is added, in the order of the adapters.
        evidence: how it was found; not part of the digest.
        new: how it stands in the output, where not as in the base.
        companions: scales and zero points of a quantised weight.
        block: rows and columns of it that share a scale.
    """

    key: str
    name: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    encoding: str
    tile_rows: int
    changes: tuple[PlannedChange, ...]
    evidence: str
    new: NewForm | None = None
    companions: tuple[PlannedCompanion, ...] = ()
    block: tuple[int, int] = (0, 0)

    @property
    def is_copy(self) -> bool:
        """Whether the base's tensor stays as it is, for others, and this one is added to a copied file."""
        return self.new is not None and bool(self.new.readers)

    @property
    def copied_from(self) -> str:
        """Name of the base's tensor that it is a copy of; empty where it takes that one's place."""
        return self.new.copied_from if self.new is not None else ""

    @property
    def copied_roles(self) -> tuple[str, ...]:
        """What of the scales and zero points of the base's tensor it has once more."""
        return tuple(each.role for each in self.companions if each.copy_name)

    @property
    def is_coded(self) -> bool:
        """Whether it is quantised in the base."""
        return bool(self.companions)

    @property
    def is_dequantised(self) -> bool:
        """Whether it stands in floats in the output, and in codes in the base."""
        return self.is_coded and self.new is not None and self.new.encoding != self.encoding

    @property
    def written_dtype(self) -> str:
        """The number form in the output."""
        return self.new.dtype if self.new else self.dtype

    @property
    def is_replaced(self) -> bool:
        """Whether values are put in place of the base's, and nothing is added to them."""
        return all(change.nature is Nature.REPLACEMENT for change in self.changes)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets, one for each change."""
        return tuple(change.target for change in self.changes)

    @property
    def scales(self) -> tuple[float, ...]:
        """Multipliers, one for each change."""
        return tuple(change.scale for change in self.changes)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks, one for each change."""
        return tuple(change.rank for change in self.changes)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds, one for each change."""
        return tuple(change.kind for change in self.changes)


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
    config_changes: Mapping[str, JsonValue] = field(default_factory=lambda: MappingProxyType({}))
    rewritten: bool = False
    options: Mapping[str, JsonValue] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def copies(self) -> list[WeightCopy]:
        """Tensors that some sites of a weight get for themselves."""
        return [
            WeightCopy(weight.new.name, weight.key, weight.new.readers, weight.copied_roles)
            for weight in self.weights
            if weight.new is not None and weight.new.readers
        ]

    @property
    def floats(self) -> list[WeightFloats]:
        """Weights that the base has in codes and the output in floats."""
        return [WeightFloats(w.new.name, w.key) for w in self.weights if w.new is not None and w.is_dequantised]

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Ranges of activations that the output has, where they are not the base's, by the names of their scales."""
        stated = self.options.get("ranges")
        pairs = stated.items() if isinstance(stated, Mapping) else ()
        return {name: (cast(Any, ends)[0], cast(Any, ends)[1]) for name, ends in pairs}

    @property
    def changes_graph(self) -> bool:
        """Whether tensors or nodes of a copied file come, go or change their size."""
        return bool(self.copies or self.floats or self.ranges)

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
    return record


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of a stored tensor as a matrix: its first dimension and the rest."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def count_tile_rows(matrix: tuple[int, int], block: int = 1) -> int:
    """Return how many rows of a matrix make one tile of about `TILE_BYTES` in float32: whole blocks of `block` rows."""
    rows, columns = matrix
    wanted = max(1, min(rows, TILE_BYTES // (_FLOAT32_BYTES * columns)))
    return max(block, wanted // block * block)
