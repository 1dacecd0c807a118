"""What a merge will do, as plain data, made without reading the base's weights but for a few sampled numbers.

Everything that can fail before a byte is written fails here: kinds, shapes, scales, names, number forms, NaN in
factors.
"""

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from loraformat.adapter import Adapter
from loraformat.bases import BaseModel, Weight
from loraformat.encodings import ENCODINGS
from loraformat.errors import error_for
from loraformat.limits import TILE_BYTES
from loraformat.problems import Problem
from loraformat.resolve import Match, resolve
from loraformat.rules import check_adapter, is_replacement
from loraformat.strict_json import write_canonical

_FLOAT32_BYTES: Final = 4
_FLOAT32_MAX: Final = (2.0 - 2.0**-23) * 2.0**127


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
class PlannedChange:
    """What one target of one adapter does to a weight.

    Attributes:
        adapter: position of the adapter in the plan.
        target: name of the target.
        parameter: which parameter of the target's module it changes: `weight`, `bias` ...
        kind: its kind.
        rank: its rank.
        scale: the whole multiplier: the target's own, the user's weight, and what the graph multiplies by.
        transposed: whether the stored matrix is the transpose of the canonical `(out, in * kernel)`.
    """

    adapter: int
    target: str
    parameter: str
    kind: str
    rank: int
    scale: float
    transposed: bool


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
        encoding: the encoding that reads and writes it.
        tile_rows: rows of the stored matrix that are computed at a time; part of the plan, since it can decide the
            last bits.
        changes: what is added, in the order of the adapters.
        evidence: how it was found.
    """

    key: str
    name: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    tile_rows: int
    changes: tuple[PlannedChange, ...]
    evidence: str

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the stored tensor as a matrix: its first dimension and the rest."""
        return self.shape[0], math.prod(self.shape[1:])

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


