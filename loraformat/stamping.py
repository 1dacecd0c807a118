"""Bind an adapter to its base: sample every target's weight (spec/SPEC.md, section 7)."""

import math
from collections import defaultdict
from dataclasses import replace

from loraformat.adapter import Adapter
from loraformat.bases import BaseModel
from loraformat.errors import error_for
from loraformat.evidence import Hints
from loraformat.fingerprint import Fingerprint
from loraformat.kinds import Nature
from loraformat.matching import Match, Want, sample_sites, settle_shape
from loraformat.problems import Problem
from loraformat.resolve import gather_clues, resolve
from loraformat.rules import check_adapter


def stamp_adapter(adapter: Adapter, base: BaseModel, *, strip_prefix: str | None = None) -> Adapter:
    """Return `adapter` with a fingerprint of `base` at every target that changes a weight, in place of any it had.

    Args:
        adapter: the adapter.
        base: the model that it was trained on.
        strip_prefix: removed from the front of target names before they are matched.

    Raises:
        LoraformatError: with every problem: of the adapter, of names, or LF502 a sampled number that is not finite.
    """
    problems = check_adapter(adapter)
    if not _are_grave(problems):
        plain = replace(adapter, targets=tuple(replace(target, fingerprint=None) for target in adapter.targets))
        clues = gather_clues(plain, base, Hints(), strip_prefix=strip_prefix)
        resolution = resolve(plain, base.sites, strip_prefix=strip_prefix, clues=clues)
        problems = list(resolution.problems)
    if _are_grave(problems):
        raise error_for([problem for problem in problems if problem.severity == "error"])
    groups: dict[Want, list[Match]] = defaultdict(list)
    for match in resolution.matches:
        if match.want.is_main and match.want.change.nature is not Nature.REPLACEMENT:
            groups[match.want].append(match)
    prints = {want.target.name: _take(want, matches) for want, matches in groups.items()}
    return replace(
        adapter, targets=tuple(replace(target, fingerprint=prints.get(target.name)) for target in adapter.targets)
    )


def _are_grave(problems: list[Problem]) -> bool:
    return any(problem.severity == "error" for problem in problems)


def _take(want: Want, matches: list[Match]) -> Fingerprint:
    sites = [site for match in matches for site in match.sites]
    if any(site.weight is not None and site.weight.coding is not None for site in sites):
        name = matches[0].weight.name
        raise error_for([Problem("LF403", name, "codes, which are not its numbers", "a floating-point form")])
    samples = sample_sites(want, sites)
    if not all(map(math.isfinite, samples)):
        raise error_for(
            [Problem("LF502", matches[0].weight.name, "a sampled number that is not finite", "finite numbers")]
        )
    return Fingerprint(settle_shape(want, sites), samples)
