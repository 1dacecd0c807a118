"""Tied tables that stand apart: an exporter wrote the head as a tensor of its own, perhaps transposed or quantised.

What a library trains for all tied tables alike (rows of trained tokens) is meant for every one of them. Their numbers
tell which tensors they are, and `config.json`, where there is one, whether the model ties any.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Adapter, SlotKind
from loraformat.bases import BaseModel, Site, ToldBase
from loraformat.bases._state_dict import read_model_config
from loraformat.bases._tied_tables import read_tie
from loraformat.evidence._columns import is_coded, read_columns
from loraformat.evidence._decoded import is_alike, is_rounded, read_decoded
from loraformat.kinds import Nature
from loraformat.matching import Match, cut_rows, list_wants
from loraformat.matching.sharing import settle_sharing
from loraformat.problems import Problem
from loraformat.resolve import Resolution
from loraformat.strict_json import JsonValue

_SLOT: Final = SlotKind.PARAMETER
_ROWS: Final = 256
_COLUMNS: Final = 8
_SLACKS: Final = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
_GRAPHS: Final = "onnx"
"""Where hubs keep the graphs of a model, below its configuration."""
_KEPT: Final = "stays as it is (--untie)"
_EVIDENCE: Final = "numbers of a tied table"
_KEEP: Final = "If that is what you mean: --untie (untie=True) changes the table alone."


class _Twin(NamedTuple):
    """A weight that may be a table once more, with all sites that read it in one way, and whether its numbers say so.

    Attributes:
        sites: oriented as parameters.
        is_sure: whether the numbers are the table's, and not only near them.
    """

    sites: tuple[Site, ...]
    is_sure: bool

    @property
    def name(self) -> str:
        assert self.sites[0].weight is not None, "chosen so"
        return self.sites[0].weight.name


def follow_ties(resolution: Resolution, base: BaseModel, *, untie: bool) -> Resolution:
    """Return the resolution with what is trained for all tied tables led to those that stand apart as well.

    Args:
        resolution: of one adapter.
        base: the base.
        untie: leave the other tables as they are.
    """
    shared = [match for match in resolution.matches if match.want.change.shared and match.section is None]
    tie = read_tie(_read_config(base)) if shared else False
    if tie is False:
        return resolution
    changed = {
        weight.key
        for match in resolution.matches
        if match.want.change.nature is not Nature.ADDITIVE
        for weight in match.weights
    }
    matches, problems = list(resolution.matches), list(resolution.problems)
    for match in shared:
        for twin in _find_twins(match, base.sites, changed):
            kept, found = _follow(match, twin, base.sites, tie=tie, untie=untie)
            matches += kept
            problems += found
            changed |= {weight.key for each in kept for weight in each.weights}
    return replace(resolution, matches=tuple(matches), problems=tuple(problems))


def keeps_apart(adapter: Adapter, base: BaseModel) -> bool:
    """Say whether a base ties no tables, though an adapter has something for all that are tied.

    Its `config.json` is only read for such an adapter. A graph may still have two equal tables in one tensor.
    """
    changes = (want.change for target in adapter.targets for want in list_wants(target))
    if not any(change.shared for change in changes) or any(site.tied for site in base.sites):
        return False
    return read_tie(_read_config(base)) is False


def _read_config(base: BaseModel) -> Mapping[str, JsonValue]:
    if isinstance(base, ToldBase):
        return base.tell_config()
    folder = base.path if base.path.is_dir() else base.path.parent
    return read_model_config(folder) or (read_model_config(folder.parent) if folder.name == _GRAPHS else {})


def _follow(
    match: Match, twin: _Twin, sites: Sequence[Site], *, tie: JsonValue, untie: bool
) -> tuple[list[Match], list[Problem]]:
    """Return the match with another table, where it is one and can be changed, and what is to be said."""
    first, where = twin.sites[0], match.want.name
    said = f"{twin.name!r} has the numbers of the table {match.weight.name!r}"
    if untie:
        return [], [Problem("LF649", where, f"{said}, and {_KEPT}", severity="note")]
    if not twin.is_sure and tie is not True:
        found = f"{twin.name!r} has numbers near those of the table {match.weight.name!r}, and stays as it is"
        return [], [Problem("LF649", where, found, "a config.json that says tie_word_embeddings", severity="warning")]
    if first.obstacle is not None:
        found = f"{said}, and nothing can be merged into it: {first.obstacle.found}"
        return [], [Problem("LF649", where, found, first.obstacle.expected, f"{first.obstacle.advice} {_KEEP}")]
    assert first.weight is not None, "chosen so"
    own = replace(
        match,
        weights=(first.weight,),
        sites=twin.sites,
        transposed=first.transposed[_SLOT],
        divisor=first.divisor,
        evidence=_EVIDENCE,
        verified=(),
    )
    kept, problems = settle_sharing([own], sites, untie=False)
    problems = [replace(each, mend=f"{each.advice} {_KEEP}") for each in problems]
    note = Problem("LF648", where, f"{said}, and gets the same rows", severity="note")
    return kept, [*problems, *([note] if kept else [])]


def _find_twins(match: Match, sites: Sequence[Site], changed: set[str]) -> Iterator[_Twin]:
    """Yield other weights with a table's sizes and its numbers, or numbers near them."""
    table = match.sites[0]
    groups: dict[tuple[str, bool, float], list[Site]] = {}
    for site in sites:
        oriented = _orient(site)
        if oriented is None or oriented.weight is None or oriented.weight.key in changed:
            continue
        if _find_shape(oriented) == _find_shape(table):
            key = oriented.weight.key, oriented.transposed[_SLOT], oriented.divisor
            groups.setdefault(key, []).append(oriented)
    last = match.want.shape[0]
    for group in groups.values():
        likeness = _compare(table, group[0], last)
        if likeness is not None:
            yield _Twin(tuple(group), likeness)


