"""Whether a branch can stand beside the nodes that a change acts on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from loraformat.bases._onnx.branchable import BranchableGraph
from loraformat.bases._onnx.openings import Opening
from loraformat.bases._onnx.rows import Axes, Rows
from loraformat.problems import Problem, Severity
from loraformat.runtime.batched import find_obstacle
from loraformat.runtime.targets import Served, ServedAdapter

_EXPORT_AGAIN: Final = (
    "What an adapter adds is cut off where the base's own numbers ended. Give the float model, and quantise the one "
    "with inputs; or take it as it is: --accept-ranges."
)


def find_caveats(adapters: Sequence[ServedAdapter], *, accepted: bool) -> list[Problem]:
    """Return what the user must accept of a model that was quantised with activations (LF441), or has."""
    sites = (site for adapter in adapters for change in adapter.served for site in change.sites)
    found = {site.caveat for site in sites if site.caveat is not None}
    severity: Severity = "warning" if accepted else "error"
    return [replace(each, severity=severity, mend=_EXPORT_AGAIN) for each in sorted(found, key=lambda each: each.where)]


class Judge:
    """Says what stands against a branch beside nodes of a model.

    Args:
        base: the model.
        batched: whether rows of a batch are to have adapters of their own.
    """

    def __init__(self, base: BranchableGraph, *, batched: bool) -> None:
        self._base = base
        self._axes: Mapping[str, Axes] | None = base.find_axes() if batched else None
        self._doubtful: dict[str, None] = {}

    def judge(self, change: Served) -> Problem | None:
        """Return what stands against a change (LF820, LF825)."""
        for site in change.sites:
            opening = self._base.find_opening(site)
            found = self._judge_rows(opening) if isinstance(opening, Opening) else opening
            if found is not None:
                return replace(found, where=f"{change.target.name} at {found.where}")
        return None

    def list_sequences(self) -> frozenset[str]:
        """Return the values that are `(batch, length, width)`."""
        axes = self._axes or {}
        return frozenset(name for name, each in axes.items() if each == Axes(Rows.BATCH, 3))

    def list_doubts(self) -> list[Problem]:
        """Return a warning about the nodes of which shapes do not tell whether the batch comes first."""
        if not self._doubtful:
            return []
        found = f"shapes that do not tell whether the batch comes first, as of {next(iter(self._doubtful))!r}"
        return [Problem("LF825", f"{len(self._doubtful)} nodes", found, "shapes in the model", severity="warning")]

    def _judge_rows(self, opening: Opening) -> Problem | None:
        if self._axes is None:
            return None
        rows = self._axes.get(opening.x, Axes()).first
        found = find_obstacle(opening, rows)
        if found:
            return Problem("LF825", f"{opening.visit.op} {opening.visit.node.name!r}", found, "x·W, the batch first")
        if rows is Rows.UNKNOWN:
            self._doubtful[opening.x] = None
        return None
