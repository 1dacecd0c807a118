"""From the names of an adapter's targets to the weights of a base.

The only place that sees both names. A target is matched by the module path that the base's evidence gives a site: the
same path, a name that a library gave the module before or since (`renames.py`), or one path ending with the other at a
dot (a wrapper around the exported model, or a part of it exported alone). What is dropped from a target's own name must
hold no number, or layers could be mistaken for one another, and no half of an encoder-decoder, which have modules of
the same names; that anything was dropped is said. Every target is consumed exactly once, or the error says which were
near.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from loraformat.adapter import Adapter
from loraformat.bases import TENSOR_NAME, AnchoredBase, BaseModel, Site, StructuredBase, View, ViewedBase
from loraformat.errors import refuse
from loraformat.evidence import Clues, Hints, Lookup, find_candidates
from loraformat.evidence._agreement import report_disagreement
from loraformat.evidence.structure import list_lacking
from loraformat.evidence.values import STRATEGY as VALUES
from loraformat.evidence.values import verify_values
from loraformat.lacking import NewBias, find_lacking, report_lacking
from loraformat.matching import (
    Match,
    Want,
    list_wants,
    open_slot,
    sample_sites,
    settle_shape,
)
from loraformat.matching.choosing import BY_NAMES, choose_weights
from loraformat.matching.mismatches import (
    group_by_weight,
    report_collisions,
    report_dropped,
    report_missing,
    report_renamed,
)
from loraformat.matching.sharing import settle_sharing
from loraformat.matching.site_index import Candidate
from loraformat.problems import Problem
from loraformat.viewing import (
    choose_mapped,
    is_allowed,
    leave_out,
    plan_searches,
    report_absent,
    report_left_out,
)

_NO_CLUES: Final = Clues()
_OF_STRATEGIES: Final = frozenset({"LF425", "LF450"})
"""What strategies say of themselves."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """The outcome for one adapter: every target is in one of the four.

    Attributes:
        matches: what was found.
        unmatched: names of what the base lacks, and may.
        problems: what is wrong, and what is to be said.
        new_biases: biases that the base lacks, and gets.
    """

    matches: tuple[Match, ...]
    unmatched: tuple[str, ...]
    problems: tuple[Problem, ...]
    new_biases: tuple[NewBias, ...] = ()


def resolve(
    adapter: Adapter,
    sites: Sequence[Site],
    *,
    allow_unmatched: Sequence[str] = (),
    strip_prefix: str | None = None,
    ignore_fingerprints: bool = False,
    untie: bool = False,
    new_biases: bool = False,
    clues: Clues = _NO_CLUES,
) -> Resolution:
    """Match every target of `adapter` with a weight.

    Args:
        adapter: the adapter; its targets have passed their kind's check.
        sites: the base's sites.
        allow_unmatched: glob patterns of target names that may be left out when nothing matches.
        strip_prefix: removed from the front of target names before they are matched.
        ignore_fingerprints: accept weights that do not match the fingerprint of their target.
        untie: let tables part that the configuration ties, where the adapter changes them apart.
        new_biases: give biases to modules that have none, where the adapter changes them.
        clues: what else the user has handed over.
    """
    wants = [want for target in adapter.targets for want in list_wants(target)]
    names = {want.target.name: _strip(want.target.name, strip_prefix) for want in wants}
    lookup = Lookup(sites, wants, names, clues)
    if clues.views:
        matches, missing, lacking, problems = _match_views(
            lookup, allow_unmatched, ignore_fingerprints=ignore_fingerprints
        )
    else:
        matches, missing, problems = _match_all(lookup, ignore_fingerprints=ignore_fingerprints)
        lacking = find_lacking(missing, matches, lookup)
    matches, displaced = _prefer_exact(matches)
    matches, shared = settle_sharing(matches, sites, untie=untie)
    missing += displaced
    elsewhere = leave_out(missing, clues.views, names) if any(not view.is_chosen for view in clues.views) else []
    missing = [want for want in missing if want not in elsewhere]
    made = {each.want for each in lacking if new_biases and each.obstacle is None}
    asked = dict.fromkeys([*missing, *(each.want for each in lacking)])
    allowed = [want for want in asked if want not in made and is_allowed(want, allow_unmatched)]
    lacking = [each for each in lacking if each.want not in allowed]
    spoken = {each.want for each in lacking} | set(allowed)
    lost = [(want, names[want.target.name], lookup.indexes[want.parameter]) for want in missing if want not in spoken]
    if lost:  # Then what the strategy has to say for itself is why.
        problems = [replace(each, severity="error") if each.code in _OF_STRATEGIES else each for each in problems]
    problems += report_missing(lost, sites) + shared + report_collisions(matches)
    problems += (
        report_left_out(elsewhere)
        + report_dropped(matches)
        + report_renamed(matches)
        + report_lacking(lacking, wanted=new_biases)
    )
    left_out = tuple(want.name for want in (*allowed, *elsewhere))
    return Resolution(tuple(matches), left_out, tuple(problems), tuple(each for each in lacking if each.want in made))


def locate_reference(
    adapter: Adapter, checkpoint: BaseModel, *, strip_prefix: str | None = None
) -> Mapping[tuple[str, str], Sequence[Match]]:
    """Return where a torch checkpoint has the parameters that an adapter changes; those that it lacks are left out."""
    plain = replace(adapter, targets=tuple(replace(target, fingerprint=None) for target in adapter.targets))
    found: dict[tuple[str, str], list[Match]] = defaultdict(list)
    wants = [want for target in plain.targets for want in list_wants(target)]
    names = {want.target.name: _strip(want.target.name, strip_prefix) for want in wants}
    lookup = Lookup(checkpoint.sites, wants, names, _NO_CLUES)
    for match in _match_all(lookup, ignore_fingerprints=True)[0]:
        held = found[match.target.name, match.want.parameter]
        if not held or held[0].want == match.want:  # A saved base weight beside an adapter of it asks for the same.
            held.append(match)
    return found


def gather_clues(adapter: Adapter, base: BaseModel, hints: Hints, *, strip_prefix: str | None = None) -> Clues:
    """Return what there is to find the targets of an adapter in a base by, besides names; LF425 for no graph."""
    reference = locate_reference(adapter, hints.checkpoint, strip_prefix=strip_prefix) if hints.checkpoint else {}
    if isinstance(base, ViewedBase):
        if hints.structure and any(view.find_roles is None for view in base.views):
            raise refuse("LF425", base.path, f"a base of the format {base.format!r}", "ONNX models")
        return Clues(hints.mapped, reference, views=base.views, in_views=hints.structure)
    anchors = base.find_anchors if isinstance(base, AnchoredBase) else None
    if not hints.structure:
        return Clues(hints.mapped, reference, anchors=anchors)
    if not isinstance(base, StructuredBase):
        raise refuse("LF425", base.path, f"a base of the format {base.format!r}", "an ONNX model")
    return Clues(hints.mapped, reference, base.find_roles(), anchors)


def _match_all(lookup: Lookup, *, ignore_fingerprints: bool) -> tuple[list[Match], list[Want], list[Problem]]:
    found = {want: find_candidates(want, lookup) for want in lookup.wants}
    usual = _usual_relation(found)
    matches: list[Match] = []
    missing: list[Want] = []
    problems = lookup.problems
    for want, candidates in found.items():
        opened = open_slot(want, [candidate.site for candidate in candidates]) if candidates else want
        outcome = _match_verified(opened, candidates, usual, lookup)
        if outcome and not isinstance(outcome, Problem) and not ignore_fingerprints:
            outcome = _check_fingerprint(opened, outcome)
        if isinstance(outcome, Problem):
            problems.append(outcome)
        elif outcome:
            matches += outcome
        elif not (want.change.is_optional and _lists_all(lookup.sites)):
            missing.append(want)
    return matches, missing, problems


def _match_views(
    lookup: Lookup, allowed: Sequence[str], *, ignore_fingerprints: bool
) -> tuple[list[Match], list[Want], list[NewBias], list[Problem]]:
    """Match in each of several graphs by itself."""
    clues = lookup.clues
    searches, problems = plan_searches(clues.views, lookup.wants, lookup.names)
    matches: list[Match] = []
    lacking: list[NewBias] = []
    met: set[Want] = set()
    said = dict.fromkeys(problems)
    for search in searches:
        mapped = choose_mapped(clues.mapped, search.view, clues.views)
        roles = search.view.find_roles() if clues.in_views and search.view.find_roles is not None else None
        own = Clues(mapped, clues.reference, roles, search.view.find_anchors)
        inside = Lookup(search.view.sites, search.wants, search.names, own)
        found, missing, odd = _match_all(inside, ignore_fingerprints=ignore_fingerprints)
        search.lacking.update(list_lacking(inside))
        absent = find_lacking(missing, found, inside)
        matches += found
        lacking += absent
        met |= set(search.wants).difference(missing).union(each.want for each in absent)
        said |= dict.fromkeys(_mark_view(odd, search.view))
    ambiguous = {problem.where for problem in problems}
    missing = [want for want in lookup.wants if want.name not in ambiguous and want not in met]
    problems = [*said, *report_disagreement(matches), *report_absent(searches, matches, allowed)]
    return matches, missing, lacking, problems


def _mark_view(problems: Sequence[Problem], view: View) -> Sequence[Problem]:
    """Return problems, with the graph in what strategies say of themselves."""
    return [
        replace(each, where=f"{view.graph}: {each.where}") if each.code in _OF_STRATEGIES else each for each in problems
    ]


def _match_verified(
    want: Want, candidates: Sequence[Candidate], usual: str | None, lookup: Lookup
) -> list[Match] | Problem:
    """Return the weight that candidates lead to, once its numbers are those of the checkpoint; nothing for none."""
    mapped = lookup.clues.mapped.get((want.target.name, want.parameter))
    if mapped and not (candidates and candidates[0].strategy == "map"):
        found = f"the map's weight {mapped[0].weight!r}, which no site of the base reads as a {want.change.slot} slot"
        return Problem("LF420", want.name, found, "a weight of the base")
    verified = verify_values(want, candidates, lookup)
    if isinstance(verified, Problem):
        return verified
    if not verified and candidates:
        verified = VALUES.find(want, lookup)
    return choose_weights(want, verified, usual) if verified else []


def _lists_all(sites: Sequence[Site]) -> bool:
    """Say whether a parameter that was not found is surely not there: a state dict lists all that it has."""
    return any(site.evidence == TENSOR_NAME for site in sites)


def _check_fingerprint(want: Want, matches: list[Match]) -> list[Match] | Problem:
    fingerprint = want.target.fingerprint
    sites = [site for match in matches for site in match.sites]
    is_coded = any(site.weight is not None and site.weight.coding is not None for site in sites)
    if fingerprint is None or not want.is_main or is_coded:  # Of numbers that were rounded to a few codes, none tells.
        return matches
    samples, shape = sample_sites(want, sites), settle_shape(want, sites)
    if fingerprint.shape == shape and fingerprint.matches(samples):
        return [replace(match, verified=(*match.verified, "fingerprint")) for match in matches]
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
        distinct = {candidate.relation for candidate in candidates if candidate.strategy == BY_NAMES}
        if len(distinct) == 1:
            relations.update(distinct)
    return relations.most_common(1)[0][0] if relations else None


def _prefer_exact(matches: Sequence[Match]) -> tuple[list[Match], list[Want]]:
    """Return the matches that stand, and the targets that only came to a weight by dropping a prefix.

    Where one target of several has the weight's very name, the others mean something else that the base lacks.
    """
    kept: list[Match] = []
    displaced: list[Want] = []
    for group in group_by_weight(matches):
        exact = [match for match in group if not match.relation.startswith("-")]
        named = {match.target.name for match in group}
        if len(named) > 1 and len({match.target.name for match in exact}) == 1:
            kept += exact
            displaced += [match.want for match in group if match not in exact]
        else:
            kept += group
    return kept, displaced
