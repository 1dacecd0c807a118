"""From the names of an adapter's targets to the weights of a base.

The only place that sees both names. A target is matched by the module path that the base's evidence gives a site: the
same path, or one path ending with the other at a dot (a wrapper around the exported model, or a part of it exported
alone). What is dropped from a target's own name must hold no number, or layers could be mistaken for one another, and
no half of an encoder-decoder, which have modules of the same names; that anything was dropped is said. Every target is
consumed exactly once, or the error says which were near.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Final

from loraformat.adapter import Adapter, SlotKind, Target
from loraformat.bases import TENSOR_NAME, Site, Weight
from loraformat.fingerprint import positions, read_number
from loraformat.kinds import KINDS, REST, UNKNOWN, Change, Nature, SizedByBase, fits_shape
from loraformat.problems import Problem
from loraformat.site_index import Candidate, SiteIndex
from loraformat.spans import Part

_LISTED: Final = 8
BY_FINGERPRINT: Final = "fingerprint"


@dataclass(frozen=True, slots=True, eq=False)
class Want:
    """One change of one parameter that a target asks for.

    Attributes:
        target: the target.
        change: what its kind does to the parameter.
    """

    target: Target
    change: Change

    @property
    def parameter(self) -> str:
        """`weight`, `bias` ..."""
        return self.change.parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """Its canonical shape."""
        return self.change.shape

    @property
    def is_main(self) -> bool:
        """Whether it changes the weight that the target's fingerprint was taken from."""
        return self.parameter == "weight" and self.change.slot in (self.target.slot, SlotKind.CONV)

    @property
    def name(self) -> str:
        """Its name for people: the target's, with the parameter where that does not go without saying."""
        return f"{self.target.name}.{self.parameter}" if self.change.slot is SlotKind.PARAMETER else self.target.name


@dataclass(frozen=True, slots=True)
class Match:
    """One parameter that a target changes, and the weight that it is in the base.

    Attributes:
        want: the target and its parameter.
        weights: the stored weight; several where the exporter wrote copies of it, one for each call of the module.
        sites: where the base applies it, all of this target and, where the base splits the module, of one section.
        transposed: whether the stored matrix is the transpose of the canonical `(out, in * kernel)`.
        divisor: what the site multiplies its weight by.
        evidence: how the weight was found.
        relation: how the names differ: empty, `+prefix` that the base has more, `-prefix` that it lacks, `fingerprint`.
    """

    want: Want
    weights: tuple[Weight, ...]
    sites: tuple[Site, ...]
    transposed: bool
    divisor: float
    evidence: str
    relation: str

    @property
    def change(self) -> Change:
        """What the target's kind does to the parameter, in the shape that it has in the base."""
        return replace(self.want.change, shape=settle_shape(self.want, self.sites))

    @property
    def target(self) -> Target:
        """The adapter's target."""
        return self.want.target

    @property
    def weight(self) -> Weight:
        """The stored weight, the first of its copies."""
        return self.weights[0]

    @property
    def part(self) -> Part | None:
        """Where in the stored tensor it is; None for all of it."""
        return self.sites[0].part

    @property
    def section(self) -> tuple[int, int] | None:
        """The rows of the change that this weight holds; None for all."""
        return self.sites[0].section


@dataclass(frozen=True, slots=True)
class Resolution:
    """The outcome for one adapter: every target is in one of the three."""

    matches: tuple[Match, ...]
    unmatched: tuple[str, ...]
    problems: tuple[Problem, ...]


def resolve(
    adapter: Adapter,
    sites: Sequence[Site],
    *,
    allow_unmatched: Sequence[str] = (),
    strip_prefix: str | None = None,
    ignore_fingerprints: bool = False,
) -> Resolution:
    """Match every target of `adapter` with a weight.

    Args:
        adapter: the adapter; its targets have passed their kind's check.
        sites: the base's sites.
        allow_unmatched: glob patterns of target names that may be left out when nothing matches.
        strip_prefix: removed from the front of target names before they are matched.
        ignore_fingerprints: accept weights that do not match the fingerprint of their target.
    """
    wants = [want for target in adapter.targets for want in _list_wants(target)]
    indexes = {parameter: SiteIndex(sites, parameter) for parameter in {want.parameter for want in wants}}
    names = {want.target.name: _strip(want.target.name, strip_prefix) for want in wants}
    found = {want: indexes[want.parameter].find(names[want.target.name]) for want in wants}
    usual = _usual_relation(found)
    matches: list[Match] = []
    missing: list[Want] = []
    problems: list[Problem] = []
    for want in wants:
        candidates = found[want] or find_by_fingerprint(want, sites)
        if not candidates and want.change.is_optional and _is_complete(want, sites):
            continue
        if not candidates:
            missing.append(want)
            continue
        opened = _open_slot(want, candidates)
        outcome = _match(opened, candidates, usual)
        if not isinstance(outcome, Problem) and not ignore_fingerprints:
            outcome = _check_fingerprint(opened, outcome)
        if isinstance(outcome, Problem):
            problems.append(outcome)
        else:
            matches += outcome
    matches, displaced = _prefer_exact(matches)
    missing += displaced
    allowed = [want for want in missing if any(fnmatchcase(want.target.name, glob) for glob in allow_unmatched)]
    lost = [(want.name, names[want.target.name], indexes[want.parameter]) for want in missing if want not in allowed]
    problems += _report_missing(lost) + _report_collisions(matches) + _report_dropped(matches)
    return Resolution(tuple(matches), tuple(want.name for want in allowed), tuple(problems))


