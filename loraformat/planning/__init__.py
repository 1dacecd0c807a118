"""From adapters and a base to a plan, without reading the base's weights but for a few sampled numbers.

Everything that can fail before a byte is written fails here: kinds, shapes, scales, names, number forms, NaN in
factors.
"""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Unpack

from loraformat.bases import BaseModel, CalibratedBase, DequantisingBase, LayeredBase
from loraformat.errors import error_for
from loraformat.evidence import Clues, Hints
from loraformat.files import name_in_hub
from loraformat.kinds import KINDS, Nature
from loraformat.lacking import NewBias, report_zeros
from loraformat.matching import Match
from loraformat.plan import Plan, PlannedAdapter, WeightedAdapter
from loraformat.plan.changes import PlannedChange
from loraformat.plan.weights import PlannedWeight
from loraformat.planning.coded_plans import DEQUANTIZE, check_codes, make_float, plan_joint_floats, plan_references
from loraformat.planning.extents import find_neighbours, measure_together
from loraformat.planning.layers import place_anew
from loraformat.planning.new_sizes import follow_weights
from loraformat.planning.rewriting import plan_rewriting
from loraformat.planning.weight_plans import WeightChange, check_composition, part_tables, plan_bias, plan_weight
from loraformat.planning.wishes import SettledWishes, list_unusual
from loraformat.problems import Problem, Severity, escape_surrogates
from loraformat.resolve import Resolution, gather_clues, resolve
from loraformat.rules import check_adapter
from loraformat.viewing import choose_graphs

_NO_HINTS: Final = Hints()
_ONE_BY_ONE: Final = "Merge with --on-quantized dequantize and no bias, then the bias into that model."
_FLAT: Final = "LF314"
"""A flat name that is none of the base's modules."""
_FLOAT32_MAX: Final = (2.0 - 2.0**-23) * 2.0**127


class _Found:
    """What the adapters of a plan change, gathered."""

    def __init__(self, base: BaseModel) -> None:
        self.changes: dict[str, list[WeightChange]] = defaultdict(list)
        self.biases: dict[str, list[tuple[NewBias, PlannedChange]]] = defaultdict(list)
        self.problems: list[Problem] = [*base.problems]
        self.unmatched: list[str] = []
        self.counts: list[int] = []
        self.base = base
        self._sites = base.sites

    @property
    def untied(self) -> bool:
        """Whether tied tables part."""
        return any(entry.match.is_untied for group in self.changes.values() for entry in group)

    def add(self, position: int, item: WeightedAdapter, resolution: Resolution, clues: Clues) -> None:
        """Take in what one adapter was matched with, and where float numbers of it are."""
        self.problems += resolution.problems
        self.unmatched += resolution.unmatched
        kept = {(match.want, match.section) for match in resolution.matches}  # Each once, in however many graphs.
        self.counts.append(len(kept | {(bias.want, None) for bias in resolution.new_biases}))
        if not (resolution.matches or resolution.new_biases or resolution.problems):
            found = "none of its targets, all left out on request"
            self.problems.append(Problem("LF401", item.name, found, "at least one"))
        extents, problems = measure_together(resolution.matches)
        neighbours, torn = find_neighbours(resolution.matches)
        self.problems += problems + torn
        for match in resolution.matches:
            change = _plan_change(position, match, item, extents.get(match.target.name, ()))
            references = clues.reference.get((match.target.name, match.want.parameter), ())
            near = neighbours.get((match.sites[0].graph, match.want.name))
            change = replace(change, references=plan_references(match, references), beside=near)
            self.problems += _check_scale(change)
            for weight in match.weights:
                self.changes[weight.key].append(WeightChange(match, weight, change))
        for bias in resolution.new_biases:
            change = _plan_change(position, bias.as_match(), item)
            self.problems += _check_scale(change)
            self.biases[bias.name].append((bias, change))

    def check_sites(self, wishes: SettledWishes) -> None:
        """Note what the user must accept of the weights that change, and the weights that nothing can be added to."""
        entries = [entry for group in self.changes.values() for entry in group]
        matches = [entry.match for entry in entries]
        matches += [bias.beside for group in self.biases.values() for bias, _ in group]
        caveats = {site.caveat for match in matches for site in match.sites if site.caveat is not None}
        severity: Severity = "warning" if wishes.get("accept_ranges") else "error"
        ranges = wishes.get("ranges")
        if ranges is None:
            self.problems += [replace(each, severity=severity) for each in sorted(caveats, key=lambda each: each.where)]
        elif isinstance(self.base, CalibratedBase):
            self.problems += self.base.check_ranges(ranges)
        self.problems += [] if wishes.get("on_quantized") == DEQUANTIZE else check_codes(entries)

    def plan_weights(self, wishes: SettledWishes) -> tuple[PlannedWeight, ...]:
        """Return the weights of the plan, sorted; problems are kept."""
        way = wishes.get("on_quantized")
        dequantise = way == DEQUANTIZE
        if way not in (None, DEQUANTIZE):
            self.problems.append(Problem("LF626", "--on-quantized", str(way), f"{DEQUANTIZE}"))
        keep_scales = wishes.get("keep_scales", False) or dequantise
        planned = [
            plan_weight(table, group[0].weight, self.problems, keep_scales=keep_scales)
            for group in self.changes.values()
            for table in part_tables(
                group[0].weight,
                group,
                self._sites,
                self.problems,
                keep_whole=dequantise and group[0].weight.coding is not None,
            )
        ]
        if dequantise:
            planned = [
                make_float(each, self.base, self.problems) if each and each.is_coded else each for each in planned
            ]
            planned += plan_joint_floats(self.base, [each for each in planned if each], self.problems)
        planned += self._plan_biases(dequantise=dequantise)
        return tuple(sorted((weight for weight in planned if weight), key=lambda weight: (weight.name, weight.key)))

    def _plan_biases(self, *, dequantise: bool) -> Iterator[PlannedWeight | None]:
        """Yield the biases that the base lacks and gets; those of zeros are noted."""
        for group in self.biases.values():
            bias = group[0][0]
            self.problems += check_composition([WeightChange(b.as_match(), b.beside.weight, c) for b, c in group])
            if bias.reader and all(each.is_zero for each, _ in group):
                self.problems += report_zeros([bias])
            elif bias.reader and dequantise and bias.beside.weight.coding is not None:
                found = f"codes of {bias.beside.weight.name!r}, which become floats by the same merge"
                self.problems.append(Problem("LF630", bias.want.name, found, "one of both", _ONE_BY_ONE))
            else:
                yield plan_bias(bias, [change for _, change in group])


