"""New adapters to start training from, for the weights of a base; B is zero unless the method says otherwise.

    gaussian     A ~ N(0, 1/rank²), B = 0                      Hu et al., arXiv 2106.09685; PEFT's "gaussian"
    kaiming      A ~ U(-1/√in, 1/√in), B = 0                   loralib's code (kaiming_uniform_ with a = √5)
    svd          A = leading right singular directions of W, B = 0
    covariance   A = leading directions of the activations that enter, B = 0      as EVA, arXiv 2410.07170
    pissa        A = √s·Vᵀ, B = U·√s of W's leading singular values               arXiv 2404.02948; changes the base

An embedding's A is zero and its B normal with deviation 1, as in loralib: its A has a column for each token, and of
those only the tokens of a batch would move. With B = 0 (or A = 0) the adapter changes nothing until it is trained.
`pissa` is the exception: its change is not zero, so training has to start from the base without it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target
from loraformat.algebra._pairing import choose_slot, factor_shape, list_sites, matches_any, take_fingerprint
from loraformat.algebra._random import generator
from loraformat.algebra._randomised import leading_svd
from loraformat.algebra._targets import LORA, PAIRS, hold
from loraformat.algebra._weights import read_weight
from loraformat.algebra.components import PLAIN, Structure, leading_components
from loraformat.algebra.statistics import Statistics
from loraformat.bases import BaseModel, Site
from loraformat.errors import error_for
from loraformat.problems import Problem, count_problems

_PURPOSE: Final = "loraformat-init-1"
_LISTED: Final = 8
Factors: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32]]
"""A (rank, in * kernel) and B (out, rank)."""


class Method(StrEnum):
    """How A and B are chosen."""

    GAUSSIAN = "gaussian"
    KAIMING = "kaiming"
    SVD = "svd"
    COVARIANCE = "covariance"
    PISSA = "pissa"

    @property
    def changes_base(self) -> bool:
        """Whether training has to start from a base other than the given one."""
        return self is Method.PISSA


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a new adapter should be like.

    Attributes:
        rank: rank of every target.
        method: how A and B are chosen.
        alpha: lora_alpha; None takes the rank, so that the scale is 1.
        seed: of the random numbers; each target has numbers of its own that follow from its name.
        structure: what the components of `covariance` should be like.
        statistics: the activations, for `covariance`.
    """

    rank: int
    method: Method = Method.GAUSSIAN
    alpha: float | None = None
    seed: int = 0
    structure: Structure = PLAIN
    statistics: Statistics | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """One weight that gets a target."""

    module: str
    site: Site
    slot: SlotKind
    shape: tuple[int, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """`(out, in * kernel)`."""
        return self.shape[0], int(np.prod(self.shape[1:]))


@dataclass(frozen=True, slots=True)
class Initialisation:
    """A new adapter.

    Attributes:
        adapter: the adapter, bound to its base by fingerprints.
        method: how it was made.
        problems: what the user should know; LF729 where training starts from a changed base.
    """

    adapter: Adapter
    method: Method
    problems: tuple[Problem, ...]

    def __repr__(self) -> str:
        """Say what it is in one line."""
        return f"<Initialisation: {self.adapter!r}, {self.method.value}; {count_problems(self.problems)}>"

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        return {
            "targets": [
                {"name": target.name, "slot": target.slot.value, "rank": target.rank, "scale": target.scale}
                for target in self.adapter.targets
            ],
            "trained_numbers": self.adapter.parameters,
            "method": self.method.value,
            "changes_base": self.method.changes_base,
            "problems": [dict(problem.as_json()) for problem in self.problems],
        }


def initialise_adapter(base: BaseModel, targets: Sequence[str], recipe: Recipe) -> Initialisation:
    """Return a new adapter for the weights of `base` whose module paths match; one dense weight is held at a time.

    Args:
        base: the model to train on.
        targets: glob patterns of module paths.
        recipe: what the adapter should be like.

    Raises:
        FindingError: LF723 a weight that is not finite, LF724 a pattern that matches no weight, LF727 a rank larger
            than a weight, LF728 statistics that are missing or do not fit.
    """
    places = _find_places(base, targets)
    problems = _check(places, targets, recipe)
    if problems:
        raise error_for(problems)
    made = tuple(_make_target(place, recipe) for place in places)
    options = {"method": recipe.method.value, "seed": recipe.seed, **recipe.structure.as_json()}
    adapter = Adapter(made, provenance={"initialised": options})
    notes = []
    if recipe.method.changes_base:
        found = "the method 'pissa', whose first change is not zero"
        notes.append(Problem("LF729", "the new adapter", found, severity="warning"))
    return Initialisation(adapter, recipe.method, tuple(notes))


def _find_places(base: BaseModel, globs: Sequence[str]) -> list[_Place]:
    places = []
    for (module, parameter), site in sorted(list_sites(base).items()):
        slot = choose_slot(site)
        if parameter == "weight" and slot is not SlotKind.PARAMETER and matches_any(module, globs):
            places.append(_Place(module, site, slot, factor_shape(site, slot)))
    return places


def _check(places: Sequence[_Place], globs: Sequence[str], recipe: Recipe) -> list[Problem]:
    names = [place.module for place in places]
    lost = [glob for glob in globs if not any(matches_any(name, [glob]) for name in names)]
    problems = [Problem("LF724", glob, "no weight that factors can change", "globs of module paths") for glob in lost]
    small = [place for place in places if min(place.matrix) < recipe.rank]
    problems += [
        Problem("LF727", place.module, f"rank {recipe.rank} for a weight of {place.matrix[0]} by {place.matrix[1]}")
        for place in small[:_LISTED]
    ]
    if recipe.method is Method.COVARIANCE:
        statistics = recipe.statistics
        if statistics is None:
            return [*problems, Problem("LF728", "covariance", "no statistics", "an archive of activations")]
        for place in places:
            if place.slot is SlotKind.EMBEDDING:
                found = "a table of embeddings, which tokens enter and no activations"
                problems.append(Problem("LF728", place.module, found, "other targets, or another method"))
            else:
                problems += statistics.check(place.module, place.matrix[1], recipe.rank)
    return problems


def _make_target(place: _Place, recipe: Recipe) -> Target:
    down, up = _METHODS[recipe.method](place, recipe)
    roles = PAIRS[place.slot is SlotKind.EMBEDDING]
    shapes = (recipe.rank, *place.shape[1:]), (place.shape[0], recipe.rank, *(1,) * (len(place.shape) - 2))
    factors = {
        role: hold(f"{place.module}.{role}", np.ascontiguousarray(half, np.float32).reshape(shape))
        for role, half, shape in zip(roles, (down, up), shapes, strict=True)
    }
    alpha = float(recipe.rank) if recipe.alpha is None else recipe.alpha
    scaling = Scaling(ScalingRule.ALPHA_OVER_RANK, alpha)
    fingerprint = take_fingerprint(place.module, place.site, place.slot)
    return Target(place.module, LORA, place.slot, factors, recipe.rank, scaling, fingerprint)


def _gaussian(place: _Place, recipe: Recipe) -> Factors:
    return _random(place, recipe, lambda rng, shape: rng.standard_normal(shape, np.float32) / np.float32(recipe.rank))


def _kaiming(place: _Place, recipe: Recipe) -> Factors:
    bound = 1.0 / np.sqrt(place.matrix[1])
    return _random(place, recipe, lambda rng, shape: rng.uniform(-bound, bound, shape).astype(np.float32))


def _random(
    place: _Place, recipe: Recipe, draw: Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float32]]
) -> Factors:
    rng = generator(_PURPOSE, recipe.seed, place.module)
    out, width = place.matrix
    if place.slot is SlotKind.EMBEDDING:
        return np.zeros((recipe.rank, width), np.float32), rng.standard_normal((out, recipe.rank), np.float32)
    return draw(rng, (recipe.rank, width)), np.zeros((out, recipe.rank), np.float32)