def _list_wants(target: Target) -> list[Want]:
    kind = KINDS.find(target.kind)
    assert kind is not None, "checked before"
    return [Want(target, change) for change in kind.changes(target)]


def _open_slot(want: Want, candidates: Sequence[Candidate]) -> Want:
    """Return the want with the slot that the base has, where the factors do not tell a kernel from a matrix."""
    slots = {slot for candidate in candidates for slot in candidate.site.transposed}
    if not want.change.is_flat or want.change.slot in slots or SlotKind.CONV not in slots:
        return want
    change = replace(want.change, slot=SlotKind.CONV, shape=(want.shape[0], UNKNOWN, REST))
    return replace(want, change=change)


def find_by_fingerprint(want: Want, sites: Sequence[Site]) -> list[Candidate]:
    """Return the sites whose weights have the numbers that the target's fingerprint says, whatever their names."""
    fingerprint = want.target.fingerprint
    if fingerprint is None or not fingerprint.is_telling or not want.is_main:
        return []
    return [
        Candidate(site, BY_FINGERPRINT)
        for site in sites
        if want.change.slot in site.transposed
        and site.weight is not None
        and _fits(want, site)
        and fingerprint.matches(sample_sites(want, [site]))
    ]


def sample_sites(want: Want, sites: Sequence[Site]) -> tuple[float, ...]:
    """Return the samples of the weight that sites apply, one or several sections, at the positions of the target."""
    shape = settle_shape(want, sites)
    return tuple(_read_sample(shape, want, sites, row, column) for row, column in positions(want.target.name, shape))


def settle_shape(want: Want, sites: Sequence[Site]) -> tuple[int, ...]:
    """Return the canonical shape, with what the factors do not tell taken from the sites."""
    if UNKNOWN not in want.shape and REST not in want.shape:
        return want.shape
    stored = sites[0].stored_shape()
    shape = stored[::-1] if sites[0].transposed[want.change.slot] else stored
    return shape if want.shape[0] == UNKNOWN else (want.shape[0], *shape[1:])


def _is_complete(want: Want, sites: Sequence[Site]) -> bool:
    """Say whether a parameter that was not found is surely not there: a state dict lists all that it has."""
    return all(site.evidence == TENSOR_NAME for site in sites)


def _read_sample(shape: tuple[int, ...], want: Want, sites: Sequence[Site], row: int, column: int) -> float:
    site = next((site for site in sites if site.section and site.section[0] <= row < site.section[1]), sites[0])
    assert site.weight is not None, "chosen so"
    first, stop = site.section or (0, shape[0])
    rows, columns = stop - first, math.prod(shape[1:])
    turned = site.transposed[want.change.slot]
    place = (column, row - first) if turned else (row - first, column)
    index = site.part.index(*place) if site.part else place[0] * (rows if turned else columns) + place[1]
    return read_number(site.weight.tensor, index) * site.divisor


def _check_fingerprint(want: Want, matches: list[Match]) -> list[Match] | Problem:
    fingerprint = want.target.fingerprint
    if fingerprint is None or not want.is_main:
        return matches
    samples = sample_sites(want, [site for match in matches for site in match.sites])
    shape = settle_shape(want, [site for match in matches for site in match.sites])
    if fingerprint.shape == shape and fingerprint.matches(samples):
        return matches
    near = sum(abs(a - b) <= abs(a) / 16 for a, b in zip(fingerprint.samples, samples, strict=True))
    names = ", ".join(repr(match.weight.name) for match in matches)
    found = f"the weight {names}, with {near} of {len(samples)} sampled numbers near the expected ones"
    return Problem("LF406", want.target.name, found, "the weight that its fingerprint was taken from")


