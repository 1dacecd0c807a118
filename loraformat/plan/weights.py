"""What becomes of one weight, as the plan says it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loraformat.kinds import Nature
from loraformat.limits import TILE_BYTES
from loraformat.plan.changes import PlannedChange

_FLOAT32_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class NewForm:
    """How a weight stands in the output where it is not as in the base: for most of that, the file is written anew.

    Attributes:
        name: its name in the output.
        dtype: number form.
        shape: dimensions.
        encoding: the encoding that writes it.
        has_base: whether there are numbers of the base to start from; zeros otherwise.
        copied_from: name of the base's tensor that stays beside it; empty where it takes that one's place.
        readers: ids of the sites that read it, instead of the base's tensor; of a bias that a graph lacks, of those
            that have its module's weight.
        turned: of codes that become floats, whether these stand transposed.
        padding: of codes that become floats, how many columns at the end of a row are left out.
        added: of a bias that a graph lacks, what it gets to read it, for people.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    has_base: bool = True
    copied_from: str = ""
    readers: tuple[str, ...] = ()
    turned: bool = False
    padding: int = 0
    added: str = ""


@dataclass(frozen=True, slots=True)
class PlannedCompanion:
    """A tensor without which the codes of a quantised weight mean nothing.

    Attributes:
        role: `scales` or `zero_points`.
        name: its name, for people.
        dtype: number form.
        nbytes: bytes.
        is_written: whether it changes with the codes.
        copy_name: its name beside a copy of the weight, where it changes there.
    """

    role: str
    name: str
    dtype: str
    nbytes: int
    is_written: bool
    copy_name: str = ""


@dataclass(frozen=True, slots=True)
class PlannedWeight:
    """One weight that will be rewritten.

    Attributes:
        key: identifies it within the base.
        name: its name, for people.
        file: name of the file that holds it.
        offset: bytes from the start of that file.
        nbytes: bytes.
        dtype: number form.
        shape: as stored.
        matrix: rows and columns of the output as a matrix.
        encoding: the encoding that reads it, and writes it where there is no new form.
        tile_rows: rows of the stored matrix that are computed at a time; part of the plan, since it can decide the
            last bits.
        changes: what is added, in the order of the adapters.
        evidence: how it was found; not part of the digest.
        new: how it stands in the output, where not as in the base.
        companions: scales and zero points of a quantised weight.
        block: rows and columns of it that share a scale.
    """

    key: str
    name: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    encoding: str
    tile_rows: int
    changes: tuple[PlannedChange, ...]
    evidence: str
    new: NewForm | None = None
    companions: tuple[PlannedCompanion, ...] = ()
    block: tuple[int, int] = (0, 0)

    @property
    def is_copy(self) -> bool:
        """Whether the base's tensor stays as it is, for others, and this one is added to a copied file."""
        return self.new is not None and bool(self.new.readers) and self.new.has_base

    @property
    def is_added(self) -> bool:
        """Whether it is a bias that the base, a graph, lacks and a copied file gets."""
        return self.new is not None and bool(self.new.added)

    @property
    def added(self) -> str:
        """What a graph gets to read it, for people; empty for a weight that the base has, or that no graph reads."""
        return self.new.added if self.new is not None else ""

    @property
    def copied_from(self) -> str:
        """Name of the base's tensor that it is a copy of; empty where it takes that one's place."""
        return self.new.copied_from if self.new is not None else ""

    @property
    def copied_roles(self) -> tuple[str, ...]:
        """What of the scales and zero points of the base's tensor it has once more."""
        return tuple(each.role for each in self.companions if each.copy_name)

    @property
    def is_coded(self) -> bool:
        """Whether it is quantised in the base."""
        return self.block != (0, 0)

    @property
    def is_dequantised(self) -> bool:
        """Whether it stands in floats in the output, and in codes in the base."""
        return self.is_coded and self.new is not None and self.new.encoding != self.encoding

    @property
    def written_dtype(self) -> str:
        """The number form in the output."""
        return self.new.dtype if self.new else self.dtype

    @property
    def is_replaced(self) -> bool:
        """Whether values are put in place of the base's, and nothing is added to them."""
        return all(change.nature is Nature.REPLACEMENT for change in self.changes)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets, one for each change."""
        return tuple(change.target for change in self.changes)

    @property
    def scales(self) -> tuple[float, ...]:
        """Multipliers, one for each change."""
        return tuple(change.scale for change in self.changes)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks, one for each change."""
        return tuple(change.rank for change in self.changes)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds, one for each change."""
        return tuple(change.kind for change in self.changes)


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of a stored tensor as a matrix: its first dimension and the rest."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def count_tile_rows(matrix: tuple[int, int], block: int = 1) -> int:
    """Return how many rows of a matrix make one tile of about `TILE_BYTES` in float32: whole blocks of `block` rows."""
    rows, columns = matrix
    wanted = max(1, min(rows, TILE_BYTES // (_FLOAT32_BYTES * columns)))
    return max(block, wanted // block * block)
