"""What a target asks for, what it was matched with, and whether the two fit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from loraformat.adapter import SlotKind, Target
from loraformat.bases import Site, Weight
from loraformat.fingerprint import positions, read_number
from loraformat.kinds import KINDS, REST, UNKNOWN, Change, Nature, SizedByBase, fits_shape
from loraformat.problems import Problem
from loraformat.spans import Part

_PACKED: Final = 3
"""Dimensions of a tensor of packed experts."""


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
        relation: how the names differ: empty, `+prefix` that the base has more, `-prefix` that it lacks, `~name` that a
            library changed it to, `fingerprint`.
        apart: of a table that others are tied to and that this parts from them, the name of its own; of a weight that
            others read and of which this gets a copy, the copy's; else empty.
        also: names of other targets that say the same of the weight, for which this stands.
        strategy: the strategy that found it.
        verified: what of its numbers was compared, and agrees.
    """

    want: Want
    weights: tuple[Weight, ...]
    sites: tuple[Site, ...]
    transposed: bool
    divisor: float
    evidence: str
    relation: str
    apart: str = ""
    also: tuple[str, ...] = ()
    strategy: str = "names"
    verified: tuple[str, ...] = ()

    @property
    def row_factors(self) -> tuple[float, ...]:
        """What each row of the module's weight was multiplied by before it was stored; empty for nothing."""
        return self.sites[0].row_factors

    @property
    def row_order(self) -> tuple[int, ...]:
        """Which row of the module's weight each stored row is; empty where they are in order."""
        return self.sites[0].row_order

    @property
    def is_untied(self) -> bool:
        """Whether it parts from tables that the configuration ties it to."""
        return bool(self.apart and self.sites[0].tied)

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


def count_rows(site: Site, slot: SlotKind) -> int:
    """Return the rows of the canonical matrix `(out, in * kernel)` that a site applies."""
    shape = site.stored_shape()
    return shape[-1] if site.transposed[slot] else shape[0]


def find_expert(site: Site) -> int | None:
    """Return which of packed experts a site applies; None where it applies a weight of one, or has none."""
    if site.weight is None or site.part is None or len(site.weight.tensor.shape) != _PACKED:
        return None
    if site.weight.coding is not None:  # Then these are the dimensions of blocks.
        return None
    return site.part.rows[0] // site.weight.tensor.shape[1]


def cut_rows(site: Site, slot: SlotKind, rows: tuple[int, ...] | None) -> Site:
    """Return a site of some rows, from start to stop by a step, of the canonical `(out, in)` that another applies."""
    assert site.weight is not None, "chosen so"
    if rows is None:
        return site
    shape = site.weight.tensor.shape
    matrix = (shape[0], math.prod(shape[1:]))
    whole = site.part or Part(matrix, (0, matrix[0], 1), (0, matrix[1], 1))
    if site.transposed[slot]:
        return replace(site, part=replace(whole, columns=_cut_line(whole.columns, rows)))
    return replace(site, part=replace(whole, rows=_cut_line(whole.rows, rows)))


def _cut_line(line: tuple[int, int, int], places: tuple[int, ...]) -> tuple[int, int, int]:
    """Return some of the places of a line, counted along it."""
    kept = range(*line)[slice(*places)]
    return kept.start, kept.stop, kept.step


def list_wants(target: Target) -> list[Want]:
    """Return what a target asks for, one for each change that its kind makes."""
    kind = KINDS.find(target.kind)
    assert kind is not None, "checked before"
    return [Want(target, change) for change in kind.changes(target)]


def name_weight(site: Site) -> str:
    """Return the name of the weight that a site applies, for people."""
    return site.weight.name if site.weight is not None else "nothing"