def _orient(site: Site) -> Site | None:
    """Return a site of a whole matrix as that of a parameter `(out, in)`; None for any other."""
    turned = site.transposed.get(_SLOT, site.transposed.get(SlotKind.LINEAR))
    if turned is None or site.parameter != "weight" or site.section is not None or site.row_factors or site.row_order:
        return None
    return replace(site, transposed={**site.transposed, _SLOT: turned}) if len(site.stored_shape()) == 2 else None


def _find_shape(site: Site) -> tuple[int, ...]:
    shape = site.stored_shape()
    return shape[::-1] if site.transposed[_SLOT] else shape


def _compare(table: Site, other: Site, last: int) -> bool | None:
    """Say whether another matrix has a table's numbers, False for some near them; None where it has others.

    Compared are some columns of the first rows, and of those up to row `last`, which is not among them.
    """
    rows, columns = _find_shape(table)
    some = np.linspace(0, columns - 1, min(columns, _COLUMNS)).astype(int).tolist()
    likeness = [
        _compare_rows(table, other, (start, stop, 1), some)
        for start, stop in dict.fromkeys([(0, min(rows, _ROWS)), (max(0, last - _ROWS), last)])
    ]
    return None if None in likeness else all(likeness)


def _compare_rows(table: Site, other: Site, rows: tuple[int, int, int], columns: Sequence[int]) -> bool | None:
    one, other = (cut_rows(site, _SLOT, rows) for site in (table, other))
    (values, steps), (others, spread) = _read(one, columns), _read(other, columns)
    if np.unique(values).size < min(len(columns), values.size):
        return None  # A constant is like any other: it tells nothing.
    if steps is None and spread is None:
        slack = 0.0 if _form(one) == _form(other) else max(_SLACKS.get(_form(site), 2.0**-20) for site in (one, other))
        return True if np.all(np.abs(values - others) <= slack * np.abs(values) + slack * 2.0**-14) else None
    if steps is None and spread is not None and is_rounded(others, spread, values):
        return True
    if spread is None and steps is not None and is_rounded(values, steps, others):
        return True
    if steps is not None and spread is not None and np.array_equal(values, others):
        return True
    return False if is_alike(others, values) else None


def _form(site: Site) -> str:
    return site.weight.tensor.dtype.name if site.weight is not None else ""


def _read(site: Site, columns: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Return some columns of the canonical matrix that a site applies, and of codes the step of each number."""
    values, steps = read_decoded(site, _SLOT, columns) if is_coded(site) else (read_columns(site, _SLOT, columns), None)
    factor = np.float32(site.divisor)
    return values * factor, None if steps is None else steps * factor