def _svd(place: _Place, recipe: Recipe) -> Factors:
    _, _, right = _leading(place, recipe)
    return right.astype(np.float32), np.zeros((place.matrix[0], recipe.rank), np.float32)


def _pissa(place: _Place, recipe: Recipe) -> Factors:
    """Share the leading part of W evenly between the factors, the scale divided out."""
    left, values, right = _leading(place, recipe)
    alpha = float(recipe.rank) if recipe.alpha is None else recipe.alpha
    scale = alpha / recipe.rank
    roots = np.sqrt(values / abs(scale))
    return (roots[:, None] * right).astype(np.float32), (left * roots * np.sign(scale)).astype(np.float32)


def _leading(place: _Place, recipe: Recipe) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    weight = read_weight(place.site, transposed=place.site.transposed[place.slot])
    part = leading_svd(weight, generator(_PURPOSE, recipe.seed, place.module), rank=recipe.rank)
    left, values, right = part.svd
    lacking = recipe.rank - len(values)  # A weight of lower rank: the rest of A and B is zero.
    return (
        np.pad(left, ((0, 0), (0, lacking))),
        np.pad(values, (0, lacking)),
        np.pad(right, ((0, lacking), (0, 0))),
    )


def _covariance(place: _Place, recipe: Recipe) -> Factors:
    assert recipe.statistics is not None, "checked before"
    covariance = recipe.statistics.read_covariance(place.module, place.matrix[1])
    down = leading_components(covariance, recipe.rank, recipe.structure)
    return down.astype(np.float32), np.zeros((place.matrix[0], recipe.rank), np.float32)


_METHODS: Final[Mapping[Method, Callable[[_Place, Recipe], Factors]]] = {
    Method.GAUSSIAN: _gaussian,
    Method.KAIMING: _kaiming,
    Method.SVD: _svd,
    Method.COVARIANCE: _covariance,
    Method.PISSA: _pissa,
}