def fits_site(want: Want, site: Site) -> bool:
    """Say whether a target's change has the shape of what is stored at a site, which must have a weight."""
    stored, wanted = site.stored_shape(), shape_at(want, site)
    if fits_shape(stored, wanted):
        return True
    if want.change.open and len(stored) == len(wanted):
        (rows, *inner), (least, *others) = (
            s[::-1] if site.transposed[want.change.slot] else s for s in (stored, wanted)
        )
        return rows >= least and inner == others
    if want.change.widens and is_narrower(want, site):
        return True
    grown = site.grows and len(stored) == len(wanted) and wanted[0] > stored[0] and wanted[1:] == stored[1:]
    return grown and brings_rows(want)


def is_narrower(want: Want, site: Site) -> bool:
    """Say whether what a site applies has all rows, but not all columns, of a matrix that a target changes."""
    if not site.widens or site.transposed[want.change.slot]:
        return False
    stored, wanted = site.stored_shape(), shape_at(want, site)
    return len(stored) == len(wanted) and stored[0] == wanted[0] and stored[1] < wanted[1]


def brings_rows(want: Want) -> bool:
    """Say whether the target brings values of its own for all rows: then there may be more of them than are stored."""
    kind = KINDS.find(want.target.kind)
    assert kind is not None, "checked before"
    changes = kind.changes(want.target)
    return any(each.nature is Nature.REPLACEMENT and each.parameter == want.parameter for each in changes)


def shape_at(want: Want, site: Site) -> tuple[int, ...]:
    """Return the shape in which the target's weight would be stored at the site."""
    shape = want.shape
    if site.section is not None:
        shape = (site.section[1] - site.section[0], *shape[1:])
    if site.part is not None and len(shape) == 1:
        shape = (*shape, 1)
    return shape[::-1] if site.transposed[want.change.slot] else shape


def sample_sites(want: Want, sites: Sequence[Site]) -> tuple[float, ...]:
    """Return the samples of the weight that sites apply, one or several sections, at the positions of the target."""
    shape = settle_shape(want, sites)
    shape = sites[0].stored_shape() if want.change.widens and is_narrower(want, sites[0]) else shape
    return tuple(_read_sample(shape, want, sites, row, column) for row, column in positions(want.target.name, shape))


def settle_shape(want: Want, sites: Sequence[Site]) -> tuple[int, ...]:
    """Return the canonical shape, with what the factors do not tell taken from the sites."""
    if UNKNOWN not in want.shape and REST not in want.shape:
        return want.shape
    stored = sites[0].stored_shape()
    shape = stored[::-1] if sites[0].transposed[want.change.slot] else stored
    return shape if want.shape[0] == UNKNOWN else (want.shape[0], *shape[1:])


def open_slot(want: Want, sites: Sequence[Site]) -> Want:
    """Return the want with the slot that the base has, where the factors do not tell a kernel from a matrix."""
    slots = {slot for site in sites for slot in site.transposed}
    if not want.change.is_flat or want.change.slot in slots or SlotKind.CONV not in slots:
        return want
    change = replace(want.change, slot=SlotKind.CONV, shape=(want.shape[0], UNKNOWN, REST))
    return replace(want, change=change)


def check_size(want: Want, sites: Sequence[Site]) -> Problem | None:
    """Return what the kind has against the sizes that its factors did not tell."""
    kind = KINDS.find(want.target.kind)
    shape = settle_shape(want, sites)
    if shape == want.shape or not isinstance(kind, SizedByBase):
        return None
    return next(iter(kind.check_size(want.target, replace(want.change, shape=shape))), None)


def _read_sample(shape: tuple[int, ...], want: Want, sites: Sequence[Site], row: int, column: int) -> float:
    site = next((site for site in sites if site.section and site.section[0] <= row < site.section[1]), sites[0])
    assert site.weight is not None, "chosen so"
    first, stop = site.section or (0, shape[0])
    rows, columns = stop - first, math.prod(shape[1:])
    turned = site.transposed[want.change.slot]
    line = site.row_order.index(row - first) if site.row_order else row - first
    place = (column, line) if turned else (line, column)
    index = site.part.index(*place) if site.part else place[0] * (rows if turned else columns) + place[1]
    factor = site.row_factors[row - first] if site.row_factors else 1.0
    return read_number(site.weight.tensor, index) * site.divisor / factor
