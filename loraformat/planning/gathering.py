"""What the adapters of a plan change, gathered weight by weight, and what stands against it."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from loraformat.bases import BaseModel, CalibratedBase
from loraformat.evidence import Clues
from loraformat.kinds import KINDS, Nature
from loraformat.lacking import NewBias, report_zeros
from loraformat.matching import Match
from loraformat.plan import WeightedAdapter
from loraformat.plan.changes import PlannedChange
from loraformat.plan.weights import PlannedWeight
from loraformat.planning.coded_plans import DEQUANTIZE, check_codes, make_float, plan_joint_floats, plan_references
from loraformat.planning.extents import find_neighbours, measure_together
from loraformat.planning.weight_plans import WeightChange, check_composition, part_tables, plan_bias, plan_weight
from loraformat.planning.wishes import SettledWishes
from loraformat.problems import Problem, Severity
from loraformat.resolve import Resolution

_ONE_BY_ONE: Final = "Merge with --on-quantized dequantize and no bias, then the bias into that model."
_FLOAT32_MAX: Final = (2.0 - 2.0**-23) * 2.0**127


class Found:
    """What the adapters of a plan change, gathered; problems are kept."""

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
