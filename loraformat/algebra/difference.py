"""How two adapters, or two models, differ: target by target, or weight by weight."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Adapter, Target
from loraformat.algebra._cutting import sum_svd
from loraformat.algebra._dense import Tile, walk
from loraformat.algebra._lowrank import Svd, compare_subspaces
from loraformat.algebra._refusals import check_alike, check_numbers
from loraformat.algebra._sums import VALUES
from loraformat.algebra._targets import list_changes, nature_of, open_delta, pair_roles, tells_size
from loraformat.bases import BaseModel
from loraformat.encodings import choose_encoding
from loraformat.errors import error_for, refuse
from loraformat.kinds import Change, Nature
from loraformat.limits import TILE_BYTES
from loraformat.problems import Problem
from loraformat.spans import Span, StoredTensor

_NOISE: Final = 1e-6
"""Directions with a smaller share of the largest singular value are rounding."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One target of both adapters, or one weight of both models; norms are Frobenius norms.

    Attributes:
        name: of the target or weight.
        first: ‖Δa‖, or ‖a‖ of values.
        second: ‖Δb‖, or ‖b‖.
        difference: ‖Δb − Δa‖, or ‖b − a‖.
        outputs: similarity of the left singular subspaces, from 0 to 1; None where it is not measured.
        inputs: similarity of the right singular subspaces.
    """

    name: str
    first: float
    second: float
    difference: float
    outputs: float | None = None
    inputs: float | None = None

    @property
    def relative(self) -> float:
        """The difference relative to the first; infinite where that is zero, or no number measures it."""
        if not self.difference:
            return 0.0
        relative = self.difference / self.first if self.first else math.inf
        return math.inf if math.isnan(relative) else relative


@dataclass(frozen=True, slots=True)
class Difference:
    """How two adapters or two models differ.

    Attributes:
        kind: `adapter` or `base`.
        shared: what both have, sorted by name.
        only_first: names that only the first has.
        only_second: names that only the second has.
        incomparable: what has one name but not one shape or form, and is not compared.
    """

    kind: str
    shared: tuple[Compared, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    incomparable: tuple[Problem, ...]

    def __repr__(self) -> str:
        """Say what it is in one line."""
        word = "none" if self.is_same else f"{self.relative:.4g} of the first"
        apart = f"{len(self.only_first)} only in the first, {len(self.only_second)} only in the second"
        return f"<Difference: {word}; {len(self.shared)} shared, {apart}, {len(self.incomparable)} incomparable>"

    @property
    def is_same(self) -> bool:
        """Whether no difference was found."""
        changed = any(item.difference for item in self.shared)
        return not (changed or self.only_first or self.only_second or self.incomparable)

    @property
    def relative(self) -> float:
        """The difference of all that is shared, relative to the first."""
        apart = math.hypot(*(item.difference for item in self.shared))
        return Compared("", math.hypot(*(item.first for item in self.shared)), 0.0, apart).relative

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        return {
            "kind": self.kind,
            "same": self.is_same,
            "relative": self.relative,
            "shared": [asdict(item) | {"relative": item.relative} for item in self.shared],
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "incomparable": [dict(problem.as_json()) for problem in self.incomparable],
        }


def compare_adapters(one: Adapter, other: Adapter) -> Difference:
    """Compare two adapters: what they do, not how their factors are written.

    Raises:
        LoraformatError: what stands against the numbers of either.
    """
    problems = [*check_numbers(one), *check_numbers(other)]
    if problems:
        raise error_for(problems)
    first, second = ({target.name: target for target in adapter.targets} for adapter in (one, other))
    odd = {problem.where: problem for problem in check_alike([one, other])}
    for name in first.keys() & second.keys() - odd.keys():
        pair = first[name], second[name]
        kinds, natures = {target.kind for target in pair}, set(map(nature_of, pair))
        strange = Nature.FUNCTION_OF_BASE in natures or (Nature.REPLACEMENT in natures and kinds != {VALUES})
        if strange or not all(map(tells_size, pair)):
            found = f"the kind {' and '.join(sorted(kinds))}, whose effect depends on the base"
            odd[name] = Problem("LF702", name, found, "merged models to compare", severity="note")
    common = sorted(first.keys() & second.keys() - odd.keys())
    return Difference(
        "adapter",
        tuple(item for name in common for item in _compare_targets(first[name], second[name])),
        tuple(sorted(first.keys() - second.keys())),
        tuple(sorted(second.keys() - first.keys())),
        tuple(odd[name] for name in sorted(odd)),
    )


def _compare_targets(one: Target, other: Target) -> Iterator[Compared]:
    """Yield the comparison of every parameter that either changes; the weight has the target's name."""
    if nature_of(one) is Nature.REPLACEMENT:
        pairs = ((one.factors[role].read(), other.factors[role].read()) for role in one.factors)
        yield _sum_up(one.name, pairs)
        return
    first, second = ({change.parameter: change for change in list_changes(target)} for target in (one, other))
    for parameter in sorted(first.keys() | second.keys(), key=lambda name: (name != "weight", name)):
        if parameter == "weight" and pair_roles(one) is not None and pair_roles(other) is not None:
            yield _compare_factors(one, other)
            continue
        changes = first.get(parameter), second.get(parameter)
        name = one.name if parameter == "weight" else f"{one.name}.{parameter}"
        yield _sum_up(name, _walk_pair((one, other), changes))