def _strip(name: str, prefix: str | None) -> str:
    return name.removeprefix(prefix) if prefix else name


def _usual_relation(found: Mapping[Want, Sequence[Candidate]]) -> str | None:
    """Return how names differ between adapter and base, as the targets without a second reading show it."""
    relations: Counter[str] = Counter()
    for candidates in found.values():
        distinct = {candidate.relation for candidate in candidates}
        if len(distinct) == 1:
            relations.update(distinct)
    return relations.most_common(1)[0][0] if relations else None


def _match(want: Want, candidates: Sequence[Candidate], usual: str | None) -> list[Match] | Problem:
    """Return the weight that the candidates lead to, or the weights of its sections, or why there is none."""
    if len({candidate.relation for candidate in candidates}) > 1:
        candidates = [candidate for candidate in candidates if candidate.relation == usual] or candidates
    sites = [candidate.site for candidate in candidates]
    usable = [site for site in sites if want.change.slot in site.transposed]
    if not usable:
        kinds = sorted({str(kind) for site in sites for kind in site.transposed})
        return Problem("LF408", want.name, f"a slot for {', '.join(kinds) or 'nothing'}", f"a {want.change.slot} slot")
    fitting = [site for site in usable if site.weight is None or _fits(want, site)]
    if not fitting:
        return _report_shape(want, usable)
    blocked = next((site.obstacle for site in fitting if site.obstacle is not None), None)
    if blocked is not None:
        return Problem(blocked.code, f"{want.name} at {blocked.where}", blocked.found, blocked.expected, blocked.mend)
    outcomes = [_match_weight(want, group, candidates[0].relation) for group in _split_sections(fitting)]
    problems = [outcome for outcome in outcomes if isinstance(outcome, Problem)]
    return problems[0] if problems else [outcome for outcome in outcomes if isinstance(outcome, Match)]


def _split_sections(sites: Sequence[Site]) -> list[list[Site]]:
    """Return the sites of each section of a module that the base splits; one group where it does not.

    Sites that hold the module whole come before those that hold sections of it.
    """
    whole = [site for site in sites if site.section is None]
    if whole:
        return [whole]
    groups: dict[tuple[int, int] | None, list[Site]] = defaultdict(list)
    for site in sorted(sites, key=lambda site: site.section or (0, 0)):
        groups[site.section].append(site)
    return list(groups.values())


def _match_weight(want: Want, sites: Sequence[Site], relation: str) -> Match | Problem:
    by_key = {site.weight.key: site.weight for site in sites if site.weight is not None}
    weights = tuple(by_key.values())
    manners = {(site.transposed[want.change.slot], site.divisor, site.part) for site in sites}
    nameless = relation == BY_FINGERPRINT and len(sites) > 1 and not _are_of_one_module(sites)
    if nameless or len(manners) != 1 or (len(weights) != 1 and not _are_copies(sites, weights)):
        listed = "; ".join(f"{site.module} ({site.evidence}) reads {_name(site)}" for site in sites[:_LISTED])
        return Problem("LF404", want.name, f"several weights or several ways to read one: {listed}", "one weight")
    for weight in weights:
        strangers = sorted(weight.consumers - {site.id for site in sites})
        if strangers:
            found = f"the tensor {weight.name!r} is also read by {', '.join(strangers[:_LISTED])}"
            return Problem("LF402", want.name, found, "a tensor that nothing else reads")
    wrong = _check_size(want, sites)
    if wrong is not None:
        return wrong
    transposed, divisor, _ = manners.pop()
    evidence = BY_FINGERPRINT if relation == BY_FINGERPRINT else sites[0].evidence
    return Match(want, weights, tuple(sites), transposed, divisor, evidence, relation)


def _check_size(want: Want, sites: Sequence[Site]) -> Problem | None:
    """Return what the kind has against the sizes that its factors did not tell."""
    kind = KINDS.find(want.target.kind)
    shape = settle_shape(want, sites)
    if shape == want.shape or not isinstance(kind, SizedByBase):
        return None
    if sites[0].section is not None and want.shape[0] == UNKNOWN:
        found = f"a base that splits the module, and factors of {want.target.kind} that do not tell its rows"
        return Problem("LF408", want.name, found, "the module in one weight")
    return next(iter(kind.check_size(want.target, replace(want.change, shape=shape))), None)


def _are_copies(sites: Sequence[Site], weights: Sequence[Weight]) -> bool:
    """Say whether several tensors are one parameter, written once for each call: one module, equal to the last bit."""
    first, *others = (weight.tensor for weight in weights)
    return _are_of_one_module(sites) and all(first.equals(other) for other in others)


