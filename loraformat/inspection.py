"""What is in an adapter or a base, as data for people and for `--json`."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from loraformat.adapter import Adapter, PartialFactor, Target
from loraformat.bases import BaseModel, Site
from loraformat.kinds import KINDS, AdditiveKind, Kind, Nature
from loraformat.loading import read_adapter
from loraformat.problems import Problem, count_problems
from loraformat.schemes import StatedScale


@dataclass(frozen=True, slots=True)
class TargetSummary:
    """One target of an adapter.

    Attributes:
        name: module path.
        kind: adapter kind.
        slot: kind of slot that it expects.
        rank: its rank.
        scale: effective multiplier.
        scaling: the rule and number behind it.
        shape: shape of the weight that it changes, `(out, in, *kernel)`; None for kinds that this version lacks.
        parameters: trained numbers.
        norm: Frobenius norm of the change, found without forming it; None where it cannot be had.
    """

    name: str
    kind: str
    slot: str
    rank: int
    scale: float
    scaling: str
    shape: tuple[int, ...] | None
    parameters: int
    norm: float | None


@dataclass(frozen=True, slots=True)
class AdapterInspection:
    """What is in an adapter."""

    path: Path
    scheme: str
    evidence: str
    adapter: Adapter
    bytes: int
    targets: tuple[TargetSummary, ...]
    problems: tuple[Problem, ...]

    def __repr__(self) -> str:
        """Say what it is in one line."""
        return f"<AdapterInspection of {self.adapter!r}: norm {self.norm:.4g}; {count_problems(self.problems)}>"

    @property
    def norm(self) -> float:
        """Frobenius norm of all changes together."""
        return math.hypot(*(target.norm for target in self.targets if target.norm is not None))

    @property
    def parameters_by_kind(self) -> dict[str, int]:
        """Trained numbers of each kind: papers count their factors without a head that was trained beside them."""
        counted: Counter[str] = Counter()
        for target in self.targets:
            counted[target.kind] += target.parameters
        return dict(counted.most_common())

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        factors = [factor for target in self.adapter.targets for factor in target.factors.values()]
        return {
            "kind": "adapter",
            "path": str(self.path),
            "scheme": self.scheme,
            "evidence": self.evidence,
            "base": asdict(self.adapter.base) | {"layers": [list(run) for run in self.adapter.base.layers]},
            "sha256": self.adapter.sha256,
            "kinds": _count(target.kind for target in self.targets),
            "ranks": _count(target.rank for target in self.targets if target.rank),
            "scales": _count(f"{target.scale:.6g}" for target in self.targets if target.rank),
            "parameters": self.adapter.parameters,
            "parameters_by_kind": self.parameters_by_kind,
            "bytes": self.bytes,
            "dtypes": _count(factor.dtype.name for factor in factors),
            "norm": self.norm,
            "targets": [asdict(target) for target in self.targets],
            "problems": [dict(problem.as_json()) for problem in self.problems],
        }


@dataclass(frozen=True, slots=True)
class BaseInspection:
    """What is in a base."""

    base: BaseModel

    def __repr__(self) -> str:
        """Say what it is in one line."""
        path, form, sites = str(self.base.path), self.base.format, len(self.base.sites)
        return f"<BaseInspection of {path!r}: {form}, {sites} sites; {count_problems(self.problems)}>"

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is odd about it."""
        return tuple(self.base.problems)

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        tensors = self.base.list_tensors()
        return {
            "kind": "base",
            "path": str(self.base.path),
            "format": self.base.format,
            "structure_sha256": self.base.structure_sha256,
            "files": [{"name": str(file.path), "bytes": file.size_bytes} for file in self.base.files],
            "tensors": len(tensors),
            "parameters": sum(tensor.elements for tensor in tensors),
            "bytes": sum(tensor.dtype.count_bytes(tensor.elements) for tensor in tensors),
            "dtypes": _count(tensor.dtype.name for tensor in tensors),
            "sites": [_describe_site(site) for site in self.base.sites],
            "receipt": dict(self.base.parent_receipt) if self.base.parent_receipt is not None else None,
            "problems": [dict(problem.as_json()) for problem in self.problems],
        }


def inspect_adapter(path: Path, scheme: str | None, stated: StatedScale) -> AdapterInspection:
    """Read the adapter at `path` and summarise it; what stands against a merge is listed, not raised."""
    adapter, evidence, files = read_adapter(path, scheme, stated)
    problems = list(adapter.problems)
    targets = []
    for target in adapter.targets:
        summary, found = _summarise(target)
        targets.append(summary)
        problems += found
    size_bytes = sum(file.size_bytes for file in files)
    return AdapterInspection(path, adapter.scheme, evidence, adapter, size_bytes, tuple(targets), tuple(problems))


def inspect_base(base: BaseModel) -> BaseInspection:
    """Summarise an opened base."""
    return BaseInspection(base)


def _summarise(target: Target) -> tuple[TargetSummary, list[Problem]]:
    kind = KINDS.find(target.kind)
    if kind is None:
        found = f"the kind {target.kind!r} (tensors {', '.join(sorted(target.factors))})"
        problems = [Problem("LF209", target.name, found, f"one of {', '.join(KINDS.names())}")]
        return _describe_target(target, None, None), problems
    problems = kind.check(target)
    if any(problem.severity == "error" for problem in problems):
        return _describe_target(target, None, None), problems
    if kind.nature is not Nature.ADDITIVE:
        return _describe_target(target, None, None), problems
    additive = cast(AdditiveKind, kind)
    with np.errstate(all="ignore"):  # What is not finite is for the plan to refuse.
        factors = _take_factors(kind, target)
        norm = additive.norm(target, factors)
    return _describe_target(target, _weight_shape(kind, target), norm if math.isfinite(norm) else None), problems


def _take_factors(kind: Kind, target: Target) -> dict[str, Any]:
    """Return the factors in float64; those that are as large as a weight unread, as the kind takes them."""
    streams = {role for change in kind.changes(target) if change.streams for role in change.roles}
    return {
        role: factor if role in streams and isinstance(factor, PartialFactor) else factor.read().astype(np.float64)
        for role, factor in target.factors.items()
    }


def _weight_shape(kind: Kind, target: Target) -> tuple[int, ...] | None:
    return next((change.shape for change in kind.changes(target) if change.slot is target.slot), None)


def _describe_target(target: Target, shape: tuple[int, ...] | None, norm: float | None) -> TargetSummary:
    return TargetSummary(
        name=target.name,
        kind=target.kind,
        slot=target.slot.value,
        rank=target.rank,
        scale=target.scale,
        scaling=f"{target.scaling.rule.value} of {target.scaling.value:g}",
        shape=shape,
        parameters=target.parameters,
        norm=norm,
    )


def _describe_site(site: Site) -> Mapping[str, Any]:
    weight = site.weight
    return {
        "module": site.module,
        "evidence": site.evidence,
        "slot": "|".join(sorted(kind.value for kind in site.transposed)),
        "weight": weight.name if weight else None,
        "shape": list(weight.tensor.shape) if weight else None,
        "dtype": weight.tensor.dtype.name if weight else None,
        "obstacle": dict(site.obstacle.as_json()) if site.obstacle else None,
    }


def _count(values: Any) -> dict[str, int]:
    """Return how often each value occurs, most frequent first."""
    counted: Sequence[tuple[Any, int]] = Counter(values).most_common()
    return {str(value): count for value, count in counted}
