"""The sections of a page about one adapter."""

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final

from loraformat.algebra.analysis import AdapterAnalysis, LayerMap, TargetAnalysis
from loraformat.pages import _svg as svg
from loraformat.pages._text import SQUARE_ROOT, count, dashed, figure, folded, many, number, percent, ramp, table, tiles

_MAPS: Final = 64
_CELLS: Final = 60_000
"""Small pictures of one sort on a page, and cells in all of them; the JSON output has the rest."""
_DECADES: Final = 6
"""Powers of ten that spectra are shown over at most."""
_SIDES: Final = {"input": "what enters (A)", "output": "what leaves (B)"}


def write_adapter(adapter: AdapterAnalysis) -> str:
    """Return tiles and figures of one adapter."""
    parts = [tiles(_summarise(adapter)), f'<div class="row">{_by_layer(adapter)}{_by_module(adapter)}</div>']
    parts += [_grid_of_norms(adapter), _spectra(adapter), _grid_of_ranks(adapter)]
    parts += [_amplification(adapter), _within(adapter), _all_targets(adapter)]
    return "".join(parts)


def _summarise(adapter: AdapterAnalysis) -> list[tuple[str, str, str]]:
    targets = adapter.targets
    used = median(target.effective_rank for target in targets)
    ranks = sorted({target.rank for target in targets})
    rank = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    entries = [
        ("targets", count(len(targets)), f"{len(adapter.by_module)} modules"),
        ("trained numbers", count(adapter.parameters), "in all factors"),
        ("‖ΔW‖", number(adapter.norm), "Frobenius norm of all changes"),
        ("effective rank", number(used), f"median, of rank {rank}"),
    ]
    module, share = max(adapter.by_module.items(), key=lambda item: item[1])
    entries.append(("strongest module", percent(share), module))
    if len(adapter.by_layer) > 1:
        layer, share = max(adapter.by_layer.items(), key=lambda item: item[1])
        entries.append(("strongest layer", percent(share), f"layer {layer or 'without number'}"))
    factors = [each.amplification.factor for each in targets if each.amplification and each.amplification.factor]
    if factors:
        entries.append(("amplification", f"{number(median(factors))} ×", "median of ‖ΔW‖ / ‖UᵀWV‖"))
    return entries


def _layers(adapter: AdapterAnalysis) -> list[str]:
    """Return the layers; what has no layer only where it has changed."""
    return [layer for layer, share in adapter.by_layer.items() if layer or share]


def _by_layer(adapter: AdapterAnalysis) -> str:
    layers = _layers(adapter)
    if len(layers) < 2:
        return ""
    labels = [layer or "–" for layer in layers]
    even = 1 / len(labels)
    return figure(
        "Energy by layer",
        "share of ‖ΔW‖² over all targets",
        svg.columns(labels, [adapter.by_layer[layer] for layer in layers], percent, even),
        "Where training changed the model most. Columns above the dashed line hold more than an even share.",
        dashed("even share"),
    )


def _by_module(adapter: AdapterAnalysis) -> str:
    shares = sorted(adapter.by_module.items(), key=lambda item: -item[1])
    return figure(
        "Energy by module",
        "share of ‖ΔW‖² over all layers",
        svg.bars([name for name, _ in shares], [share for _, share in shares], percent),
        "Modules of other sizes have norms of other sizes: compare modules of one shape with one another.",
    )


def _grid_of_norms(adapter: AdapterAnalysis) -> str:
    return _grid(
        adapter,
        "Strength of every target",
        "‖ΔW‖ by module and layer",
        "A faint row is a module that hardly moved, a strong cell a target that moved far.",
        lambda each: each.norm,
        None,
    )


def _grid_of_ranks(adapter: AdapterAnalysis) -> str:
    return _grid(
        adapter,
        "Rank in use",
        "effective rank by module and layer; the strongest colour is the whole rank",
        "exp of the entropy of the singular values: how many directions seem in use. Far below the rank, a smaller "
        "rank would do (loraformat resize); near it, a larger one may learn more.",
        lambda each: each.effective_rank,
        float(max(each.rank for each in adapter.targets)),
    )


def _grid(
    adapter: AdapterAnalysis,
    title: str,
    subtitle: str,
    reading: str,
    measure: Callable[[TargetAnalysis], float],
    top: float | None,
) -> str:
    """Return a heat map with a row for each module and a column for each layer; the mean where a cell has several."""
    layers = _layers(adapter)
    if len(layers) < 2:
        return ""
    cells: dict[tuple[str, str], list[float]] = {}
    for each in adapter.targets:
        cells.setdefault((each.module, "" if each.layer is None else str(each.layer)), []).append(measure(each))
    means = {place: sum(values) / len(values) for place, values in cells.items() if place[1] in layers}
    modules = sorted({module for module, _ in means})
    highest = top or max(means.values())
    picture = svg.heat_map(
        modules,
        [layer or "–" for layer in layers],
        [[means.get((module, layer)) for layer in layers] for module in modules],
        top=highest,
        label=number,
        axes=("", "layer"),
        left=190,
        width=1080,
        tall=26,
    )
    wide = f'<div class="scroll"><div class="wide">{picture}</div></div>'
    return figure(title, subtitle, wide, reading, ramp("0", number(highest)))


