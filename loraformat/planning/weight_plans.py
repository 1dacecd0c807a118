"""One weight of a plan: its changes, whether they compose, and how it stands in the output."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final, NamedTuple, cast

from loraformat.bases import Site, Weight
from loraformat.encodings import choose_encoding
from loraformat.kinds import KINDS, MappingKind, Nature
from loraformat.lacking import NewBias
from loraformat.matching import Match, shape_at
from loraformat.plan.changes import PlannedChange
from loraformat.plan.weights import NewForm, PlannedWeight, as_matrix, count_tile_rows
from loraformat.planning.coded_plans import list_companions
from loraformat.planning.coded_rows import align_rows
from loraformat.problems import Problem
from loraformat.spans import Part

_ORDER: Final = {Nature.REPLACEMENT: 0, Nature.FUNCTION_OF_BASE: 1, Nature.ADDITIVE: 2}
"""What replaces the base's values comes first, then what is a function of them, then what is added."""


class WeightChange(NamedTuple):
    """One change on its way into the plan of a weight."""

    match: Match
    weight: Weight
    change: PlannedChange


class Table(NamedTuple):
    """One tensor of the output, and what changes it.

    Attributes:
        name: the weight's key in the base, or the name of a tensor of its own.
        changes: none for a table that only parts from another.
        readers: for a copy of a weight, ids of the sites that read it.
    """

    name: str
    changes: Sequence[WeightChange]
    readers: tuple[str, ...] = ()


def part_tables(
    weight: Weight,
    group: Sequence[WeightChange],
    sites: Sequence[Site],
    problems: list[Problem],
    *,
    keep_whole: bool = False,
) -> Iterator[Table]:
    """Yield the tensors that one becomes in the output: one, those of tied tables, or copies for some readers.

    Args:
        weight: the base's.
        group: all changes of it.
        sites: the base's.
        problems: takes what was found.
        keep_whole: leave the weight itself to no set of readers, but give each a copy.
    """
    if not any(entry.match.apart for entry in group):
        yield Table(weight.key, group)
        return
    tied = [site for site in sites if site.tied and site.weight is not None and site.weight.key == weight.key]
    if not tied:
        yield from _part_readers(weight, group, problems, keep_whole=keep_whole)
        return
    for name in dict.fromkeys(site.tied for site in tied):
        own = [entry for entry in group if entry.match.apart in ("", name)]
        if own or name != weight.key:
            yield Table(name, own)


def _part_readers(
    weight: Weight, group: Sequence[WeightChange], problems: list[Problem], *, keep_whole: bool
) -> Iterator[Table]:
    """Yield a copy for each set of sites that some changes are for; changes for all readers are in each of them.

    Where no reader would be left to the weight itself, the first set keeps it, unless it is to be kept whole.
    """
    parts: dict[frozenset[str], str] = {}
    for entry in group:
        sites = [site for site in entry.match.sites if site.weight is not None and site.weight.key == weight.key]
        readers = frozenset(site.id for site in sites)
        if not weight.consumers <= readers:
            parts.setdefault(readers, sites[0].own_name)
    shared = [reader for reader, count in Counter(r for readers in parts for r in readers).items() if count > 1]
    if shared:
        found = f"{weight.name!r} is changed for {shared[0]} in company of different others"
        problems.append(Problem("LF402", group[0].match.want.name, found, "changes for the same readers"))
    is_left = not weight.consumers <= frozenset().union(*parts)
    kept = None if is_left or keep_whole else next(iter(parts), frozenset())
    for readers, name in parts.items():
        own = [entry for entry in group if _is_for(entry, weight, readers)]
        yield Table(weight.key, own) if readers == kept else Table(name, own, tuple(sorted(readers)))
    whole = [entry for entry in group if weight.consumers <= {site.id for site in entry.match.sites}]
    if whole and kept is None and is_left:
        yield Table(weight.key, whole)


def _is_for(entry: WeightChange, weight: Weight, readers: frozenset[str]) -> bool:
    """Say whether a change of a weight is for these readers, or for all that it has."""
    own = {site.id for site in entry.match.sites if site.weight is not None and site.weight.key == weight.key}
    return readers == own or weight.consumers <= own


