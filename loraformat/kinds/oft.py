"""OFT: the weight turned by orthogonal blocks (Qiu et al., arXiv 2306.07280), in three generations of PEFT's files.

    since 0.16     oft_R.weight (blocks, b·(b−1)/2): the entries above the diagonal of a skew matrix Q
    0.14, 0.15     oft_r (blocks, b, b), oft_s (out, 1)
    until 0.13     oft_r (blocks, b, b): turns outputs, the last block cut off where they are fewer

R is (I−Q)(I+Q)⁻¹ or the sum I + 2Q + 2Q² + ... that approaches it. W·Dᵀ with R on the diagonal of D; W·D for an
embedding (vocabulary, dim); Dᵀ·W where outputs are turned.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import REST, UNKNOWN, Change, Nature
from loraformat.kinds._axes import Axes, Layout
from loraformat.kinds._factored import FactoredKind, Option, count, flag, name_options, number
from loraformat.kinds._mixing_maps import BlockMap
from loraformat.kinds._rotations import count_entries, make_skew, project, turn_by_cayley, turn_by_neumann
from loraformat.problems import Problem

_ROTATED: Final = (SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.CONV)
_NEW: Final = ("oft_R.weight", "oft_embedding_R.weight")


class Oft(FactoredKind):
    """The kind `oft`. Its options are named as in PEFT's configuration, but for one.

    `last_neumann_coefficient` is 1, and 2 for adapters of PEFT 0.16 and 0.17.
    """

    name = "oft"
    nature = Nature.FUNCTION_OF_BASE
    formula = "W·Dᵀ, orthogonal blocks on the diagonal of D"
    source = "arXiv 2306.07280; PEFT OFT"
    layouts = (
        Layout(_ROTATED, {"oft_R.weight": "blocks entries"}),
        Layout(_ROTATED, {"oft_r": "blocks size size", "oft_s": "out 1"}),
        Layout(_ROTATED, {"oft_r": "blocks size size"}),
        Layout((SlotKind.EMBEDDING,), {"oft_embedding_R.weight": "blocks entries"}),
    )
    options = name_options(
        block_share=flag(False),
        use_cayley_neumann=flag(True),
        num_cayley_neumann_terms=count(5),
        last_neumann_coefficient=Option(lambda value: value in (1, 2), "1 or 2", 1),
        coft=flag(False),
        eps=number(6e-5),
    )
    is_scaled = False
    is_flat = True
    rank_axis = ""

    def check_more(self, target: Target, axes: Axes) -> list[Problem]:
        """Return problems of entries that make no triangle, and of blocks that are shared and yet several."""
        if "size" not in axes.sizes and not _block_size(axes):
            return [Problem("LF203", target.name, f"{axes['entries']} entries", "b·(b−1)/2 of them for a block of b")]
        if self.option(target, "block_share") and axes["blocks"] != 1:
            return [Problem("LF203", target.name, f"{axes['blocks']} blocks", "one block, which block_share means")]
        return []

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return what the blocks tell: their number and size, unless one stands for all."""
        axes = self.axes(target)
        turned = axes["blocks"] * _block_size(axes)
        known = UNKNOWN if self.option(target, "block_share") else turned
        if self._turns_outputs(target):
            out, inner = (known if target.slot is SlotKind.EMBEDDING else UNKNOWN), UNKNOWN
        else:
            inner = UNKNOWN if target.slot is SlotKind.CONV else known
            out = axes.sizes.get("out", UNKNOWN)
        return (out, inner, *((REST,) if target.slot is SlotKind.CONV else ()))

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of a weight that the blocks do not cover, and of kernels that training did not turn."""
        axes = self.axes(target)
        size, rows, columns = _block_size(axes), change.shape[0], int(np.prod(change.shape[1:]))
        if set(change.shape[2:]) - {1} and "oft_R.weight" in target.factors:
            found = f"a kernel of {change.shape[2:]}: PEFT's training turns the image and not the weight"
            return [Problem("LF209", target.name, found, "a kernel of ones")]
        turned = rows if self._turns_outputs(target) else columns
        blocks = -(-turned // size) if "oft_r" in target.factors and "oft_s" not in target.factors else turned / size
        if blocks == axes["blocks"] or (self.option(target, "block_share") and blocks % 1 == 0):
            return []
        return [Problem("LF405", target.name, f"a weight of {change.shape}", f"{axes['blocks']} blocks of {size}")]

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> BlockMap:
        """Return the turned weight."""
        blocks = self._rotations(target, factors)
        shape = change.shape[0], int(np.prod(change.shape[1:]))
        turned_back = np.ascontiguousarray(blocks.transpose(0, 2, 1))
        return BlockMap(shape, turned_back, self._turns_outputs(target), factors.get("oft_s"))

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return the rows of a block, where the map turns the rows of the stored matrix."""
        rows = int(np.prod(change.shape[1:])) if transposed else change.shape[0]
        if transposed == self._turns_outputs(target):
            return 1
        size = _block_size(self.axes(target))
        return size if rows % size == 0 else rows

    def _turns_outputs(self, target: Target) -> bool:
        old = "oft_r" in target.factors and "oft_s" not in target.factors
        return old or target.slot is SlotKind.EMBEDDING

    def _rotations(self, target: Target, factors: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Return R `(blocks, b, b)` in the factors' own form, from float64."""
        packed = next((factors[role] for role in _NEW if role in factors), None)
        form = next(iter(factors.values())).dtype
        if packed is None:
            whole = factors["oft_r"].astype(np.float64)
            return turn_by_cayley((whole - whole.transpose(0, 2, 1)) / 2).astype(form)
        skew = make_skew(packed.astype(np.float64))
        if self.option(target, "coft"):
            skew = project(skew, float(self.option(target, "eps")))
        if not self.option(target, "use_cayley_neumann"):
            return turn_by_cayley(skew).astype(form)
        terms = int(self.option(target, "num_cayley_neumann_terms"))
        return turn_by_neumann(skew, terms, int(self.option(target, "last_neumann_coefficient"))).astype(form)


def _block_size(axes: Axes) -> int:
    """Return b; 0 for entries that make no triangle."""
    if "size" in axes.sizes:
        return axes["size"]
    size = int((1 + (1 + 8 * axes["entries"]) ** 0.5) / 2)
    return size if count_entries(size) == axes["entries"] else 0


KIND: Final = Oft()
