"""The functions of the public face that make adapters of adapters, or compare."""

from collections.abc import Callable, Mapping
from pathlib import Path

from loraformat.adapter import Adapter
from loraformat.algebra.compose import Recipe, compose_adapters
from loraformat.algebra.difference import Difference, compare_adapters, compare_models
from loraformat.algebra.reduction import Reduction
from loraformat.algebra.resize import make_cut, resize_adapter
from loraformat.algebra.scale import scale_adapter
from loraformat.arguments import AdapterArguments, AdapterSource, list_adapters
from loraformat.errors import refuse
from loraformat.loading import is_base, load_adapter, open_base
from loraformat.schemes import StatedScale


def compose(
    adapters: AdapterArguments,
    method: str = "sum",
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    dtype: str = "float32",
    density: float = 0.5,
    seed: int = 0,
    allow_different_bases: bool = False,
    scheme: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
    report: Callable[[Reduction], object] | None = None,
) -> Adapter:
    """Return one adapter that does what `adapters` do together: Σ wᵢΔᵢ exactly, if no rank or method says otherwise.

    Args:
        adapters: paths or loaded adapters, each alone or as `(adapter, weight)`; they may have different targets,
            ranks, alphas and number forms.
        method: `sum`, `task-arithmetic`, `mean`, `slerp` (exact); `magnitude-prune`, `ties`, `dare`, `dare-ties` (which
            need a rank, an energy or a largest error).
        rank: at most this rank for each target, by the singular values of the result.
        energy: the fewest that hold this share of Σσ².
        max_error: the fewest with ‖left out‖ ≤ max_error · ‖all‖.
        dtype: number form of factors that were cut; sums that are not cut keep theirs.
        density: share of the numbers that the pruning and dropping methods keep.
        seed: of the methods that drop by chance.
        allow_different_bases: accept adapters that say that they belong to different bases.
        scheme: as in `load`.
        alpha: as in `load`.
        scale: as in `load`.
        report: told of each target that was cut.

    Raises:
        LoraformatError: with every problem: NaN, different bases, kinds that do not add, shapes that disagree.
    """
    items = [item if isinstance(item, tuple) else (item, 1.0) for item in list_adapters(adapters)]
    stated = StatedScale(alpha, scale)
    opened = [(_open(source, scheme, stated), weight) for source, weight in items]
    cut = make_cut(rank, dtype, energy=energy, max_error=max_error)
    return compose_adapters(opened, Recipe(method, cut, density, seed, allow_different_bases), report)


def scale(
    adapter: AdapterSource,
    factor: float = 1.0,
    targets: Mapping[str, float] | None = None,
    *,
    scheme: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
) -> Adapter:
    """Return the adapter `factor` times as strong; alphas and multipliers change, factors do not.

    Args:
        adapter: path or loaded adapter.
        factor: for every target.
        targets: glob pattern of target names to the factor that these have instead; the last that matches counts.
        scheme: as in `load`.
        alpha: as in `load`.
        scale: as in `load`: the adapter's own multiplier, where it states none.

    Raises:
        LoraformatError: a factor that is not finite, a pattern that matches nothing, a kind that is no multiple of its
            scale.
    """
    return scale_adapter(_open(adapter, scheme, StatedScale(alpha, scale)), factor, targets)


def resize(
    adapter: AdapterSource,
    rank: int | None = None,
    *,
    energy: float | None = None,
    max_error: float | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | None = None,
    sv_cumulative: float | None = None,
    ranks: Mapping[str, int] | None = None,
    dtype: str = "float32",
    scheme: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
    report: Callable[[Reduction], object] | None = None,
) -> Adapter:
    """Return the adapter with each change in the best form of a lower rank, by its singular values σ.

    Args:
        adapter: path or loaded adapter.
        rank: at most this rank; may stand beside one of the rules.
        energy: the fewest that hold this share of Σσ².
        max_error: the fewest with ‖left out‖ ≤ max_error · ‖all‖.
        sv_ratio: those above σ₀ / sv_ratio.
        sv_fro: the fewest that hold this share of √Σσ².
        sv_cumulative: the fewest that hold this share of Σσ.
        ranks: glob pattern of target names to the rank that these have at most instead.
        dtype: number form of factors that were cut; a target that loses nothing keeps its own.
        scheme: as in `load`.
        alpha: as in `load`.
        scale: as in `load`.
        report: told of each target: its rank before and after, and the relative error.

    Raises:
        LoraformatError: two rules, a number out of range, NaN, a kind that is no sum.
    """
    rules = {"energy": energy, "max_error": max_error, "sv_ratio": sv_ratio, "sv_fro": sv_fro}
    cut = make_cut(rank, dtype, **rules, sv_cumulative=sv_cumulative)
    if cut.is_none and not ranks:
        raise refuse("LF705", "rank", "nothing that says where to cut", "a rank, a rule, or ranks of targets")
    return resize_adapter(_open(adapter, scheme, StatedScale(alpha, scale)), cut, ranks, report)


def diff(
    first: AdapterSource,
    second: AdapterSource,
    *,
    scheme: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
) -> Difference:
    """Compare two adapters by what they do, or two models weight by weight.

    Args:
        first: path or loaded adapter, or path of a model.
        second: the other, of the same sort.
        scheme: as in `load`.
        alpha: as in `load`.
        scale: as in `load`.

    Raises:
        LoraformatError: an adapter and a model, or models that share no name.
    """
    models = [
        not isinstance(source, Adapter) and scheme is None and is_base(Path(source)) for source in (first, second)
    ]
    if all(models):
        assert not isinstance(first, Adapter), "it is a path"
        assert not isinstance(second, Adapter), "it is a path"
        return compare_models(open_base(Path(first)), open_base(Path(second)))
    if any(models):
        raise refuse("LF707", f"{first} and {second}", "an adapter and a model", "two of one sort")
    stated = StatedScale(alpha, scale)
    return compare_adapters(_open(first, scheme, stated), _open(second, scheme, stated))


def _open(source: AdapterSource, scheme: str | None, stated: StatedScale) -> Adapter:
    return source if isinstance(source, Adapter) else load_adapter(Path(source), scheme, stated)
