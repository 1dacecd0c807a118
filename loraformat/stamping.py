"""Bind an adapter to its base: sample every target's weight (spec/SPEC.md, section 7)."""

import math
from dataclasses import replace

from loraformat.adapter import Adapter
from loraformat.bases import BaseModel
from loraformat.errors import error_for
from loraformat.fingerprint import Fingerprint
from loraformat.problems import Problem
from loraformat.resolve import Match, resolve, sample_site
from loraformat.rules import check_adapter, is_replacement


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
        resolution = resolve(plain, base.sites, strip_prefix=strip_prefix)
        problems = list(resolution.problems)
    if _are_grave(problems):
        raise error_for([problem for problem in problems if problem.severity == "error"])
    prints = {match.target.name: _take(match) for match in resolution.matches if not is_replacement(match.target.kind)}
    return replace(
        adapter, targets=tuple(replace(target, fingerprint=prints.get(target.name)) for target in adapter.targets)
    )


def _are_grave(problems: list[Problem]) -> bool:
    return any(problem.severity == "error" for problem in problems)


def _take(match: Match) -> Fingerprint:
    samples = sample_site(match.want, match.sites[0])
    if not all(map(math.isfinite, samples)):
        raise error_for([Problem("LF502", match.weight.name, "a sampled number that is not finite", "finite numbers")])
    return Fingerprint(match.want.shape, samples)