def plan_weight(
    table: Table, weight: Weight, problems: list[Problem], *, keep_scales: bool = False
) -> PlannedWeight | None:
    """Return the plan of one tensor of the output, None where something stands against it.

    Args:
        table: what it is called, and its changes.
        weight: the base's.
        problems: takes what was found.
        keep_scales: leave the scales of quantised weights as they are.
    """
    name, group, _ = table
    tensor = weight.tensor
    encoding = choose_encoding(tensor.dtype)
    if weight.coding is not None:
        encoding = weight.coding.encoding
    conflicts = check_composition(group)
    if encoding is None:
        found = f"the weight {tensor.name!r} is stored as {tensor.dtype.name}"
        problems.append(Problem("LF403", group[0].match.target.name, found, "a floating-point form"))
    problems += conflicts
    if encoding is None or conflicts:
        return None
    shape = _count_sizes(weight, group)
    matrix = next((entry.change.part.matrix for entry in group if entry.change.part), as_matrix(shape))
    matrix = weight.coding.matrix if weight.coding is not None else matrix
    changes = [_place(entry, matrix) for entry in sorted(group, key=lambda entry: _ORDER[entry.change.nature])]
    apart = name != weight.key
    return PlannedWeight(
        key=weight.key,
        name=name if apart else weight.name,
        file=tensor.span.path.name,
        offset=tensor.span.offset,
        nbytes=tensor.span.length,
        dtype=tensor.dtype.name,
        shape=tensor.shape,
        matrix=matrix,
        encoding=encoding,
        tile_rows=count_tile_rows(matrix, math.lcm(count_block(group), align_rows(weight.coding))),
        changes=tuple(changes),
        evidence=group[0].match.evidence if group else "tie_word_embeddings",
        new=_make_form(table, weight, shape, encoding),
        companions=list_companions(weight, changes, problems, name if table.readers else "", keep_scales=keep_scales),
        block=weight.coding.block if weight.coding is not None else (0, 0),
    )


def _make_form(table: Table, weight: Weight, shape: tuple[int, ...], encoding: str) -> NewForm | None:
    """Return the form of a tensor that is not as in the base; None for one that is."""
    if table.name == weight.key and shape == weight.tensor.shape:
        return None
    source = weight.name if table.readers else ""
    form = weight.tensor.dtype.name
    return NewForm(table.name, form, shape, encoding, copied_from=source, readers=table.readers)


def plan_bias(bias: NewBias, changes: Sequence[PlannedChange]) -> PlannedWeight | None:
    """Return the plan of a bias that the base lacks."""
    tensor, shape, form = bias.beside.weight.tensor, bias.want.shape, bias.dtype.name
    encoding = choose_encoding(bias.dtype)
    if encoding is None:  # The weight itself is refused for it.
        return None
    matrix = as_matrix(shape)
    return PlannedWeight(
        key=bias.name,
        name=bias.name,
        file=tensor.span.path.name,
        offset=0,
        nbytes=0,
        dtype=form,
        shape=shape,
        matrix=matrix,
        encoding=encoding,
        tile_rows=count_tile_rows(matrix),
        changes=tuple(sorted(changes, key=lambda change: _ORDER[change.nature])),
        evidence="new bias",
        new=NewForm(bias.name, form, shape, encoding, False, readers=bias.readers, added=bias.reader),
    )


def _count_sizes(weight: Weight, group: Sequence[WeightChange]) -> tuple[int, ...]:
    """Return the sizes in the output: those of the base, of a table that replaces it, or of a matrix that is wider."""
    whole = [entry for entry in group if not entry.change.part]
    rows = [_shape_of(entry)[0] for entry in whole if entry.change.nature is Nature.REPLACEMENT]
    shape = (max([weight.tensor.shape[0], *rows]), *weight.tensor.shape[1:])
    wider = [_shape_of(entry)[1] for entry in whole if entry.match.change.widens]
    return (shape[0], max([shape[1], *wider])) if wider else shape