def _are_of_one_module(sites: Sequence[Site]) -> bool:
    """Say whether sites are known to be of one module; of sites without a name nothing is known."""
    return len({site.module for site in sites}) == 1 and bool(sites[0].module)


def _name(site: Site) -> str:
    return site.weight.name if site.weight is not None else "nothing"


def _fits(want: Want, site: Site) -> bool:
    stored, wanted = site.stored_shape(), _stored_shape(want, site)
    if fits_shape(stored, wanted):
        return True
    grown = site.grows and len(stored) == len(wanted) and wanted[0] > stored[0] and wanted[1:] == stored[1:]
    return grown and _brings_rows(want)


def _brings_rows(want: Want) -> bool:
    """Say whether the target brings values of its own for all rows: then there may be more of them than are stored."""
    kind = KINDS.find(want.target.kind)
    assert kind is not None, "checked before"
    changes = kind.changes(want.target)
    return any(each.nature is Nature.REPLACEMENT and each.parameter == want.parameter for each in changes)


def _stored_shape(want: Want, site: Site) -> tuple[int, ...]:
    """Return the shape in which the target's weight would be stored at the site."""
    shape = want.shape
    if site.section is not None:
        shape = (site.section[1] - site.section[0], *shape[1:])
    if site.part is not None and len(shape) == 1:
        shape = (*shape, 1)
    return shape[::-1] if site.transposed[want.change.slot] else shape


def _report_shape(want: Want, sites: Sequence[Site]) -> Problem:
    site = next(site for site in sites if site.weight is not None)
    stored, wanted = site.stored_shape(), _stored_shape(want, site)
    turned = " (it would fit transposed, which is never guessed)" if stored == wanted[::-1] else ""
    found = f"the weight {_name(site)!r} is {stored}{turned}"
    shown = str(wanted).replace(str(UNKNOWN), "any").replace(str(REST), "...")
    return Problem("LF405", want.name, found, f"{shown} for its factors")


def _report_missing(lost: Sequence[tuple[str, str, SiteIndex]]) -> list[Problem]:
    """Return one problem for each of the first few names, and one that lists the rest."""
    problems = []
    for name, looked_for, index in lost[:_LISTED]:
        near = index.near(looked_for)
        found = f"nothing of this name; nearest: {', '.join(near)}" if near else "nothing of this name, and none near"
        problems.append(Problem("LF401", name, found, f"one of {len(index.paths)} modules of the base"))
    rest = [name for name, *_ in lost[_LISTED:]]
    if rest:
        problems.append(Problem("LF401", f"{len(rest)} more targets", f"nothing of these names: {', '.join(rest)}"))
    return problems


def _report_collisions(matches: Sequence[Match]) -> list[Problem]:
    """Return a problem for every weight, or part of one, that two targets of one adapter lead to."""
    return [
        Problem(
            "LF404",
            " and ".join(dict.fromkeys(match.target.name for match in group)),
            f"both lead to {group[0].weight.name!r} ({group[0].sites[0].module})",
            "a weight for each",
            "Drop the part of the names that the base lacks with --strip-prefix, or leave one out.",
        )
        for group in _group_by_weight(matches)
        if len({match.target.name for match in group}) > 1
    ]


def _group_by_weight(matches: Sequence[Match]) -> list[list[Match]]:
    groups: dict[tuple[str, Part | None], list[Match]] = defaultdict(list)
    for match in matches:
        groups[match.weight.key, match.part].append(match)
    return list(groups.values())


def _prefer_exact(matches: Sequence[Match]) -> tuple[list[Match], list[Want]]:
    """Return the matches that stand, and the targets that only came to a weight by dropping a prefix.

    Where one target of several has the weight's very name, the others mean something else that the base lacks.
    """
    kept: list[Match] = []
    displaced: list[Want] = []
    for group in _group_by_weight(matches):
        exact = [match for match in group if not match.relation.startswith("-")]
        named = {match.target.name for match in group}
        if len(named) > 1 and len({match.target.name for match in exact}) == 1:
            kept += exact
            displaced += [match.want for match in group if match not in exact]
        else:
            kept += group
    return kept, displaced


def _report_dropped(matches: Sequence[Match]) -> list[Problem]:
    """Return a warning for every prefix that was dropped from targets' names."""
    dropped = Counter(match.relation[1:] for match in matches if match.relation.startswith("-"))
    return [
        Problem(
            "LF306", prefix, f"dropped from the names of {count} targets", "the base's own names", severity="warning"
        )
        for prefix, count in sorted(dropped.items())
    ]
