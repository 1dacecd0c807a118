"""Rows of several modules that take turns in one matrix: heads of q, k and v, gates and what they gate."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of one matrix, one after the other, that stand in another at equal distances.

    Attributes:
        first: the first of them.
        count: how many there are.
        start: where the first stands.
        step: from each to the next.
    """

    first: int
    count: int
    start: int
    step: int

    @property
    def rows(self) -> tuple[int, int, int]:
        """Start, stop and step of where they stand."""
        return self.start, self.start + (self.count - 1) * self.step + 1, self.step

    @property
    def own(self) -> tuple[int, int]:
        """Start and stop of the rows themselves."""
        return self.first, self.first + self.count


def split_runs(places: Sequence[int]) -> list[Run]:
    """Return runs of rows by their places; none where these show no order: equal runs, a period apart."""
    runs: list[Run] = []
    first = 0
    while first < len(places):
        step = places[first + 1] - places[first] if first + 1 < len(places) else 1
        stop = first + 1
        while stop < len(places) and places[stop] - places[stop - 1] == step:
            stop += 1
        runs.append(Run(first, stop - first, places[first], step))
        first = stop
    periods = {later.start - run.start for run, later in pairwise(runs)}
    same = len({(run.count, run.step) for run in runs}) == 1 and len(periods) <= 1
    return runs if same and runs[0].step > 0 and (runs[0].count > 1 or len(runs) == 1) else []


def describe_turns(runs: Sequence[Run]) -> str:
    """Return words for how rows take turns."""
    if len(runs) == 1:
        return f"one row in {runs[0].step}, from row {runs[0].start}"
    period = abs(runs[1].start - runs[0].start)
    return f"{len(runs)} runs of {runs[0].count} rows, every {period} rows"