def _shape_of(entry: WeightChange) -> tuple[int, ...]:
    return shape_at(replace(entry.match.want, change=entry.match.change), entry.match.sites[0])


def _place(entry: WeightChange, matrix: tuple[int, int]) -> PlannedChange:
    """Return a change with the part that it is of a matrix with more rows, or more columns, than it has."""
    if entry.change.part is not None:
        return entry.change
    rows, columns = as_matrix(_shape_of(entry))
    if rows >= matrix[0] and columns >= matrix[1]:
        return entry.change
    return replace(entry.change, part=Part(matrix, (0, min(rows, matrix[0]), 1), (0, min(columns, matrix[1]), 1)))


def count_block(group: Sequence[WeightChange]) -> int:
    """Return how many rows of the stored matrix the functions of the base must see together."""
    return math.lcm(1, *(_block_of(entry) for entry in group))


def _block_of(entry: WeightChange) -> int:
    if entry.change.nature is not Nature.FUNCTION_OF_BASE:
        return 1
    kind = cast(MappingKind, KINDS.find(entry.change.kind))
    return kind.count_rows_together(entry.match.target, entry.match.change, transposed=entry.change.transposed)


def check_composition(group: Sequence[WeightChange]) -> list[Problem]:
    """Return problems of changes of one weight that do not compose (spec/SPEC.md, R-085)."""
    special = [entry for entry in group if entry.change.nature is not Nature.ADDITIVE]
    if not special:
        return []
    where, name = special[0].match.want.name, special[0].weight.name
    for entry in special:
        rivals = [other for other in group if other is not entry and _rival(entry, other)]
        if rivals:
            others = ", ".join(other.match.want.name for other in rivals)
            found = f"{name!r} is changed by {others} as well"
            return [Problem("LF409", entry.match.want.name, found, "one change of it")]
    if special[0].match.divisor != 1:
        found = f"the graph multiplies {name!r} by {special[0].match.divisor:g}"
        return [Problem("LF403", where, found, "a weight that is used as it is stored")]
    if special[0].match.row_factors or special[0].match.row_order:
        found = f"rows of {name!r} were multiplied by numbers, or moved"
        return [Problem("LF403", where, found, "a weight that is used as it is stored")]
    return [problem for entry in special for problem in _check_whole(entry)]


def _rival(entry: WeightChange, other: WeightChange) -> bool:
    """Say whether another change cannot stand beside one that is a replacement or a function of the base."""
    if not _overlap(entry.change.part, other.change.part):
        return False
    if other.change.nature is not Nature.ADDITIVE:
        return True
    # What is trained on the replaced values goes on top of them.
    return entry.change.nature is Nature.REPLACEMENT and _owners(other).isdisjoint(_owners(entry))


def _check_whole(entry: WeightChange) -> list[Problem]:
    """Return a problem when a function of the base would see less of a weight than it must."""
    if entry.change.nature is not Nature.FUNCTION_OF_BASE:
        return []
    block, part = _block_of(entry), entry.change.part
    torn = part is not None and block > 1 and (part.rows[2] != 1 or part.rows[0] % block != 0)
    if entry.change.section is None and not torn:
        return []
    found = f"{entry.weight.name!r} holds only a part of the module that it changes"
    return [Problem("LF418", entry.match.want.name, found, "the module's weight in one piece")]


def _owners(entry: WeightChange) -> set[tuple[int, str]]:
    return {(entry.change.adapter, name) for name in (entry.change.target, *entry.match.also)}


def _overlap(one: Part | None, other: Part | None) -> bool:
    """Say whether two parts of a stored matrix may have elements in common; one that is None is all of it."""
    if one is None or other is None:
        return True
    return _meet(range(*one.rows), range(*other.rows)) and _meet(range(*one.columns), range(*other.columns))


def _meet(one: range, other: range) -> bool:
    """Say whether two ranges have a number in common."""
    if one.step == other.step == 1:
        return max(one.start, other.start) < min(one.stop, other.stop)
    return not set(one).isdisjoint(other)
