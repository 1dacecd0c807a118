"""PEANuT: a small network computes the change from the weight itself, input by input (arXiv 2410.01870).

    peanut_A.weight               (rank, out)
    peanut_encoders.i.weight      (rank, rank), as many as there are decoders
    peanut_decoders.i.weight      (rank, rank)
    peanut_B.weight               (out, rank)

Of every column w of W: h = f(A·w); h = f(E·h) for each encoder in turn; h = f(D·h) + what went into the encoder, the
last first, for each decoder; the column of the change is s·B·h.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import SlotKind, Target
from loraformat.kinds import UNKNOWN, Change, Nature
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import FactoredKind, name_options, one_of
from loraformat.kinds._mixing_maps import ProjectionMap

_DOWN: Final = "peanut_A.weight"
_UP: Final = "peanut_B.weight"
_MOST: Final = 8

Numbers = NDArray[Any]


def _sigmoid(x: Numbers) -> Numbers:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))


def _gelu(x: Numbers) -> Numbers:
    error = np.asarray(np.frompyfunc(math.erf, 1, 1)(x / math.sqrt(2)), np.float64)
    return np.asarray(0.5 * x * (1 + error))


def _gelu_by_tanh(x: Numbers) -> Numbers:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


FUNCTIONS: Final[Mapping[str, Callable[[Numbers], Numbers]]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": _gelu,
    "gelu_new": _gelu_by_tanh,
    "gelu_pytorch_tanh": _gelu_by_tanh,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "linear": lambda x: x,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "swish": lambda x: x * _sigmoid(x),
    "tanh": np.tanh,
}


def _name_layers(depth: int) -> dict[str, str]:
    return {f"peanut_{half}.{layer}.weight": "rank rank" for half in ("encoders", "decoders") for layer in range(depth)}


class Peanut(FactoredKind):
    """The kind `peanut`."""

    name = "peanut"
    nature = Nature.FUNCTION_OF_BASE
    formula = "W + s·B·net(A·W)"
    source = "arXiv 2410.01870; PEFT PEANUT"
    layouts = tuple(
        Layout((SlotKind.LINEAR,), {_DOWN: "rank out", _UP: "out rank", **_name_layers(depth)})
        for depth in range(_MOST + 1)
    )
    options = name_options(act_fn=one_of(*FUNCTIONS))

    def weight_shape(self, target: Target) -> tuple[int, ...]:
        """Return `(out, in)`, of which the factors only tell the first."""
        return self.axes(target)["out"], UNKNOWN

    def map(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]]) -> ProjectionMap:
        """Return f for the matrix `(out, in)`."""
        up, down = factors[_UP], factors[_DOWN]
        depth = len(factors) // 2 - 1
        encoders, decoders = (
            [factors[f"peanut_{half}.{layer}.weight"].astype(np.float64) for layer in range(depth)]
            for half in ("encoders", "decoders")
        )
        function = FUNCTIONS[self.option(target, "act_fn")]

        def between(projected: Numbers) -> Numbers:
            """Return what the network makes of A·w, `(columns of W, rank)`."""
            hidden, kept = function(projected.astype(np.float64)), []
            for encoder in encoders:
                kept.append(hidden)
                hidden = function(hidden @ encoder.T)
            for decoder in decoders:
                hidden = function(hidden @ decoder.T) + kept.pop()
            return hidden.astype(projected.dtype)

        left = (up.astype(np.float64) * target.scale).astype(up.dtype)
        return ProjectionMap((change.shape[0], change.shape[1]), left, down, is_on_rows=True, between=between)

    def count_rows_together(self, target: Target, change: Change, *, transposed: bool) -> int:
        """Return 1: what the network makes of all rows comes from a pass before."""
        return 1


KIND: Final = Peanut()