@dataclass(frozen=True, slots=True)
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
    """

    base: Mapping[str, Any]
    format: str
    output: Path
    adapters: tuple[PlannedAdapter, ...]
    weights: tuple[PlannedWeight, ...]
    unmatched: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def sha256(self) -> str:
        """Digest of everything that decides the merged numbers: equal plans give equal bytes."""
        return hashlib.sha256(write_canonical(self._decisive())).hexdigest()

    def _decisive(self) -> dict[str, Any]:
        return {
            "base": dict(self.base),
            "format": self.format,
            "adapters": [asdict(adapter) for adapter in self.adapters],
            "weights": [asdict(weight) for weight in self.weights],
            "unmatched": list(self.unmatched),
        }

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        problems = [dict(problem.as_json()) for problem in self.problems]
        return self._decisive() | {"output": str(self.output), "sha256": self.sha256, "problems": problems}


class _Change(NamedTuple):
    """One change on its way into the plan of a weight."""

    match: Match
    weight: Weight
    change: PlannedChange


def build_plan(
    base: BaseModel,
    adapters: Sequence[WeightedAdapter],
    output: Path,
    *,
    allow_unmatched: Sequence[str] = (),
    strip_prefix: str | None = None,
    allow_zero: bool = False,
    ignore_fingerprints: bool = False,
) -> Plan:
    """Plan the merge of `adapters` into `base`.

    Args:
        base: the opened base.
        adapters: what to merge, in the order in which deltas are summed.
        output: where the merged model will stand.
        allow_unmatched: glob patterns of targets that may be left out.
        strip_prefix: removed from the front of target names.
        allow_zero: accept scales of zero.
        ignore_fingerprints: accept weights that do not match the fingerprint of their target.

    Raises:
        LoraformatError: with every problem that was found, not only the first.
    """
    problems: list[Problem] = [*base.problems]
    changes: dict[str, list[_Change]] = defaultdict(list)
    unmatched: list[str] = []
    counts: list[int] = []
    for position, item in enumerate(adapters):
        found = check_adapter(item.adapter, allow_zero=allow_zero) + _check_weight(item, allow_zero=allow_zero)
        problems += found
        if any(problem.severity == "error" for problem in found):
            counts.append(0)
            continue
        resolution = resolve(
            item.adapter,
            base.sites,
            allow_unmatched=allow_unmatched,
            strip_prefix=strip_prefix,
            ignore_fingerprints=ignore_fingerprints,
        )
        problems += resolution.problems
        unmatched += resolution.unmatched
        counts.append(len(resolution.matches))
        if not resolution.matches and not resolution.problems:
            problems.append(Problem("LF401", item.name, "none of its targets, all left out on request", "at least one"))
        for match in resolution.matches:
            change = _plan_change(position, match, item)
            problems += _check_scale(change)
            for weight in match.weights:
                changes[weight.key].append(_Change(match, weight, change))
    weights = [_plan_weight(group, problems) for group in changes.values()]
    if any(problem.severity == "error" for problem in problems):
        raise error_for([problem for problem in problems if problem.severity == "error"])
    return Plan(
        base=describe_base(base),
        format=base.format,
        output=output,
        adapters=tuple(
            PlannedAdapter(item.name, item.adapter.sha256, item.weight, count)
            for item, count in zip(adapters, counts, strict=True)
        ),
        weights=tuple(sorted((weight for weight in weights if weight), key=lambda weight: (weight.name, weight.key))),
        unmatched=tuple(unmatched),
        problems=tuple(problems),
    )


def describe_base(base: BaseModel) -> dict[str, Any]:
    """Return what a plan and a receipt say about the base: names, sizes, and the digest of its structure."""
    root = base.path if base.folder_mark else base.path.parent
    files = sorted((os.path.relpath(file.path, root), file.size_bytes) for file in base.files)
    return {
        "name": base.path.name,
        "structure_sha256": base.structure_sha256,
        "files": [{"name": name, "bytes": size} for name, size in files],
    }


def _check_weight(item: WeightedAdapter, *, allow_zero: bool) -> list[Problem]:
    if not math.isfinite(item.weight):
        return [Problem("LF207", item.name, f"weight {item.weight}", "a finite number")]
    if item.weight == 0 and not allow_zero:
        return [Problem("LF208", item.name, "weight 0", "a weight other than 0, or --allow-zero")]
    return []


def _plan_change(position: int, match: Match, item: WeightedAdapter) -> PlannedChange:
    target = match.target
    scale = target.scale * item.weight / match.divisor
    parameter = match.want.parameter
    return PlannedChange(position, target.name, parameter, target.kind, target.rank, scale, match.transposed)


def _check_scale(change: PlannedChange) -> list[Problem]:
    """Return a problem when a product of finite numbers is none that tiles can be computed with."""
    if abs(change.scale) <= _FLOAT32_MAX:
        return []
    return [Problem("LF207", change.target, f"the multiplier {change.scale}", f"at most {_FLOAT32_MAX:.6g}")]


def _plan_weight(group: Sequence[_Change], problems: list[Problem]) -> PlannedWeight | None:
    match, weight, _ = group[0]
    tensor = weight.tensor
    problems += _check_replacement(group)
    encoding = next((name for name, encoding in ENCODINGS if encoding.accepts(tensor.dtype)), None)
    if encoding is None:
        found = f"the weight {tensor.name!r} is stored as {tensor.dtype.name}"
        problems.append(Problem("LF403", match.target.name, found, "a floating-point form"))
        return None
    return PlannedWeight(
        key=weight.key,
        name=weight.name,
        file=tensor.span.path.name,
        offset=tensor.span.offset,
        nbytes=tensor.span.length,
        dtype=tensor.dtype.name,
        shape=tensor.shape,
        encoding=encoding,
        tile_rows=count_tile_rows(tensor.shape),
        changes=tuple(entry.change for entry in group),
        evidence=match.evidence,
    )


def _check_replacement(group: Sequence[_Change]) -> list[Problem]:
    """Return a problem when values would be replaced that another target changes too (spec/SPEC.md, R-085)."""
    replacing = [entry for entry in group if is_replacement(entry.change.kind)]
    if not replacing:
        return []
    where, name = replacing[0].match.want.name, replacing[0].weight.name
    if len(group) > 1:
        others = ", ".join(entry.match.want.name for entry in group if entry is not replacing[0])
        return [Problem("LF409", where, f"{name!r} is changed by {others} as well", "one change of it")]
    if replacing[0].match.divisor != 1:
        found = f"the graph multiplies {name!r} by {replacing[0].match.divisor:g}"
        return [Problem("LF403", where, found, "a weight that is used as it is stored")]
    return []


def count_tile_rows(shape: Sequence[int]) -> int:
    """Return how many rows of a stored tensor make one tile of about `TILE_BYTES` in float32."""
    columns = math.prod(shape[1:])
    return max(1, min(shape[0], TILE_BYTES // (_FLOAT32_BYTES * columns)))


def default_output(base: Path, suffix: str, adapters: Sequence[WeightedAdapter]) -> Path:
    """Return `<base>-<adapter>[@<weight>]...<suffix>` beside the base."""
    parts = [base.name.removesuffix(suffix)]
    parts += [item.name if item.weight == 1 else f"{item.name}@{item.weight:g}" for item in adapters]
    return base.with_name("-".join(parts) + suffix)