def _walk_pair(targets: Sequence[Target], changes: Sequence[Change | None]) -> Iterator[tuple[Tile, Tile]]:
    """Yield the tiles of two changes side by side; of one that is not there, zeros."""
    first, second = (
        None if change is None else walk(open_delta(target, change))
        for target, change in zip(targets, changes, strict=True)
    )
    for tile in first or second or ():
        if first is None or second is None:
            yield (np.zeros_like(tile), tile) if first is None else (tile, np.zeros_like(tile))
        else:
            yield tile, next(second)


def _compare_factors(one: Target, other: Target) -> Compared:
    """Compare the changes of two LoRAs without forming them."""
    first, second = sum_svd([(one, 1.0)]), sum_svd([(other, 1.0)])
    before, after = (float(np.linalg.norm(svd.values)) for svd in (first, second))
    apart = float(np.linalg.norm(sum_svd([(other, 1.0), (one, -1.0)]).values))
    if apart <= np.finfo(np.float64).eps * (one.rank + other.rank) * max(before, after):
        apart = 0.0  # What is left of equal changes is the rounding of the QR.
    i, j = _count_directions(first), _count_directions(second)
    if not i or not j:
        return Compared(one.name, before, after, apart)
    outputs = compare_subspaces(first.left[:, :i], second.left[:, :j])
    inputs = compare_subspaces(first.right[:i].T, second.right[:j].T)
    return Compared(one.name, before, after, apart, outputs, inputs)


def _count_directions(svd: Svd) -> int:
    return int(np.count_nonzero(svd.values > _NOISE * svd.values[0]))


def compare_models(one: BaseModel, other: BaseModel) -> Difference:
    """Compare the weights of two models by their tensors' names, tile by tile.

    Raises:
        FindingError: LF707 no name stands in both.
    """
    first, second = ({tensor.name: tensor for tensor in base.list_tensors()} for base in (one, other))
    if not first.keys() & second.keys():
        names = f"{next(iter(first), 'nothing')} ..., {next(iter(second), 'nothing')} ..."
        raise refuse("LF707", f"{one.path} and {other.path}", names, "tensors of the same names")
    shared, odd = [], []
    for name in sorted(first.keys() & second.keys()):
        problem = _check_tensors(name, first[name], second[name])
        if problem is None:
            shared.append(_sum_up(name, zip(_walk_tensor(first[name]), _walk_tensor(second[name]), strict=True)))
        else:
            odd.append(problem)
    only = (tuple(sorted(first.keys() - second.keys())), tuple(sorted(second.keys() - first.keys())))
    return Difference("base", tuple(shared), *only, tuple(odd))


def _check_tensors(name: str, one: StoredTensor, other: StoredTensor) -> Problem | None:
    """Return why two tensors are not compared: their shapes, or a number form that is not decoded here."""
    if one.shape != other.shape:
        return Problem("LF704", name, f"{list(one.shape)} and {list(other.shape)}", "one shape", severity="note")
    packed = next((tensor.dtype for tensor in (one, other) if not _is_readable(tensor)), None)
    if packed is None:
        return None
    return Problem("LF106", name, f"numbers as {packed.name}", "whole numbers or floating-point ones", severity="note")


def _is_readable(tensor: StoredTensor) -> bool:
    whole = tensor.dtype.family in ("int", "uint", "bool") and tensor.dtype.bits >= 8
    return whole or choose_encoding(tensor.dtype) is not None


def _walk_tensor(tensor: StoredTensor) -> Iterator[NDArray[Any]]:
    """Yield a stored tensor's numbers piece by piece, as a vector."""
    form = tensor.dtype.numpy()
    step = TILE_BYTES // 8
    for start in range(0, tensor.elements, step):
        count = min(step, tensor.elements - start)
        span = Span(tensor.span.path, tensor.span.offset + start * form.itemsize, count * form.itemsize)
        yield StoredTensor(tensor.name, tensor.dtype, (count,), span, tensor.file).read()


def _sum_up(name: str, pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> Compared:
    """Return the norms of two arrays and of their difference, given in pieces; float64."""
    parts = [(0.0, 0.0, 0.0)]
    for pair in pairs:
        with np.errstate(invalid="ignore"):  # Some NaN are signals, and the cast makes quiet ones of them.
            one, other = (piece.reshape(-1).astype(np.float64) for piece in pair)
        parts.append((_norm(one), _norm(other), _norm(_subtract(other, one))))
    return Compared(name, *(math.hypot(*column) for column in zip(*parts, strict=True)))


def _subtract(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the difference; zero between two NaN and between equal infinities."""
    with np.errstate(over="ignore", invalid="ignore"):
        apart = one - other
    if not np.isfinite(apart).all():
        apart[(one == other) | (np.isnan(one) & np.isnan(other))] = 0.0
    return apart


def _norm(values: NDArray[np.float64]) -> float:
    """Return a vector's norm, also where the squares are beyond float64; infinite where a number is none."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = float(values @ values)
    if math.isfinite(squares):
        return math.sqrt(squares)
    largest = float(np.max(np.abs(values)))
    if not math.isfinite(largest):
        return math.inf
    scaled = values / largest
    return largest * math.sqrt(float(scaled @ scaled))
