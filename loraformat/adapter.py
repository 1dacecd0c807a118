"""What an adapter says, in memory: targets, each with a kind, its factors, and how strongly it acts.

Records only. Readers of schemes build them, kinds give them meaning, nothing here reads a file.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from numbers import Real
from typing import Any, Final, Protocol, cast, runtime_checkable

from numpy.typing import NDArray

from loraformat.dtypes import Dtype
from loraformat.fingerprint import Fingerprint
from loraformat.frozen_mapping import FrozenMapping
from loraformat.limits import STREAM_BYTES
from loraformat.problems import Problem
from loraformat.strict_json import JsonValue


class Factor(Protocol):
    """One tensor of a target, read when asked for (`loraformat.spans.StoredTensor` is one)."""

    @property
    def name(self) -> str:
        """Its name in the source."""
        ...

    @property
    def dtype(self) -> Dtype:
        """Its number form."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        ...

    @property
    def elements(self) -> int:
        """The number of elements."""
        ...

    def read(self) -> NDArray[Any]:
        """Return its numbers."""
        ...


_OPERATORS: Final = "loraformat.algebra.operators"
"""Found by its name when `+` or `*` is used, as rooms find their members: records import nothing that lies above."""


@runtime_checkable
class PartialFactor(Factor, Protocol):
    """A tensor of which parts can be read, so that one of the size of a weight need not be held whole."""

    def read_part(self, rows: range, columns: range) -> NDArray[Any]:
        """Return some rows and columns of the matrix of its first dimension and the rest, in its own number form."""
        ...


