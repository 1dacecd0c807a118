"""From adapters and a base to a plan, without reading the base's weights but for a few sampled numbers.

Everything that can fail before a byte is written fails here: kinds, shapes, scales, names, number forms, NaN in
factors.
"""

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from loraformat.bases import BaseModel, Weight
from loraformat.encodings import ENCODINGS
from loraformat.errors import error_for
from loraformat.kinds import KINDS, MappingKind, Nature
from loraformat.plan import (
    Plan,
    PlannedAdapter,
    PlannedChange,
    PlannedWeight,
    WeightedAdapter,
    as_matrix,
    count_tile_rows,
)
from loraformat.problems import Problem
from loraformat.resolve import Match, resolve
from loraformat.rewriting import plan_rewriting
from loraformat.rules import check_adapter
from loraformat.spans import Part
from loraformat.strict_json import JsonValue

_FLOAT32_MAX: Final = (2.0 - 2.0**-23) * 2.0**127
_ORDER: Final = {Nature.REPLACEMENT: 0, Nature.FUNCTION_OF_BASE: 1, Nature.ADDITIVE: 2}
"""What replaces the base's values comes first, then what is a function of them, then what is added."""


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
    dtype: str | None = None,
    anew: bool = False,
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
        dtype: number form of the output's floating-point tensors; None keeps each one's own.
        anew: write the output anew, as safetensors.

    Raises:
        LoraformatError: with every problem that was found, not only the first.
    """
    options = _list_options(
        allow_unmatched=list(allow_unmatched),
        strip_prefix=strip_prefix,
        allow_zero=allow_zero,
        ignore_fingerprints=ignore_fingerprints,
        dtype=dtype,
        anew=anew,
    )
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
    planned = tuple(sorted((weight for weight in weights if weight), key=lambda weight: (weight.name, weight.key)))
    rewriting = None
    if anew or dtype is not None or any(weight.new for weight in planned):
        rewriting = plan_rewriting(base, planned, dtype, anew=anew)
        problems += rewriting.problems
    return Plan(
        base=describe_base(base),
        format=base.format,
        output=output,
        adapters=tuple(
            PlannedAdapter(item.name, item.adapter.sha256, item.weight, count)
            for item, count in zip(adapters, counts, strict=True)
        ),
        weights=rewriting.weights if rewriting else planned,
        unmatched=tuple(unmatched),
        problems=tuple(problems),
        config_changes=rewriting.config_changes if rewriting else {},
        rewritten=rewriting is not None,
        options=options,
    )


def _list_options(**options: JsonValue) -> dict[str, JsonValue]:
    """Return the options that are not as usual: not empty, not False."""
    return {name: value for name, value in options.items() if value}


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
    target, change = match.target, match.change
    kind = KINDS.find(target.kind)
    weight = item.weight / match.divisor
    if kind is not None and kind.nature is Nature.REPLACEMENT:  # Its scale says how far to go towards its values.
        weight *= target.scale
    return PlannedChange(
        adapter=position,
        target=target.name,
        parameter=change.parameter,
        kind=target.kind,
        rank=target.rank,
        nature=change.nature,
        scale=target.scale * weight if change.nature is Nature.ADDITIVE else weight,
        weight=weight,
        transposed=match.transposed,
        section=match.section,
        part=match.part,
        shape=change.shape if change.shape != match.want.shape else (),
    )


def _check_scale(change: PlannedChange) -> list[Problem]:
    """Return a problem when a product of finite numbers is none that tiles can be computed with."""
    if abs(change.scale) <= _FLOAT32_MAX:
        return []
    return [Problem("LF207", change.target, f"the multiplier {change.scale}", f"at most {_FLOAT32_MAX:.6g}")]


def _plan_weight(group: Sequence[_Change], problems: list[Problem]) -> PlannedWeight | None:
    match, weight, _ = group[0]
    tensor = weight.tensor
    conflicts = check_composition(group)
    problems += conflicts
    encoding = next((name for name, encoding in ENCODINGS if encoding.accepts(tensor.dtype)), None)
    if encoding is None:
        found = f"the weight {tensor.name!r} is stored as {tensor.dtype.name}"
        problems.append(Problem("LF403", match.target.name, found, "a floating-point form"))
    if encoding is None or conflicts:
        return None
    matrix = next((entry.change.part.matrix for entry in group if entry.change.part), as_matrix(tensor.shape))
    return PlannedWeight(
        key=weight.key,
        name=weight.name,
        file=tensor.span.path.name,
        offset=tensor.span.offset,
        nbytes=tensor.span.length,
        dtype=tensor.dtype.name,
        shape=tensor.shape,
        matrix=matrix,
        encoding=encoding,
        tile_rows=count_tile_rows(matrix, count_block(group)),
        changes=tuple(entry.change for entry in sorted(group, key=lambda entry: _ORDER[entry.change.nature])),
        evidence=match.evidence,
    )


def count_block(group: Sequence[_Change]) -> int:
    """Return how many rows of the stored matrix the functions of the base must see together."""
    blocks = [1]
    for match, _, change in group:
        if change.nature is Nature.FUNCTION_OF_BASE:
            kind = cast(MappingKind, KINDS.find(change.kind))
            blocks.append(kind.count_rows_together(match.target, match.change, transposed=change.transposed))
    return math.lcm(*blocks)


def check_composition(group: Sequence[_Change]) -> list[Problem]:
    """Return problems of changes of one weight that do not compose (spec/SPEC.md, R-085)."""
    special = [entry for entry in group if entry.change.nature is not Nature.ADDITIVE]
    if not special:
        return []
    where, name = special[0].match.want.name, special[0].weight.name
    rivals = [entry for entry in special if _overlap(entry.change.part, special[0].change.part)]
    if special[0].change.nature is Nature.REPLACEMENT:  # What is trained on the replaced values goes on top of them.
        rivals += [e for e in group if e not in rivals and _owner(e) != _owner(special[0])]
    if len(rivals) > 1:
        others = ", ".join(entry.match.want.name for entry in rivals[1:])
        return [Problem("LF409", where, f"{name!r} is changed by {others} as well", "one change of it")]
    split = [e for e in special if e.change.nature is Nature.FUNCTION_OF_BASE and not _sees_its_rows(e)]
    if split:
        found = f"{name!r} holds a part of the rows that the kind {split[0].change.kind!r} must see together"
        return [Problem("LF409", where, found, "a weight that holds the module whole")]
    if special[0].match.divisor != 1:
        found = f"the graph multiplies {name!r} by {special[0].match.divisor:g}"
        return [Problem("LF403", where, found, "a weight that is used as it is stored")]
    return []


def _sees_its_rows(entry: _Change) -> bool:
    """Say whether a function of the base gets all that it is computed from, where the base splits or packs modules."""
    if entry.change.section is not None:
        return False
    return entry.change.part is None or count_block([entry]) == 1


def _owner(entry: _Change) -> tuple[int, str]:
    return entry.change.adapter, entry.change.target


def _overlap(one: Part | None, other: Part | None) -> bool:
    """Say whether two parts of a stored matrix may have elements in common; one that is None is all of it."""
    if one is None or other is None:
        return True
    rows = set(range(*one.rows)).isdisjoint(range(*other.rows))
    return not (rows or set(range(*one.columns)).isdisjoint(range(*other.columns)))


def default_output(base: Path, suffix: str, adapters: Sequence[WeightedAdapter]) -> Path:
    """Return `<base>-<adapter>[@<weight>]...<suffix>` beside the base."""
    parts = [base.name.removesuffix(suffix)]
    parts += [item.name if item.weight == 1 else f"{item.name}@{item.weight:g}" for item in adapters]
    return base.with_name("-".join(parts) + suffix)