def build_plan(
    base: BaseModel,
    adapters: Sequence[WeightedAdapter],
    output: Path,
    *,
    hints: Hints = _NO_HINTS,
    **wishes: Unpack[SettledWishes],
) -> Plan:
    """Plan the merge of `adapters` into `base`.

    Args:
        base: the opened base.
        adapters: what to merge, in the order in which deltas are summed.
        output: where the merged model will stand.
        hints: what there is to find targets by, besides names.
        wishes: `SettledWishes` says what there is.

    Raises:
        LoraformatError: with every problem that was found, not only the first.
    """
    found = _Found(choose_graphs(base, wishes.get("graphs", ())))
    found.problems += _find_repeated(adapters)
    for position, item in enumerate(adapters):
        _resolve_adapter(found, position, item, wishes, hints)
    found.check_sites(wishes)
    planned = found.plan_weights(wishes)
    return _compose_plan(base, adapters, output, wishes, found, planned)


def _resolve_adapter(found: _Found, position: int, item: WeightedAdapter, wishes: SettledWishes, hints: Hints) -> None:
    """Add what one adapter changes, or what stands against it."""
    allow_zero = wishes.get("allow_zero", False)
    checked = check_adapter(item.adapter, allow_zero=allow_zero)
    checked += _check_weight(item, allow_zero=allow_zero)
    checked, unread = _leave_out(checked, wishes.get("allow_unmatched", ()))
    found.problems += checked
    if any(problem.severity == "error" for problem in checked):
        found.counts.append(0)
        return
    clues = gather_clues(item.adapter, found.base, hints, strip_prefix=wishes.get("strip_prefix"))
    resolution = resolve(
        item.adapter,
        found.base.sites,
        allow_unmatched=wishes.get("allow_unmatched", ()),
        strip_prefix=wishes.get("strip_prefix"),
        ignore_fingerprints=wishes.get("ignore_fingerprints", False),
        untie=wishes.get("untie", False),
        new_biases=wishes.get("new_biases", False),
        clues=clues,
    )
    found.add(position, item, replace(resolution, unmatched=(*resolution.unmatched, *unread)), clues)


def _leave_out(problems: list[Problem], globs: Sequence[str]) -> tuple[list[Problem], list[str]]:
    """Return the problems without those of flat names that may be left out, as the base lacks them, and these names."""
    names = [each.where for each in problems if each.code == _FLAT and any(fnmatchcase(each.where, g) for g in globs)]
    return [each for each in problems if each.code != _FLAT or each.where not in names], names


