"""Base values of a weight, read for a change of another one."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraformat.plan.weights import as_matrix
from loraformat.spans import StoredTensor


@dataclass(frozen=True, slots=True)
class BaseValues:
    """A stored tensor as the canonical matrix `(out, in * kernel)`, some rows at a time.

    Attributes:
        tensor: where the base has it.
        form: the number form that is asked for.
        is_turned: whether it is stored as the transpose.
    """

    tensor: StoredTensor
    form: np.dtype[Any]
    is_turned: bool

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)`."""
        rows, columns = as_matrix(self.tensor.shape)
        return (columns, rows) if self.is_turned else (rows, columns)

    def read_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows `start:stop`, `(stop - start, columns)`."""
        rows, columns = as_matrix(self.tensor.shape)
        if self.is_turned:
            return self.tensor.read_part(range(rows), range(start, stop)).T.astype(self.form)
        return self.tensor.read_part(range(start, stop), range(columns)).astype(self.form, copy=False)
