"""From the sites that may be a target's to the weights that it changes: one, or those of its sections, or why none."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from loraformat.bases import OF_TENSORS, Site, Weight
from loraformat.kinds import UNKNOWN
from loraformat.matching import Match, Want, check_size, fits_site, name_weight
from loraformat.matching.mismatches import LISTED, report_shape
from loraformat.matching.site_index import Candidate
from loraformat.problems import Problem

BY_NAMES: Final = "names"
"""The strategy whose candidates have the evidence of their sites."""


def choose_weights(want: Want, candidates: Sequence[Candidate], usual: str | None) -> list[Match] | Problem:
    """Return the weight that the candidates lead to, or the weights of its sections, or why there is none."""
    if len({candidate.relation for candidate in candidates}) > 1:
        candidates = [candidate for candidate in candidates if candidate.relation == usual] or candidates
    sites = [candidate.site for candidate in candidates]
    usable = [site for site in sites if want.change.slot in site.transposed]
    if not usable:
        kinds = sorted({str(kind) for site in sites for kind in site.transposed})
        return Problem("LF408", want.name, f"a slot for {', '.join(kinds) or 'nothing'}", f"a {want.change.slot} slot")
    fitting = [site for site in usable if site.weight is None or fits_site(want, site)]
    if not fitting:
        return report_shape(want, usable)
    blocked = next((site.obstacle for site in fitting if site.obstacle is not None), None)
    if blocked is not None:
        return Problem(blocked.code, f"{want.name} at {blocked.where}", blocked.found, blocked.expected, blocked.mend)
    groups = _split_sections(fitting)
    sections = [group[0].section for group in groups]
    if want.shape[0] == UNKNOWN and sections != [None]:
        found = f"a base that splits the module, and factors of {want.target.kind} that do not tell its rows"
        return Problem("LF408", want.name, found, "the module in one weight")
    if not _are_whole(want, sections):
        found = f"{len(sections)} parts of it, rows {', '.join(str(section) for section in sections[:LISTED])}"
        return Problem("LF405", want.name, found, f"all of {want.shape[0]} rows")
    outcomes = [_match_weight(want, group, candidates[0]) for group in groups]
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


def _are_whole(want: Want, sections: Sequence[tuple[int, int] | None]) -> bool:
    """Say whether sections follow one another from the first row of a change to its last."""
    reached = 0
    for section in sections:
        if section is not None and section[0] != reached:
            return False
        reached = section[1] if section is not None else want.shape[0]
    return reached == want.shape[0]


def _match_weight(want: Want, sites: Sequence[Site], candidate: Candidate) -> Match | Problem:
    by_key = {site.weight.key: site.weight for site in sites if site.weight is not None}
    weights = tuple(by_key.values())
    slot = want.change.slot
    manners = {(s.transposed[slot], s.divisor, s.part, s.row_factors, s.row_order) for s in sites}
    if not _are_of_one_module(sites) or len(manners) != 1 or (len(weights) != 1 and not _are_copies(sites, weights)):
        listed = "; ".join(_tell_apart(sites)[:LISTED])
        return Problem("LF404", want.name, f"several weights or several ways to read one: {listed}", "one weight")
    misfit = check_size(want, sites)
    if misfit is not None:
        return misfit
    transposed, divisor, *_ = manners.pop()
    evidence = candidate.evidence or (sites[0].evidence if candidate.strategy == BY_NAMES else candidate.strategy)
    found = Match(want, weights, tuple(sites), transposed, divisor, evidence, candidate.relation)
    verified = (candidate.verified,) if candidate.verified else ()
    return replace(found, strategy=candidate.strategy, verified=verified)


def _tell_apart(sites: Sequence[Site]) -> list[str]:
    """Return words for each site, with its id, which a map can name, where the words would be those of another."""
    said = [f"{site.module} ({site.evidence}) reads {name_weight(site)}" for site in sites]
    return [
        f"{words} at {site.id}" if said.count(words) > 1 else words for words, site in zip(said, sites, strict=True)
    ]


def _are_copies(sites: Sequence[Site], weights: Sequence[Weight]) -> bool:
    """Say whether several tensors are one parameter, written once for each call: one module, equal to the last bit."""
    first, *others = (weight.tensor for weight in weights)
    return _are_of_one_module(sites) and all(first.equals(other) for other in others)


def _are_of_one_module(sites: Sequence[Site]) -> bool:
    """Say whether sites are known to be of one module: several only by names that stand at the nodes themselves."""
    if len({site.id for site in sites}) == 1:
        return True
    named = all(site.module and site.evidence not in OF_TENSORS for site in sites)
    return named and len({site.module for site in sites}) == 1
