"""Weights that have the numbers of a stamped adapter's fingerprint, whatever their names."""

import math
from collections.abc import Iterator
from typing import Final

import numpy as np

from loraformat.bases import Site
from loraformat.evidence import Lookup
from loraformat.evidence._columns import is_coded, is_comparable, read_columns
from loraformat.fingerprint import positions
from loraformat.matching import Want, cut_rows, fits_site, sample_sites
from loraformat.matching.site_index import Candidate

_SLACK: Final = 2.0**-7


class Fingerprints:
    """The strategy `fingerprint`."""

    name = "fingerprint"
    order = 30

    def find(self, want: Want, lookup: Lookup) -> list[Candidate]:
        """Return the sites, or rows of packed ones, that have the samples of the target's fingerprint."""
        fingerprint = want.target.fingerprint
        if fingerprint is None or not fingerprint.is_telling or not want.is_main:
            return []
        return [
            Candidate(site, self.name, self.name)
            for whole in lookup.sites
            if is_comparable(want, whole) and not is_coded(whole)
            for site in _find_in(want, whole)
            if fingerprint.matches(sample_sites(want, [site]))
        ]


def _find_in(want: Want, site: Site) -> Iterator[Site]:
    """Yield the site where it has the target's shape, or the runs of its rows that may be the target's."""
    if fits_site(want, site):
        yield site
        return
    fingerprint = want.target.fingerprint
    assert fingerprint is not None, "checked before"
    row, column = positions(want.target.name, want.shape)[0]
    line = read_columns(site, want.change.slot, [column])[:, 0]
    near = np.abs(line - fingerprint.samples[0]) <= _SLACK * max(map(abs, fingerprint.samples))
    for hit in np.flatnonzero(near):
        start = int(hit) - row
        if 0 <= start <= len(line) - want.shape[0] and math.isfinite(line[hit]):
            yield cut_rows(site, want.change.slot, (start, start + want.shape[0]))


STRATEGY: Final = Fingerprints()
