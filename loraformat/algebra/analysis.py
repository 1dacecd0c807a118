"""What an analysis of adapters says, as data for people and for `--json`; `docs/analysis.md` explains every number."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from loraformat.problems import Problem, count_problems

SIDES: Final = ("input", "output")
"""Right singular directions of A, in the space of what enters; left ones of B, in that of what leaves."""


@dataclass(frozen=True, slots=True)
class Amplification:
    """Table 7 of the paper for one target.

    Attributes:
        rank: how many directions were taken.
        weight_norm: ‖W‖ in the Frobenius norm.
        along_delta: ‖UᵀWV‖ with U and V the leading directions of ΔW.
        along_weight: the same with those of W itself.
        along_random: the same with those of a random matrix.
        factor: ‖ΔW‖ / ‖UᵀWV‖ along the directions of ΔW; None where W has nothing there.
    """

    rank: int
    weight_norm: float
    along_delta: float
    along_weight: float
    along_random: float
    factor: float | None


@dataclass(frozen=True, slots=True)
class TargetAnalysis:
    """One target of one adapter.

    Attributes:
        name: module path.
        layer: the first number in its name; None without one.
        module: what follows the last number in its name, or all of it with numbers as `*`.
        shape: `(out, in * kernel)`.
        rank: its rank.
        scale: its effective multiplier.
        values: singular values of ΔW, the largest first.
        norm: ‖ΔW‖ in the Frobenius norm.
        effective_rank: exp of the entropy of its singular values.
        stable_rank: ‖ΔW‖_F² / ‖ΔW‖₂².
        energy: its share of the adapter's ‖ΔW‖².
        amplification: what it amplifies; None without a base.
    """

    name: str
    layer: int | None
    module: str
    shape: tuple[int, int]
    rank: int
    scale: float
    values: tuple[float, ...]
    norm: float
    effective_rank: float
    stable_rank: float
    energy: float
    amplification: Amplification | None = None


@dataclass(frozen=True, slots=True)
class LayerMap:
    """How alike the subspaces of one module are in the layers of one adapter.

    Attributes:
        module: the module, numbers as `*`.
        side: one of `SIDES`.
        labels: layers, or names where they have no numbers of their own.
        phi: φ(r, r) of each pair (labels, labels), r the smaller of the two ranks.
        expected: φ of random subspaces, the mean over the pairs.
    """

    module: str
    side: str
    labels: tuple[str, ...]
    phi: tuple[tuple[float, ...], ...]
    expected: float


@dataclass(frozen=True, slots=True)
class RankMap:
    """How much of the leading directions two adapters share, the mean over the targets of one module.

    Attributes:
        module: the module, numbers as `*`.
        side: one of `SIDES`.
        targets: how many targets the mean is over.
        rows: the values of i, directions of the first adapter.
        columns: the values of j, directions of the second.
        phi: φ(i, j), (rows, columns).
        expected: φ of random subspaces at the last row and column.
    """

    module: str
    side: str
    targets: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    phi: tuple[tuple[float, ...], ...]
    expected: float


@dataclass(frozen=True, slots=True)
class AdapterAnalysis:
    """One adapter.

    Attributes:
        name: what it is called here.
        parameters: trained numbers.
        norm: ‖ΔW‖ over all targets.
        targets: one for each target that has singular values.
        by_layer: layer to share of the energy; the key is empty for targets without a layer.
        by_module: module to share of the energy.
        within: how alike its layers are.
    """

    name: str
    parameters: int
    norm: float
    targets: tuple[TargetAnalysis, ...]
    by_layer: Mapping[str, float]
    by_module: Mapping[str, float]
    within: tuple[LayerMap, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two adapters.

    Attributes:
        first: name of the one.
        second: name of the other.
        maps: φ(i, j) for each module and side.
        by_target: for each target that both have, φ of the whole subspaces by side, and the cosine of the two changes.
    """

    first: str
    second: str
    maps: tuple[RankMap, ...]
    by_target: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Analysis:
    """What `analyse` found.

    Attributes:
        adapters: each adapter.
        comparisons: each pair of adapters with targets in common.
        base: path of the base, empty without.
        problems: what was left out.
    """

    adapters: tuple[AdapterAnalysis, ...]
    comparisons: tuple[Comparison, ...]
    base: str
    problems: tuple[Problem, ...]

    def __repr__(self) -> str:
        """Say what it is in one line."""
        on = f" on {self.base!r}" if self.base else ""
        pairs, said = len(self.comparisons), count_problems(self.problems)
        return f"<Analysis: {len(self.adapters)} adapters{on}, {pairs} comparisons; {said}; save_page() shows it>"

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        return {
            "base": self.base or None,
            "adapters": [asdict(adapter) for adapter in self.adapters],
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "problems": [dict(problem.as_json()) for problem in self.problems],
        }
