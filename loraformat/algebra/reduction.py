"""What a cut left of a target, as data."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reduction:
    """What a cut left of one target.

    Attributes:
        target: its name.
        before: the rank before.
        after: the rank now.
        error: ‖left out‖ / ‖change‖, Frobenius norm.
    """

    target: str
    before: int
    after: int
    error: float

    def as_json(self) -> Mapping[str, object]:
        """Return the record for `--json`."""
        return {"target": self.target, "before": self.before, "after": self.after, "error": self.error}