def _spectra(adapter: AdapterAnalysis) -> str:
    pictures = []
    least = min((e.values[-1] / e.values[0] for e in adapter.targets if e.values and e.values[-1] > 0), default=0.1)
    decades = max(1, min(_DECADES, math.ceil(-math.log10(least) - 1e-9)))
    for module in sorted(adapter.by_module)[:_MAPS]:
        members = [each for each in adapter.targets if each.module == module and each.values and each.values[0] > 0]
        lines = [(each.name, [value / each.values[0] for value in each.values]) for each in members]
        if lines:
            pictures.append((module, f"{len(lines)} targets", svg.curves(lines, decades)))
    return figure(
        "Spectra",
        "singular values σᵢ / σ₁ of ΔW, one curve for each target, later layers stronger",
        many(pictures),
        "A curve that falls steeply says that few directions carry the change; a flat one that all ranks are used.",
    )


def _within(adapter: AdapterAnalysis) -> str:
    maps, cells = [], 0
    for each in adapter.within[:_MAPS]:
        cells += len(each.labels) ** 2
        if cells <= _CELLS:
            maps.append(each)
    if not maps:
        return ""
    left = len(adapter.within) - len(maps)
    more = f" {left} more maps are in the JSON output." if left else ""
    pictures = [
        (each.module, f"{_SIDES[each.side]}, random {number(each.expected)}", _layer_map(each)) for each in maps
    ]
    return figure(
        "What the layers share",
        "φ(r, r) between the subspaces of two layers, r the rank",
        many(pictures),
        "1 (strong colour): two layers read, or write, the same subspace. Spaces drawn at random share about the "
        f"number under the name. The diagonal is 1 by definition and left empty.{more}",
        ramp("0", "1", SQUARE_ROOT),
    )


def _layer_map(shown: LayerMap) -> str:
    values = [[None if i == j else phi**0.5 for j, phi in enumerate(row)] for i, row in enumerate(shown.phi)]
    return svg.heat_map(
        shown.labels,
        shown.labels,
        values,
        top=1.0,
        label=lambda root: f"φ = {number(root**2)}",
        axes=("layer", "layer"),
    )


def _amplification(adapter: AdapterAnalysis) -> str:
    known = [each for each in adapter.targets if each.amplification is not None]
    if not known:
        return ""
    headings = ("", "‖W‖", "‖ΔW‖", "r", "along ΔW", "along W", "along random", "amplification")
    rows = (
        _amplification_row(module, [e for e in known if e.module == module]) for module in sorted(adapter.by_module)
    )
    every = table(headings, (_amplification_row(each.name, [each]) for each in known))
    grid = _grid_of_factors(adapter) if len(adapter.by_layer) > 1 else ""
    figures = table(headings, (row for row in rows if row)) + folded(f"all {len(known)} targets", every)
    return grid + figure(
        "What is amplified",
        "‖UᵀWV‖ with U, V the r leading directions of ΔW, of W itself, and of a random matrix; medians by module",
        figures,
        "Along ΔW well above random: the adapter works in directions that W has. Well below along W: not in those that "
        "W stresses. The amplification ‖ΔW‖ / ‖UᵀWV‖ says how many times stronger those directions became "
        "(table 7 of the LoRA paper, arXiv 2106.09685).",
    )


def _grid_of_factors(adapter: AdapterAnalysis) -> str:
    return _grid(
        adapter,
        "Amplification of every target",
        "‖ΔW‖ / ‖UᵀWV‖ by module and layer",
        "How many times the directions of ΔW are stronger in ΔW than they are in W.",
        lambda each: (each.amplification.factor or 0.0) if each.amplification else 0.0,
        None,
    )


def _amplification_row(name: str, members: Sequence[TargetAnalysis]) -> tuple[str, ...]:
    """Return the medians of some targets, nothing for none."""
    known = [(each, each.amplification) for each in members if each.amplification is not None]
    if not known:
        return ()
    factors = [shown.factor for _, shown in known if shown.factor is not None]
    return (
        name,
        number(median(shown.weight_norm for _, shown in known)),
        number(median(each.norm for each, _ in known)),
        str(round(median(shown.rank for _, shown in known))),
        number(median(shown.along_delta for _, shown in known)),
        number(median(shown.along_weight for _, shown in known)),
        number(median(shown.along_random for _, shown in known)),
        f"{number(median(factors))} ×" if factors else "–",
    )


def _all_targets(adapter: AdapterAnalysis) -> str:
    headings = ("target", "shape", "rank", "scale", "‖ΔW‖", "share", "σ₁", "effective rank", "stable rank")
    rows = (
        (
            each.name,
            f"{each.shape[0]} × {each.shape[1]}",
            str(each.rank),
            number(each.scale),
            number(each.norm),
            percent(each.energy),
            number(each.values[0] if each.values else 0.0),
            number(each.effective_rank),
            number(each.stable_rank),
        )
        for each in adapter.targets
    )
    return f"<figure>{folded(f'All {len(adapter.targets)} targets in numbers', table(headings, rows))}</figure>"
