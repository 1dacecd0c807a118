"""Tables of φ: between the layers of one adapter, and between the ranks of two."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.algebra._angles import measure_angle
from loraformat.algebra._directions import NUMBER, Opened, Subject, open_target
from loraformat.algebra._lowrank import Matrix
from loraformat.algebra.analysis import SIDES, Comparison, LayerMap, RankMap
from loraformat.algebra.subspaces import compare_directions

_GRID: Final = 32
"""Rows and columns of a table of φ; larger ranks are shown at so many places."""
_LAYERS: Final = 96
"""Layers of a map; of more, as many are shown."""


def map_layers(module: str, opened: Sequence[Opened]) -> Iterator[LayerMap]:
    """Yield φ of the whole subspaces of every two layers, for both sides, where there are several of one shape."""
    for side in SIDES:
        usable = [each for each in opened if each.count]
        usable = [usable[place] for place in _pick(len(usable), _LAYERS)]
        bases = [each.sides[side] for each in usable]
        if len(usable) < 2 or len({base.shape[0] for base in bases}) != 1:
            continue
        phi = np.eye(len(bases))
        expected = []
        for i, j in combinations(range(len(bases)), 2):
            phi[i, j] = phi[j, i] = compare_directions(bases[i], bases[j])[-1, -1]
            expected.append(_expect(bases[i], bases[j]))
        yield LayerMap(
            module, side, _label([each.target.name for each in usable]), _rows(phi), float(np.mean(expected))
        )


def _label(names: Sequence[str]) -> tuple[str, ...]:
    """Return the number of each name's layer, or all its numbers where that does not tell them apart."""
    numbers = [NUMBER.findall(name) for name in names]
    first = tuple(each[0] if each else name for each, name in zip(numbers, names, strict=True))
    return first if len(set(first)) == len(first) else tuple(".".join(each) for each in numbers)


def compare_subjects(first: Subject, second: Subject) -> Comparison | None:
    """Return what two adapters share; None where no target of one is in the other with the same shape."""
    others = {target.name: target for target in second.adapter.targets}
    by_target: dict[str, dict[str, float]] = {}
    maps: list[RankMap] = []
    for module, group in first.groups().items():
        pairs = [(open_target(target), open_target(others[target.name])) for target in group if target.name in others]
        pairs = [(a, b) for a, b in pairs if a.count and b.count and _are_of_one_shape(a, b)]
        for a, b in pairs:
            phi = {side: float(compare_directions(a.sides[side], b.sides[side])[-1, -1]) for side in SIDES}
            by_target[a.target.name] = phi | {"cosine": _cosine(a, b)}
        maps += [_map_ranks(module, side, pairs) for side in SIDES if pairs]
    return Comparison(first.name, second.name, tuple(maps), by_target) if by_target else None


def _are_of_one_shape(first: Opened, second: Opened) -> bool:
    return all(first.sides[side].shape[0] == second.sides[side].shape[0] for side in SIDES)


def _map_ranks(module: str, side: str, pairs: Sequence[tuple[Opened, Opened]]) -> RankMap:
    """Return the mean of φ(i, j) over pairs of targets, as far as all of them have directions."""
    counts = [min(pair[place].sides[side].shape[1] for pair in pairs) for place in (0, 1)]
    rows, columns = (_pick(count, _GRID) for count in counts)
    total = np.zeros((len(rows), len(columns)))
    for a, b in pairs:
        total += compare_directions(a.sides[side], b.sides[side])[np.ix_(rows, columns)]
    expected = max(counts) / pairs[0][0].sides[side].shape[0]
    first, second = (tuple(place + 1 for place in places) for places in (rows, columns))
    return RankMap(module, side, len(pairs), first, second, _rows(total / len(pairs)), expected)


def _cosine(first: Opened, second: Opened) -> float:
    """Return ⟨Δ₁, Δ₂⟩ / (‖Δ₁‖·‖Δ₂‖)."""
    one, other, inner = measure_angle(first.target, second.target)
    return inner / (one * other) if one and other else 0.0


def _expect(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Return φ of random subspaces of these sizes: max(i, j) / n."""
    return float(max(first.shape[1], second.shape[1]) / first.shape[0])


def _pick(count: int, at_most: int) -> list[int]:
    """Return places from 0 to count − 1, evenly chosen where there are more than `at_most`, the ends among them."""
    return sorted({int(place) for place in np.linspace(0, count - 1, min(count, at_most)).round()})


def _rows(values: Matrix) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in values)
