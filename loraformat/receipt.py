"""What a merge did, as data: kept inside the merged model and printed."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from loraformat.problems import Problem
from loraformat.strict_json import write_canonical

RECEIPT_KEY = "loraformat.receipt"
"""The metadata key under which a merged model carries its receipt."""

RECEIPT_VERSION = "1.0"


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """One adapter of a merge.

    Attributes:
        name: file or folder name.
        sha256: digest of the file with the factors, hexadecimal.
        weight: the factor that the user gave it.
        targets: number of its targets that were merged.
    """

    name: str
    sha256: str
    weight: float
    targets: int


@dataclass(frozen=True, slots=True)
class MergedWeight:
    """One weight of the base that was rewritten.

    Attributes:
        name: its name in the base.
        targets: the adapter targets that it took in, one entry for each adapter.
        scales: effective multiplier of each entry of `targets`, the user's weight included.
        retained: share of the delta that survived rounding: Σ Δ·(W′−W) / Σ Δ²; 1.0 for a zero delta. Of a large weight
            that is only added to, one tile in eight is summed, for this and the next two.
        relative: ‖Δ‖ / ‖W‖, both Frobenius norms; infinite for a weight of zeros, which JSON has as null.
        error: the largest rounding error |W′ − (W+Δ)| beside the largest |W+Δ| of its tile.
    """

    name: str
    targets: tuple[str, ...]
    scales: tuple[float, ...]
    retained: float
    relative: float
    error: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a merge did.

    Attributes:
        output: path of the merged model; not part of the bytes kept in it.
        base: name, size in bytes and digest of the base's structure (everything but the weights' payloads).
        plan_sha256: digest of the plan that was carried out.
        adapters: the adapters, in order.
        weights: the rewritten weights, sorted by name.
        unmatched: targets that the user allowed to be left out.
        problems: warnings and notes of the merge.
        parent: the receipt that the base carried, when it was itself a merged model.
        room_bytes: the room that the model has for it.
        options: what the user asked for beyond the usual, so that the plan can be made again.
    """

    output: str
    base: Mapping[str, Any]
    plan_sha256: str
    adapters: tuple[AppliedAdapter, ...]
    weights: tuple[MergedWeight, ...]
    unmatched: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    parent: Mapping[str, Any] | None = None
    room_bytes: int = 0
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def embedded_text(self) -> str:
        """Return the JSON text that the merged model carries: nothing in it depends on where files stand."""
        return write_canonical(self._lasting()).decode("utf-8")

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`: what the model carries, the output's path, and the problems."""
        problems = [dict(problem.as_json()) for problem in self.problems]
        return self._lasting() | {"output": self.output, "problems": problems}

    def _lasting(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "version": RECEIPT_VERSION,
            "base": dict(self.base),
            "plan_sha256": self.plan_sha256,
            "adapters": [asdict(adapter) for adapter in self.adapters],
            "weights": [_weight_as_json(weight) for weight in self.weights],
            "unmatched": list(self.unmatched),
            "room_bytes": self.room_bytes,
            "options": dict(self.options),
        }
        return record | ({"parent": dict(self.parent)} if self.parent is not None else {})


def _weight_as_json(weight: MergedWeight) -> dict[str, Any]:
    relative = weight.relative if math.isfinite(weight.relative) else None
    return asdict(weight) | {"relative": relative}
