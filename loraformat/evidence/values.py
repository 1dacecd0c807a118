"""Weights that have the numbers of the torch checkpoint which the graph was exported from: `--base-checkpoint`.

A stored matrix is the checkpoint's W, its transpose, a cast of it, or some rows of a packed one; each row may have been
multiplied by a number, as exporters do that fold BatchNorm or a head's scale into a weight, or rows may have been
moved. A quantised one is W within about half a step. Compared are up to 24 columns of every row.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from loraformat.bases import Site
from loraformat.evidence import Lookup
from loraformat.evidence._columns import is_coded, is_comparable, is_smaller, read_columns
from loraformat.evidence._decoded import is_alike, is_rounded, read_decoded
from loraformat.evidence._likeness import TELLING, find_factors, find_starts
from loraformat.evidence._permuted import find_order, find_places
from loraformat.evidence._turns import describe_turns, split_runs
from loraformat.matching import Want, cut_rows, fits_site
from loraformat.matching.site_index import Candidate
from loraformat.problems import Problem

_Read = TypeVar("_Read")

VERIFIED: Final = "values"
_COLUMNS: Final = 24
_SLACKS: Final = {"float16": 2.0**-9, "bfloat16": 2.0**-6}
_SLACK: Final = 2.0**-16
_OVERCOME: Final = frozenset({"LF404", "LF407"})
"""Obstacles of a site that doubt which weight it has, or whether its own: equal numbers settle both."""


class Values:
    """The strategy `values`."""

    name = "values"
    order = 40

    def find(self, want: Want, lookup: Lookup) -> list[Candidate]:
        """Return the sites, or rows of packed ones, that have the numbers of the checkpoint's weight."""
        if not _has_reference(want, lookup):
            return []
        whole = [site for site in lookup.sites if is_comparable(want, site)]
        found = [each for site in whole for each in _find_in(want, site, lookup)]
        found = found or [each for site in whole for each in _find_moved(want, site, lookup)]
        if found:
            return [Candidate(site, self.name, self.name, VERIFIED) for site in found]
        in_turns = [each for site in whole for each in _find_in_turns(want, site, lookup)]
        return in_turns or _find_spread(want, lookup)


def verify_values(want: Want, candidates: Sequence[Candidate], lookup: Lookup) -> list[Candidate] | Problem:
    """Return the candidates that have the checkpoint's numbers, with the factors of their rows, or what contradicts it.

    What cannot be compared passes as it is. A site that has only an end of its name in common with the target, and
    other numbers, is dropped: it is another module's.
    """
    if not _has_reference(want, lookup):
        return list(candidates)
    able = [candidate for candidate in candidates if _is_able(want, candidate.site)]
    if not able:
        return list(candidates)
    verified = [c for candidate in able if (c := _verify(want, candidate, lookup)) is not None]
    if verified:
        return verified
    rounded = [candidate for candidate in able if _may_be_coded(want, candidate.site, lookup)]
    if rounded:
        return rounded
    blocked = [candidate for candidate in able if candidate.site.obstacle is not None]
    if blocked:
        return blocked
    if all(candidate.relation[:1] in ("+", "-") for candidate in able):
        return []
    site = able[0].site
    assert site.weight is not None, "chosen so"
    found = f"the weight {site.weight.name!r}, found by {site.evidence or able[0].strategy}, has other numbers"
    return Problem("LF421", want.name, found, "the numbers of the base checkpoint")


def _is_able(want: Want, site: Site) -> bool:
    """Say whether the numbers at a site can be compared: those of a weight in the target's shape."""
    return site.weight is not None and want.change.slot in site.transposed and fits_site(want, site)


def _may_be_coded(want: Want, site: Site, lookup: Lookup) -> bool:
    """Say whether a quantised weight may be the checkpoint's by a way of quantising that moves numbers further."""
    if not is_coded(site):
        return False
    columns = _choose_columns(want)
    reference = _arrange(site, _read_reference(want, lookup, columns))
    return is_alike(_keep(lookup, site, want, columns), reference)