def _compose_plan(
    base: BaseModel,
    adapters: Sequence[WeightedAdapter],
    output: Path,
    wishes: SettledWishes,
    found: _Found,
    planned: tuple[PlannedWeight, ...],
) -> Plan:
    """Return the plan, or raise what stands against it."""
    config_changes, followed = follow_weights(planned, base.sites, untied=found.untied)
    if isinstance(base, DequantisingBase) and any(weight.is_dequantised for weight in planned):
        config_changes = {**config_changes, **base.tell_floats()}
    if isinstance(base, LayeredBase) and base.sources:
        planned, config_changes = place_anew(planned), {**config_changes, **base.tell_layers()}
    problems = found.problems + followed
    if any(problem.severity == "error" for problem in problems):
        raise error_for([problem for problem in problems if problem.severity == "error"])
    rewriting = None
    anew, dtype = wishes.get("anew", False), wishes.get("dtype")
    if anew or dtype is not None or config_changes or any(_is_anew(weight, base) for weight in planned):
        rewriting = plan_rewriting(base, planned, dtype, anew=anew, config_changes=config_changes)
        problems += rewriting.problems
    return Plan(
        base=describe_base(base),
        format=base.format,
        output=output,
        adapters=tuple(
            PlannedAdapter(item.name, item.adapter.sha256, item.weight, count)
            for item, count in zip(adapters, found.counts, strict=True)
        ),
        weights=rewriting.weights if rewriting else planned,
        unmatched=tuple(found.unmatched),
        problems=tuple(problems),
        config_changes=rewriting.config_changes if rewriting else {},
        rewritten=rewriting is not None,
        options=list_unusual(wishes),
    )


def _is_anew(weight: PlannedWeight, base: BaseModel) -> bool:
    """Say whether a weight needs an output that is written anew: floats for codes do where the base is no graph."""
    in_place = weight.is_copy or weight.is_added or (weight.is_dequantised and base.rewriter is None)
    return weight.new is not None and not in_place


def describe_base(base: BaseModel) -> dict[str, Any]:
    """Return what a plan and a receipt say about the base: names, sizes, and the digest of its structure."""
    root = base.path if base.folder_mark else base.path.parent
    files = sorted((os.path.relpath(file.path, root), file.size_bytes) for file in base.files)
    return {
        "name": escape_surrogates(base.path.name),
        "structure_sha256": base.structure_sha256,
        "files": [{"name": escape_surrogates(name), "bytes": size} for name, size in files],
    }


def _find_repeated(adapters: Sequence[WeightedAdapter]) -> list[Problem]:
    """Return warnings of adapters that are given more than once; those of no file have no digest."""
    counts = Counter(item.adapter.sha256 for item in adapters if item.adapter.sha256)
    first = {item.adapter.sha256: item.name for item in reversed(adapters)}
    repeated = ((first[digest], count) for digest, count in counts.items() if count > 1)
    return [
        Problem("LF838", name, f"given {count} times, and added each time", "once", severity="warning")
        for name, count in repeated
    ]


def _check_weight(item: WeightedAdapter, *, allow_zero: bool) -> list[Problem]:
    if not math.isfinite(item.weight):
        return [Problem("LF207", item.name, f"weight {item.weight}", "a finite number")]
    if item.weight == 0 and not allow_zero:
        return [Problem("LF208", item.name, "weight 0", "a weight other than 0, or --allow-zero")]
    return []


def _plan_change(position: int, match: Match, item: WeightedAdapter, extent: tuple[int, ...] = ()) -> PlannedChange:
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
        row_factors=match.row_factors,
        row_order=match.row_order,
        shape=change.shape if change.shape != match.want.shape else (),
        extent=extent,
    )


def _check_scale(change: PlannedChange) -> list[Problem]:
    """Return a problem when a product of finite numbers is none that tiles can be computed with."""
    if abs(change.scale) <= _FLOAT32_MAX:
        return []
    return [Problem("LF207", change.target, f"the multiplier {change.scale}", f"at most {_FLOAT32_MAX:.6g}")]


def default_output(base: Path, suffix: str, adapters: Sequence[WeightedAdapter]) -> Path:
    """Return `<base>-<adapter>[@<weight>]...<suffix>` beside the base, or here where that is in a hub's cache."""
    parts = [name_in_hub(base) or base.name.removesuffix(suffix)]
    parts += [item.name if item.weight == 1 else f"{item.name}@{item.weight:g}" for item in adapters]
    folder = Path.cwd() if any(map(name_in_hub, base.parents)) else base.parent
    return folder / ("-".join(parts) + suffix)
