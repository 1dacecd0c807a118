"""What enters the modules of a model, as a user measured it: an archive of samples or covariances by target."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.algebra._lowrank import Matrix
from loraformat.containers import TensorFile
from loraformat.errors import refuse
from loraformat.problems import Problem
from loraformat.spans import StoredTensor

_SAMPLES: Final = ".samples"
_COVARIANCE: Final = ".covariance"
_FLOATS: Final = frozenset({"float64", "float32", "float16", "bfloat16"})
_STEP_ROWS: Final = 1024
_SYMMETRIC: Final = 1e-4


@dataclass(frozen=True, slots=True)
class Statistics:
    """An opened archive. Its keys are names of targets.

    `<target>.samples` holds samples (n, in), `<target>.covariance` a covariance (in, in), and `<target>` alone the one
    or the other: a square of the target's input size is a covariance.

    Attributes:
        file: the archive, with its tensors unread.
    """

    file: TensorFile

    def check(self, target: str, width: int, rank: int) -> list[Problem]:
        """Return what is wrong with a target's statistics, from names, shapes and number forms alone.

        Args:
            target: its name.
            width: its number of inputs, `in * kernel`.
            rank: how many directions are wanted.
        """
        tensor, is_square = self._find(target, width)
        where = f"{self.file.file.path}: {target}"
        if tensor is None:
            return [Problem("LF728", where, "nothing of this name", f"samples (n, {width}) or a covariance")]
        expected = f"samples (n, {width}) or a covariance ({width}, {width}) of floating-point numbers"
        rows_fit = len(tensor.shape) == 2 and tensor.shape[1] == width and tensor.shape[0] > 0
        if not rows_fit or (is_square and tensor.shape[0] != width) or tensor.dtype.name not in _FLOATS:
            return [Problem("LF728", where, f"{tensor.name}: {tensor.dtype.name} {list(tensor.shape)}", expected)]
        if not is_square and tensor.shape[0] < rank:
            return [Problem("LF728", where, f"{tensor.shape[0]} samples", f"at least {rank}, the rank")]
        return []

    def read_covariance(self, target: str, width: int) -> Matrix:
        """Return the covariance (in, in) in float64; of samples Σ xxᵀ / n, the mean left in, as A sees them.

        Raises:
            FindingError: LF728 numbers that are not finite, or a covariance that is not symmetric.
        """
        tensor, is_square = self._find(target, width)
        assert tensor is not None, "checked before"
        where = f"{self.file.file.path}: {tensor.name}"
        covariance = tensor.read().astype(np.float64) if is_square else _sum_up(tensor, width)
        if not np.isfinite(covariance).all():
            raise refuse("LF728", where, "NaN or infinity", "finite numbers")
        size = np.abs(covariance).max()
        if np.abs(covariance - covariance.T).max() > _SYMMETRIC * size or (np.diag(covariance) < 0).any():
            raise refuse("LF728", where, "a square that is no covariance: not symmetric, or negative on the diagonal")
        return (covariance + covariance.T) / 2

    def _find(self, target: str, width: int) -> tuple[StoredTensor | None, bool]:
        """Return a target's tensor, and whether it is a covariance."""
        tensors = self.file.tensors
        if target + _COVARIANCE in tensors:
            return tensors[target + _COVARIANCE], True
        if target + _SAMPLES in tensors:
            return tensors[target + _SAMPLES], False
        tensor = tensors.get(target)
        return tensor, tensor is not None and tensor.shape == (width, width)


def _sum_up(tensor: StoredTensor, width: int) -> NDArray[Any]:
    """Return Σ xxᵀ / n; the samples are held in their own form, some at a time in float64."""
    total = np.zeros((width, width))
    samples = tensor.read()
    for start in range(0, len(samples), _STEP_ROWS):
        some = samples[start : start + _STEP_ROWS].astype(np.float64)
        total += some.T @ some
    return total / len(samples)