def _arrange(site: Site, reference: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the rows of the checkpoint's weight that a site has, where the base knows their order in this."""
    own = reference[slice(*(site.section or (None,)))]
    return own[list(site.row_order)] if len(site.row_order) == len(own) else own


def _verify(want: Want, candidate: Candidate, lookup: Lookup) -> Candidate | None:
    site = candidate.site
    columns = _choose_columns(want)
    stored = _keep(lookup, site, want, columns)
    whole = _read_reference(want, lookup, columns)
    reference = whole[slice(*site.section)] if site.section is not None else whole
    if is_coded(site):
        rounded = is_rounded(stored, _keep_steps(lookup, site, want, columns), _arrange(site, whole))
        return replace(candidate, verified=VERIFIED) if rounded else None
    slack = _slack(site, want, lookup)
    factors = find_factors(stored * np.float32(site.divisor), reference, slack)
    if factors is not None:
        return replace(candidate, site=_settle(site, factors), verified=VERIFIED)
    order = find_order(stored * np.float32(site.divisor), reference, slack) if len(columns) >= TELLING else None
    moved = replace(site, obstacle=_overcome(site), row_order=order or ())
    return replace(candidate, site=moved, verified=VERIFIED) if order else None


def _find_in(want: Want, site: Site, lookup: Lookup) -> Iterator[Site]:
    columns = _choose_columns(want)
    stored = _keep(lookup, site, want, columns)
    reference, slack = _read_reference(want, lookup, columns), _slack(site, want, lookup)
    if is_coded(site):
        if is_rounded(stored, _keep_steps(lookup, site, want, columns), reference):
            yield site
        return
    for start in find_starts(stored, reference):
        factors = find_factors(stored[start : start + len(reference)] * np.float32(site.divisor), reference, slack)
        if factors is not None:
            cut = site if len(stored) == len(reference) else None
            cut = cut or cut_rows(site, want.change.slot, (start, start + len(reference)))
            yield _settle(cut, factors)


def _find_moved(want: Want, site: Site, lookup: Lookup) -> Iterator[Site]:
    """Yield the site where it has the rows of the checkpoint's weight in another order."""
    columns = _choose_columns(want)
    if is_coded(site) or len(columns) < TELLING or not fits_site(want, site):
        return
    stored = _keep(lookup, site, want, columns)
    order = find_order(
        stored * np.float32(site.divisor), _read_reference(want, lookup, columns), _slack(site, want, lookup)
    )
    if order is not None:
        yield replace(site, obstacle=_overcome(site), row_order=order)


def _find_in_turns(want: Want, site: Site, lookup: Lookup) -> Iterator[Candidate]:
    """Yield the rows of a larger matrix that are the checkpoint's weight, where its rows and others take turns."""
    if not _has_telling_rows(want, site):
        return
    stored, reference, slack = _read_both(want, site, lookup)
    places = find_places(stored, reference, slack) if len(stored) > len(reference) else None
    runs = split_runs(places) if places is not None else []
    for run in runs:
        cut = cut_rows(site, want.change.slot, run.rows)
        section = run.own if len(runs) > 1 else None
        settled = replace(cut, obstacle=_overcome(cut), section=section)
        yield Candidate(settled, Values.name, Values.name, VERIFIED, describe_turns(runs))


def _find_spread(want: Want, lookup: Lookup) -> list[Candidate]:
    """Return smaller matrices of which each has runs of the checkpoint's rows; nothing where these are not all rows."""
    found: dict[tuple[int, int], list[Candidate]] = defaultdict(list)
    for site in lookup.sites:
        if not is_smaller(want, site) or not _has_telling_rows(want, site):
            continue
        stored, reference, slack = _read_both(want, site, lookup)
        places = find_places(reference, stored, slack)
        runs = split_runs(places) if places is not None else []
        for run in runs if runs and runs[0].step == 1 else ():
            rows = (run.start, run.start + run.count)
            cut = cut_rows(site, want.change.slot, run.own) if len(runs) > 1 else site
            settled = replace(cut, obstacle=_overcome(cut), section=rows)
            found[rows].append(Candidate(settled, Values.name, Values.name, VERIFIED, describe_turns(runs)))
    ordered = sorted(found)
    reached = [start for start, _ in ordered] == [0, *(stop for _, stop in ordered[:-1])]
    if not ordered or not reached or ordered[-1][1] != want.shape[0]:
        return []
    return [candidate for rows in ordered for candidate in found[rows]]


def _has_telling_rows(want: Want, site: Site) -> bool:
    return not is_coded(site) and len(want.shape) > 1 and len(_choose_columns(want)) >= TELLING


def _read_both(want: Want, site: Site, lookup: Lookup) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    """Return columns of what a site applies, of the checkpoint's weight, and how far a cast may part them."""
    columns = _choose_columns(want)
    stored = _keep(lookup, site, want, columns) * np.float32(site.divisor)
    return stored, _read_reference(want, lookup, columns), _slack(site, want, lookup)


def _settle(site: Site, factors: NDArray[np.float64]) -> Site:
    """Return the site, its obstacle overcome, with what its rows were multiplied by."""
    obstacle = _overcome(site)
    first = float(factors[0])
    if (factors == 1).all():
        return replace(site, obstacle=obstacle)
    if np.allclose(factors, first, rtol=1e-6):
        return replace(site, obstacle=obstacle, divisor=site.divisor / float(factors.mean()))
    return replace(site, obstacle=obstacle, row_factors=tuple(map(float, factors)))


def _overcome(site: Site) -> Problem | None:
    """Return what stands against a site still, once its numbers are the checkpoint's."""
    return site.obstacle if site.obstacle and site.obstacle.code not in _OVERCOME else None


def _choose_columns(want: Want) -> list[int]:
    """Return up to 24 columns of the canonical matrix, evenly spaced."""
    count = math.prod(want.shape[1:])
    return sorted({index * (count - 1) // max(1, _COLUMNS - 1) for index in range(_COLUMNS)})


def _keep(lookup: Lookup, site: Site, want: Want, columns: Sequence[int]) -> NDArray[np.float32]:
    assert site.weight is not None, "chosen so"
    slot = want.change.slot
    key = (site.weight.key, site.part, site.transposed[slot], tuple(columns))
    if is_coded(site):
        return _once(lookup, key, lambda: read_decoded(site, slot, columns))[0]
    return _once(lookup, key, lambda: read_columns(site, slot, columns))


def _keep_steps(lookup: Lookup, site: Site, want: Want, columns: Sequence[int]) -> NDArray[np.float32]:
    """Return the steps of a quantised weight's numbers, which are kept with these."""
    _keep(lookup, site, want, columns)
    assert site.weight is not None, "chosen so"
    steps: NDArray[np.float32] = lookup.kept[
        site.weight.key, site.part, site.transposed[want.change.slot], tuple(columns)
    ][1]
    return steps


def _read_reference(want: Want, lookup: Lookup, columns: Sequence[int]) -> NDArray[np.float32]:
    """Return columns of the checkpoint's weight, `(out, columns)`."""
    matches = lookup.reference(want)
    key = (want.target.name, want.parameter, tuple(columns))
    read = (read_columns(match.sites[0], want.change.slot, columns) for match in matches)
    return _once(lookup, key, lambda: np.concatenate(list(read)))


def _once(lookup: Lookup, key: Any, read: Callable[[], _Read]) -> _Read:
    if key not in lookup.kept:
        lookup.kept[key] = read()
    values: _Read = lookup.kept[key]
    return values


def _has_reference(want: Want, lookup: Lookup) -> bool:
    return bool(lookup.reference(want)) and want.is_main and len(want.shape) > 1 and min(want.shape) > 0


def _slack(site: Site, want: Want, lookup: Lookup) -> float:
    assert site.weight is not None, "chosen so"
    forms = {site.weight.tensor.dtype.name, *(match.weight.tensor.dtype.name for match in lookup.reference(want))}
    return max(_SLACKS.get(form, _SLACK) for form in forms)


STRATEGY: Final = Values()
