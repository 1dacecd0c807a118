"""What became of the parameters of a tuned model when an adapter was made of them, as data."""

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from loraformat.adapter import Adapter
from loraformat.problems import Problem, count_problems


class Outcome(StrEnum):
    """What became of a parameter of the tuned model."""

    EXACT = "exact"
    TRUNCATED = "truncated"
    REPLACED = "replaced"
    UNCHANGED = "unchanged"
    LEFT_OUT = "left out"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a difference that is not of low rank is kept; with nothing given, all of it.

    Attributes:
        rank: at most so many singular values.
        left_out: share of ‖Δ‖ in the Frobenius norm that may be left out, 0 for none.
    """

    rank: int | None = None
    left_out: float = 0.0

    @property
    def is_lossless(self) -> bool:
        """Whether nothing may be lost."""
        return self.rank is None and self.left_out == 0


@dataclass(frozen=True, slots=True)
class ExtractedParameter:
    """One parameter of the tuned model, and what the adapter has of its change.

    Attributes:
        name: module and parameter.
        outcome: what became of it.
        rank: rank of its factors, 0 without.
        norm: ‖Δ‖, the Frobenius norm of tuned − base; None where it was not computed.
        error: ‖Δ − s·B·A‖ / ‖Δ‖ with the factors as written, measured; 0.0 for values taken whole.
        why: for what is left out or replaced, the reason.
    """

    name: str
    outcome: Outcome
    rank: int = 0
    norm: float | None = None
    error: float | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Extraction:
    """What `extract` found.

    Attributes:
        adapter: the adapter; replaced values are read from the tuned model when it is saved.
        parameters: every parameter of both models.
        problems: what the user should know.
    """

    adapter: Adapter
    parameters: tuple[ExtractedParameter, ...]
    problems: tuple[Problem, ...]

    def __repr__(self) -> str:
        """Say what it is in one line."""
        said = count_problems(self.problems)
        return f"<Extraction: {self.adapter!r}, of {len(self.parameters)} parameters, error {self.error:.4g}; {said}>"

    def count(self) -> dict[str, int]:
        """Return how many parameters had each outcome."""
        return {str(kind): sum(each.outcome is kind for each in self.parameters) for kind in Outcome}

    @property
    def error(self) -> float:
        """‖what factors leave out‖ / ‖Δ‖ over all weights that have factors."""
        kept = [each for each in self.parameters if each.norm is not None and each.error is not None and each.rank]
        whole = math.hypot(*(each.norm or 0.0 for each in kept))
        return math.hypot(*((each.norm or 0.0) * (each.error or 0.0) for each in kept)) / whole if whole else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        return {
            "targets": len(self.adapter.targets),
            "trained_numbers": self.adapter.parameters,
            "counts": self.count(),
            "error": self.error,
            "parameters": [asdict(each) for each in self.parameters],
            "problems": [dict(problem.as_json()) for problem in self.problems],
        }
