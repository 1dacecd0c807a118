"""What one target does to a weight, as the plan says it."""

from dataclasses import dataclass

from loraformat.kinds import Nature
from loraformat.spans import Part


@dataclass(frozen=True, slots=True)
class PlannedReference:
    """Where the base checkpoint has the float numbers of a weight that the base has in a few bits.

    Attributes:
        key: identifies the checkpoint's weight.
        name: its name, for people.
        file: name of the file that holds it.
        offset: bytes from the start of that file.
        dtype: number form.
        matrix: rows and columns of the stored tensor as a matrix: of packed experts, one under the other.
        rows: start, stop and step of the rows of the stored matrix that are the module's.
        columns: likewise.
        transposed: whether the stored matrix is the transpose of the canonical `(out, in * kernel)`.
        section: first and last canonical row, the latter excluded, that it holds; None for all.
        divisor: what the base's graph multiplies its weight by, so that it stores the checkpoint's divided.
    """

    key: str
    name: str
    file: str
    offset: int
    dtype: str
    matrix: tuple[int, int]
    rows: tuple[int, int, int]
    columns: tuple[int, int, int]
    transposed: bool
    section: tuple[int, int] | None
    divisor: float


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A weight of the base that a change of another one is computed from as well.

    Attributes:
        key: identifies it within the base.
        transposed: whether it is stored as the transpose of the canonical `(out, in * kernel)`.
    """

    key: str
    transposed: bool


@dataclass(frozen=True, slots=True)
class PlannedChange:
    """What one target of one adapter does to a weight.

    Attributes:
        adapter: position of the adapter in the plan.
        target: name of the target.
        parameter: which parameter of the target's module it changes: `weight`, `bias` ...
        kind: its kind.
        rank: its rank.
        nature: how it composes with others.
        scale: the whole multiplier: of what is added the target's own, the user's weight, and what the graph
            multiplies by; of the other natures how far to go from W to V or f(W).
        weight: the multiplier without the scale that is part of the change itself.
        transposed: whether the stored matrix is the transpose of the canonical `(out, in * kernel)`.
        section: first and last canonical row, the latter excluded, that this weight holds; None for all.
        part: the rows and columns of the stored matrix that it changes; None for all.
        row_factors: what each canonical row of the module's weight was multiplied by before it was stored, and its
            change with it; empty for nothing.
        row_order: which canonical row each stored one is; empty where they are in order.
        shape: canonical shape of the parameter, `(out, in, *kernel)` of a weight; empty where the factors tell it.
        references: where the float numbers are that it changes, where the base has them in a few bits.
        extent: the largest `(out, in)` of all weights that the adapter changes; empty where nothing follows from it.
        beside: the module's other weight that it is computed from as well; None for none.
    """

    adapter: int
    target: str
    parameter: str
    kind: str
    rank: int
    nature: Nature
    scale: float
    weight: float
    transposed: bool
    section: tuple[int, int] | None = None
    part: Part | None = None
    row_factors: tuple[float, ...] = ()
    row_order: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    references: tuple[PlannedReference, ...] = ()
    extent: tuple[int, ...] = ()
    beside: Neighbour | None = None
