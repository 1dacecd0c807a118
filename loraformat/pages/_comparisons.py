"""The section of a page about two adapters."""

from statistics import median
from typing import Final

from loraformat.algebra.analysis import SIDES, Comparison, RankMap
from loraformat.pages import _svg as svg
from loraformat.pages._text import SQUARE_ROOT, count, figure, folded, many, number, ramp, table, tiles

_MAPS: Final = 64
"""Small pictures on a page; the JSON output has all."""
_NAMES: Final = {"input": "what enters (A)", "output": "what leaves (B)"}


def write_comparison(compared: Comparison) -> str:
    """Return tiles and figures of two adapters."""
    return tiles(_summarise(compared)) + _maps(compared) + _targets(compared)


def _summarise(compared: Comparison) -> list[tuple[str, str, str]]:
    targets = compared.by_target.values()
    entries = [("targets in common", count(len(targets)), f"{compared.first}, {compared.second}")]
    for side in SIDES:
        shared = median(each[side] for each in targets)
        expected = median(each.expected for each in compared.maps if each.side == side)
        entries.append((f"shared, {_NAMES[side]}", number(shared), f"median φ; random {number(expected)}"))
    angles = [each["cosine"] for each in targets]
    entries.append(("cosine of the changes", number(median(angles)), f"{number(min(angles))} to {number(max(angles))}"))
    return entries


def _maps(compared: Comparison) -> str:
    pictures = [
        (each.module, f"{_NAMES[each.side]}, {each.targets} targets, random {number(each.expected)}", _draw(each))
        for each in compared.maps[:_MAPS]
    ]
    return figure(
        "Subspaces in common",
        f"φ(i, j): how much of the first i directions of {compared.first} lies in the first j of {compared.second}, "
        "the mean over the targets of a module",
        many(pictures),
        "1 (strong colour): the smaller space lies in the larger one; 0: they are orthogonal. A strong corner at the "
        "top left says that the leading directions agree, as the LoRA paper finds (figure 3). Spaces drawn at random "
        "share about the number under the name.",
        ramp("0", "1", SQUARE_ROOT),
    )


def _draw(shown: RankMap) -> str:
    return svg.heat_map(
        [str(i) for i in shown.rows],
        [str(j) for j in shown.columns],
        [[phi**0.5 for phi in row] for row in shown.phi],
        top=1.0,
        label=lambda root: f"φ = {number(root**2)}",
        axes=("i", "j"),
    )


def _targets(compared: Comparison) -> str:
    rows = (
        (name, *(number(each[side]) for side in SIDES), number(each["cosine"]))
        for name, each in compared.by_target.items()
    )
    headings = ("target", "φ, what enters", "φ, what leaves", "cosine of ΔW")
    return f"<figure>{folded(f'All {len(compared.by_target)} targets in numbers', table(headings, rows))}</figure>"