def read_runs(factor: Factor) -> Iterator[NDArray[Any]]:
    """Yield all numbers of a tensor in order, in arrays of its own form: a large one some rows at a time."""
    # Not asked of the protocol, which takes longer than to read the factor.
    if not hasattr(factor, "read_part") or len(factor.shape) < 2 or not factor.elements:
        yield factor.read()
        return
    rows, width = factor.shape[0], factor.elements // factor.shape[0]
    step = max(1, STREAM_BYTES * 8 // max(1, factor.dtype.bits * width))
    for start in range(0, rows, step):
        yield factor.read_part(range(start, min(start + step, rows)), range(width))


class ScalingRule(StrEnum):
    """How a target's multiplier follows from alpha and rank. The values are those of the manifest."""

    ALPHA_OVER_RANK = "alpha/rank"
    ALPHA_OVER_SQRT_RANK = "alpha/sqrt(rank)"
    MULTIPLIER = "multiplier"


@dataclass(frozen=True, slots=True)
class Scaling:
    """The rule and the number it starts from; the effective scale is always stated, never implied.

    Attributes:
        rule: how to compute the multiplier.
        value: alpha for the two alpha rules, the multiplier itself otherwise.
    """

    rule: ScalingRule
    value: float

    def effective(self, rank: int) -> float:
        """Return the multiplier for a target of this rank (rsLoRA: arXiv 2312.03732 divides by sqrt(rank))."""
        if self.rule is ScalingRule.ALPHA_OVER_RANK:
            return self.value / rank
        if self.rule is ScalingRule.ALPHA_OVER_SQRT_RANK:
            return self.value / math.sqrt(rank)
        return self.value


class SlotKind(StrEnum):
    """What a target expects to find in the base. The values are those of the manifest.

    `linear` is a matrix `(out, in)`; `linear-transposed` the same stored `(in, out)` (GPT-2's Conv1D); `conv` a kernel
    `(out, in, *kernel)`; `embedding` a table `(vocabulary, dim)`; `parameter` any tensor, taken as it is.
    """

    LINEAR = "linear"
    LINEAR_TRANSPOSED = "linear-transposed"
    CONV = "conv"
    EMBEDDING = "embedding"
    PARAMETER = "parameter"


@dataclass(frozen=True, slots=True)
class Target:
    """What an adapter does to one module of the base.

    Attributes:
        name: module path in the base, without wrapper prefixes: `model.layers.0.self_attn.q_proj`.
        kind: name of the adapter kind, a file in `loraformat/kinds/`.
        slot: what kind of slot it expects.
        factors: role (`lora_A.weight` ...) to tensor.
        rank: rank as stated or as the factors have it; 0 for kinds without one.
        scaling: how strongly it acts.
        fingerprint: sampled numbers of the base weight that it was trained on, or None.
        options: what else the kind needs to know: block sizes, seeds, the rows of trained tokens ...
    """

    name: str
    kind: str
    slot: SlotKind
    factors: Mapping[str, Factor]
    rank: int
    scaling: Scaling
    fingerprint: Fingerprint | None = None
    options: Mapping[str, JsonValue] = field(default_factory=FrozenMapping)

    def __repr__(self) -> str:
        """Say what it is in one line."""
        rank = f", rank {self.rank}" if self.rank else ""
        return f"<Target {self.name!r}: {self.kind} on {self.slot.value}{rank}, scale {self.scale:g}>"

    @property
    def scale(self) -> float:
        """The effective multiplier."""
        return self.scaling.effective(self.rank) if self.rank else self.scaling.value

    @property
    def parameters(self) -> int:
        """Number of trained numbers."""
        return sum(factor.elements for factor in self.factors.values())


@dataclass(frozen=True, slots=True)
class BaseBinding:
    """Which base the adapter was trained on, as its author gave it.

    Attributes:
        name: model name or path.
        revision: version of that model.
        layers: first and last one, the latter excluded, of the runs of the base's layers that are the layers which the
            targets count: PEFT's `layer_replication`. Empty where they are the base's own.
    """

    name: str | None = None
    revision: str | None = None
    layers: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter.

    Attributes:
        targets: what it changes, sorted by name.
        base: the base it belongs to.
        scheme: name of the naming scheme that it was read from.
        source: the path it was read from, for messages.
        sha256: digest of the file with the factors, hexadecimal; empty for one made in memory.
        metadata: free annotations that travel along (`x.*` of the manifest).
        provenance: what the source said that has no place of its own, e.g. PEFT's raw configuration.
        problems: what the reader normalised or found odd; those of severity `error` stand against a merge, not
            against a look.
        absorbed: tensors whose numbers stand in the records themselves, such as alphas.
    """

    targets: tuple[Target, ...]
    base: BaseBinding = BaseBinding()
    scheme: str = "native"
    source: str = ""
    sha256: str = ""
    metadata: Mapping[str, str] = field(default_factory=FrozenMapping)
    provenance: Mapping[str, Any] = field(default_factory=FrozenMapping)
    problems: tuple[Problem, ...] = ()
    absorbed: tuple[Factor, ...] = ()

    def __repr__(self) -> str:
        """Say what it is in one line; `inspect` says all."""
        kinds = Counter((target.kind, target.rank) for target in self.targets)
        parts = [f"{count} {kind}{f' of rank {rank}' if rank else ''}" for (kind, rank), count in kinds.most_common(4)]
        parts += [f"{len(kinds) - 4} kinds and ranks more"] if len(kinds) > 4 else []
        of = f", for {self.base.name!r}" if self.base.name else ""
        targets = f"{len(self.targets)} targets ({', '.join(parts)})" if parts else "no targets"
        name = repr(self.source) if self.source else "in memory"
        return f"<Adapter {name}: {targets}, {self.parameters} numbers, {self.scheme}{of}>"

    @property
    def parameters(self) -> int:
        """Number of trained numbers."""
        return sum(target.parameters for target in self.targets)

    def factors(self) -> Iterator[Factor]:
        """Yield every tensor of every target."""
        for target in self.targets:
            yield from target.factors.values()

    def __add__(self, other: object) -> "Adapter":
        """Return the adapter that does what both do, exactly; its factors are computed when they are read."""
        return _operators().add(self, other, 1.0) if isinstance(other, Adapter) else NotImplemented

    def __sub__(self, other: object) -> "Adapter":
        """Return the adapter that undoes `other` after this one, exactly."""
        return _operators().add(self, other, -1.0) if isinstance(other, Adapter) else NotImplemented

    def __mul__(self, factor: object) -> "Adapter":
        """Return the adapter `factor` times as strong; no factor changes."""
        return _operators().multiply(self, float(factor)) if isinstance(factor, Real) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> "Adapter":
        """Return the adapter with the opposite effect."""
        return _operators().multiply(self, -1.0)


class _Operators(Protocol):
    """What the algebra provides."""

    def add(self, one: Adapter, other: Adapter, weight: float) -> Adapter: ...

    def multiply(self, adapter: Adapter, factor: float) -> Adapter: ...


def _operators() -> _Operators:
    return cast(_Operators, import_module(_OPERATORS))
