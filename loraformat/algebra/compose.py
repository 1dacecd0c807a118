"""Several adapters as one: Σ wᵢΔᵢ exactly, or by another method, or cut to a lower rank."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from loraformat.adapter import Adapter, BaseBinding, Target
from loraformat.algebra._cutting import cut_dense, cut_sum, stays_dense
from loraformat.algebra._dense import Tiles
from loraformat.algebra._lowrank import Cut
from loraformat.algebra._refusals import check_alike, check_numbers, check_same_base, name_of, refuse_addition
from loraformat.algebra._sums import VALUES, Share, Term, add_differences, blend_values, concatenate
from loraformat.algebra._targets import is_weight_alone, nature_of, open_delta, pair_roles, rescale, with_factors
from loraformat.algebra.methods import METHODS, Elementwise, Linear, Method, pair_shares
from loraformat.algebra.reduction import Reduction
from loraformat.dtypes import BY_NAME
from loraformat.errors import error_for
from loraformat.frozen_mapping import FrozenMapping
from loraformat.kinds import Delta, Nature
from loraformat.problems import Problem
from loraformat.strict_json import JsonValue, write_canonical

RECORD_KEY: Final = "x.loraformat.compose"
"""The annotation that says what an adapter was composed of."""
_NO_CUT: Final = Cut()


@dataclass(frozen=True, slots=True)
class Recipe:
    """How adapters are put together.

    Attributes:
        method: a name in `METHODS`.
        cut: where to cut the result; none by default.
        density: the share of numbers that the pruning and dropping methods keep.
        seed: for the methods that drop by chance.
        allow_different_bases: accept adapters that say that they belong to different bases.
    """

    method: str = "sum"
    cut: Cut = _NO_CUT
    density: float = 0.5
    seed: int = 0
    allow_different_bases: bool = False


def compose_adapters(
    items: Sequence[tuple[Adapter, float]],
    recipe: Recipe | None = None,
    report: Callable[[Reduction], object] | None = None,
) -> Adapter:
    """Return one adapter that does what all of `items` do together, each with its weight.

    Args:
        items: adapters with weights; targets, ranks, alphas and number forms may differ.
        recipe: how; the exact sum by default. Its factors are computed when they are read.
        report: told of each target that was cut.

    Raises:
        LoraformatError: with every problem: LF207 a weight that is no number, LF501 NaN in a factor, LF701 different
            bases, LF702 kinds that do not add, LF703 a result that has no exact factors and no rank to cut it to, LF704
            shapes that disagree, LF705 settings out of range.
    """
    asked = recipe or Recipe()
    adapters = [adapter for adapter, _ in items]
    weights = [float(weight) for _, weight in items]
    problems = _check_settings(asked, adapters, weights)
    if not problems:
        problems = _check_inputs(asked, adapters)
    if problems:
        raise error_for(problems)
    groups: dict[str, list[Term]] = defaultdict(list)
    for position, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for target in adapter.targets:
            groups[target.name].append(Term(position, weight, target))
    method = METHODS[asked.method]
    problems = [found for terms in groups.values() for found in _check_group(terms, method, weights, asked)]
    if problems:
        raise error_for(problems)
    targets = []
    for _, terms in sorted(groups.items()):
        target, reduction = _combine(terms, method, weights, asked)
        targets.append(target)
        if reduction is not None and report is not None:
            report(reduction)
    return Adapter(tuple(targets), base=_join_bases(adapters), metadata=_describe(asked, adapters, weights))


def _check_settings(recipe: Recipe, adapters: Sequence[Adapter], weights: Sequence[float]) -> list[Problem]:
    method = METHODS.get(recipe.method)
    if method is None:
        return [Problem("LF705", "method", repr(recipe.method), f"one of {', '.join(METHODS)}")]
    if not adapters:
        return [Problem("LF705", "adapters", "none", "at least one")]
    problems = [
        Problem("LF207", name_of(adapter), f"weight {weight}", "a finite number", "Give a finite weight.")
        for adapter, weight in zip(adapters, weights, strict=True)
        if not math.isfinite(weight)
    ]
    if problems:
        return problems
    return _check_cut(recipe) if isinstance(method, Elementwise) else _check_weights(recipe.method, method, weights)


def _check_cut(recipe: Recipe) -> list[Problem]:
    """Return problems of the settings of a method that works on the numbers of the changes."""
    problems = []
    if not 0 < recipe.density <= 1:
        problems.append(Problem("LF705", "density", f"{recipe.density:g}", "above 0, at most 1"))
    if recipe.cut.is_none:
        found = f"the method {recipe.method!r}, whose result has no exact factors, and nothing to cut it to"
        problems.append(Problem("LF703", "rank", found, "a rank, an energy or a largest error"))
    return problems


def _check_weights(name: str, method: Linear, weights: Sequence[float]) -> list[Problem]:
    if method.count and len(weights) != method.count:
        return [Problem("LF705", "adapters", f"{len(weights)} for {name!r}", f"{method.count}")]
    if method.normalises and math.fsum(weights) == 0:
        return [Problem("LF705", "weights", f"a sum of 0 for {name!r}", "a sum other than 0")]
    return []


def _check_inputs(recipe: Recipe, adapters: Sequence[Adapter]) -> list[Problem]:
    problems = [problem for adapter in {id(a): a for a in adapters}.values() for problem in check_numbers(adapter)]
    if not recipe.allow_different_bases:
        problems += check_same_base(adapters)
    return problems or check_alike(adapters)


def _check_group(terms: Sequence[Term], method: Method, weights: Sequence[float], recipe: Recipe) -> list[Problem]:
    """Return what stands against putting the targets of one name together."""
    first = terms[0].target
    nature = nature_of(first)
    strange = next((term.target for term in terms if nature_of(term.target) is Nature.FUNCTION_OF_BASE), None)
    if strange is not None:
        alone = len(terms) == 1 and isinstance(method, Linear) and method.weigh(weights, terms) == [1.0]
        return [] if alone else [refuse_addition(strange)]
    if nature is Nature.REPLACEMENT:
        return _check_values(terms, method, weights)
    infinite = [term for term in terms if not math.isfinite(term.target.scale * term.weight)]
    if infinite:
        found = f"{infinite[0].target.scale:g} times the weight {infinite[0].weight:g}"
        return [Problem("LF207", first.name, found, "a finite number", "Give a smaller weight.")]
    return _check_factors(terms, method, recipe)


def _check_factors(terms: Sequence[Term], method: Method, recipe: Recipe) -> list[Problem]:
    """Return the problem of additive targets whose sum has no exact factors, or cannot be cut."""
    name, targets = terms[0].target.name, [term.target for term in terms]
    factored = all(pair_roles(target) is not None for target in targets)
    if isinstance(method, Linear) and (factored or stays_dense(targets, recipe.cut)):
        return []
    if isinstance(method, Linear) and len(terms) == 1 and recipe.cut.is_none:
        return []
    kinds = ", ".join(sorted({target.kind for target in targets}))
    if not all(map(is_weight_alone, targets)):
        found = f"the kinds {kinds}, of which one changes something beside a weight, or tells not all of its size"
        return [Problem("LF703", name, found, "changes of a weight alone, or a sum of LoRAs")]
    if recipe.cut.is_none:
        found = f"a sum of the kinds {kinds}, which has no exact factors, and nothing to cut it to"
        return [Problem("LF703", name, found, "LoRAs of factors A and B, or a rank")]
    return []


def _check_values(terms: Sequence[Term], method: Method, weights: Sequence[float]) -> list[Problem]:
    name = terms[0].target.name
    if len(terms) == 1:
        return []
    if isinstance(method, Elementwise):
        found = f"values that replace, in {len(terms)} adapters, under a method for changes"
        return [Problem("LF703", name, found, "them in one adapter, or the method 'sum' or 'mean'")]
    strange = next((term.target.kind for term in terms if term.target.kind != VALUES), None)
    if strange is not None:
        found = f"the kind {strange!r}, whose values stand for parts of a weight, in {len(terms)} adapters"
        return [Problem("LF703", name, found, f"them in one adapter, or the kind {VALUES!r}")]
    shares = pair_shares(method, weights, terms)
    if math.fsum(target.scale * share for target, share in shares) == 0:
        found = "values that replace, whose weights add up to 0: what is left is a difference, which replaces nothing"
        return [Problem("LF702", name, found, "weights with a sum other than 0")]
    return []


def _combine(
    terms: Sequence[Term], method: Method, weights: Sequence[float], recipe: Recipe
) -> tuple[Target, Reduction | None]:
    first = terms[0].target
    nature = nature_of(first)
    if nature is Nature.FUNCTION_OF_BASE:
        return first, None
    if nature is Nature.REPLACEMENT:
        return blend_values(_share(terms, method, weights)), None
    reduction: Reduction | None = None
    if isinstance(method, Elementwise):
        target, reduction = _combine_numbers(terms, method, recipe)
    else:
        shares = [share for share in pair_shares(method, weights, terms) if share[0].scale * share[1]]
        if recipe.cut.is_none or not shares or stays_dense([term.target for term in terms], recipe.cut):
            target = _add_exactly(shares or [(first, 0.0)])
        else:
            target, reduction = _cut_shares(shares, recipe.cut)
    bound = next((term.target.fingerprint for term in terms if term.target.fingerprint is not None), None)
    return replace(target, fingerprint=bound), reduction


def _share(terms: Sequence[Term], method: Method, weights: Sequence[float]) -> list[Share]:
    """Return values that replace with their factors; a method for changes leaves those of one adapter as weighed."""
    if isinstance(method, Linear):
        return pair_shares(method, weights, terms)
    return [(term.target, term.weight) for term in terms]


def _add_exactly(shares: Sequence[Share]) -> Target:
    target, weight = shares[0]
    if len(shares) == 1:
        return target if weight == 1 else rescale(target, weight)
    return concatenate(shares) if pair_roles(target) is not None else add_differences(shares)


def _cut_shares(shares: Sequence[Share], cut: Cut) -> tuple[Target, Reduction]:
    """Return the sum cut; where that would save nothing, the exact sum."""
    target, reduction = cut_sum(shares, cut)
    if all(pair_roles(share[0]) is not None for share in shares) and reduction.after >= reduction.before:
        return _add_exactly(shares), Reduction(reduction.target, reduction.before, reduction.before, 0.0)
    return target, reduction


def _combine_numbers(terms: Sequence[Term], method: Elementwise, recipe: Recipe) -> tuple[Target, Reduction]:
    first = terms[0].target
    weights = [term.weight for term in terms]
    seeds = [f"{recipe.seed}\n{term.position}\n{first.name}" for term in terms]

    def make(deltas: Sequence[Delta]) -> Tiles:
        parts = [method.sparsify(delta, recipe.density, seed) for delta, seed in zip(deltas, seeds, strict=True)]
        for tiles in zip(*parts, strict=True):
            yield method.join(tiles, weights)

    truncated = cut_dense([open_delta(term.target) for term in terms], make, recipe.cut)
    target = with_factors(first, truncated, BY_NAME[recipe.cut.dtype])
    return target, Reduction(first.name, sum(term.target.rank for term in terms), target.rank, truncated.error)


def _join_bases(adapters: Sequence[Adapter]) -> BaseBinding:
    """Return the base that the adapters name; the first one's where they were allowed to differ."""
    named = [adapter.base for adapter in adapters if adapter.base.name is not None]
    fullest = sorted(named, key=lambda base: base.revision is None)
    return fullest[0] if fullest else BaseBinding()


def _describe(recipe: Recipe, adapters: Sequence[Adapter], weights: Sequence[float]) -> Mapping[str, str]:
    """Return the annotations that all adapters share, and the record of what was done."""
    shared = {
        key: text
        for key, text in adapters[0].metadata.items()
        if key != RECORD_KEY and all(adapter.metadata.get(key) == text for adapter in adapters)
    }
    record: dict[str, JsonValue] = {
        "method": recipe.method,
        "adapters": [{"sha256": a.sha256, "weight": weight} for a, weight in zip(adapters, weights, strict=True)],
    }
    if isinstance(METHODS[recipe.method], Elementwise):
        record |= {"density": recipe.density, "seed": recipe.seed}
    if recipe.cut.rank is not None:
        record["rank"] = recipe.cut.rank
    if recipe.cut.rule is not None:
        record[recipe.cut.rule] = recipe.cut.threshold
    return FrozenMapping(shared | {RECORD_KEY: write_canonical(record).decode("utf-8")})
