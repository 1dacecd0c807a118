"""Bytes that stand for `code * step`, one step for the whole weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraformat.dtypes import Dtype
from loraformat.encodings import Coder, Coding


@dataclass(frozen=True, slots=True)
class OneStep:
    """The coder of a weight."""

    step: NDArray[np.float32]

    def decode(self, codes: NDArray[Any], rows: range, out: NDArray[np.float32]) -> None:
        """Write code times step."""
        np.multiply(codes.view(np.int8), self.step, out=out)

    def encode(self, values: NDArray[np.float32], rows: range, out: NDArray[Any]) -> None:
        """Write the nearest codes."""
        np.copyto(out.view(np.int8), np.clip(np.rint(values / self.step), -128, 127), casting="unsafe")

    def steps(self, rows: range, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the step, which is the same everywhere."""
        return self.step.reshape(1, 1)

    def start_fit(self) -> "Largest":
        """Return what looks for the largest value."""
        return Largest()

    start_afresh = start_fit

    def tensors(self) -> Mapping[str, NDArray[Any]]:
        """Return the step."""
        return {"scales": self.step}


class Largest:
    """The largest value decides the step."""

    def __init__(self) -> None:
        self._largest = np.float32(0)

    def see(self, codes: NDArray[Any], rows: range, values: NDArray[np.float32], delta: NDArray[np.float32]) -> None:
        """Take in rows."""
        self._largest = max(self._largest, np.abs(values).max())

    def finish(self) -> Coder:
        """Return the coder with the new step."""
        return OneStep(np.array([self._largest / np.float32(127)], np.float32))


class StepCodes:
    """The coded encoding `step8`."""

    name = "step8"
    bits = 8
    is_read_only = False

    def bind(self, coding: Coding, form: Dtype) -> Coder:
        """Return the coder of a weight, reading its step."""
        return OneStep(coding.companions["scales"].read().reshape(1))


CODED = StepCodes()
