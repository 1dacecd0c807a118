"""RandLoRA: a sum of products of random bases that all targets share, two vectors of each trained (arXiv 2502.00987).

    randlora_A (rank, 1, widest)    randlora_B (tallest, bases, rank)
    randlora_lambda (rank, bases)   randlora_gamma (bases, smaller side of the weight)

The trained vectors stand on the smaller side j, B on the larger one i. Ranks and bases are counted as one axis k, those
of A by rank first and those of B by base first, as PEFT does: Σ B[i, n', r']·λ[r, n]·A[r, 0, j]·γ[n, j] with
k = r·bases + n = n'·rank + r'.
"""

from collections.abc import Mapping
from typing import Any, Final

from numpy.typing import NDArray

from loraformat.adapter import Target
from loraformat.kinds import Change, Delta
from loraformat.kinds._axes import Layout
from loraformat.kinds._factored import MATRICES, FactoredKind
from loraformat.kinds._matrices import scale_product
from loraformat.problems import Problem


class Randlora(FactoredKind):
    """The kind `randlora`."""

    name = "randlora"
    formula = "W + s·Σ B_k·λ_k·A_k∘γ_k"
    source = "arXiv 2502.00987; PEFT RANDLORA"
    layouts = (
        Layout(
            MATRICES,
            {
                "randlora_lambda": "rank bases",
                "randlora_gamma": "bases smaller",
                "randlora_A": "rank 1 widest",
                "randlora_B": "tallest most rank",
            },
        ),
    )

    def check_size(self, target: Target, change: Change) -> list[Problem]:
        """Return a problem of a weight that the trained vectors or the shared bases do not fit."""
        axes = self.axes(target)
        fits = min(change.shape) == axes["smaller"] <= axes["widest"]
        if fits and max(change.shape) <= axes["tallest"] and axes["bases"] <= axes["most"]:
            return []
        expected = f"a smaller side of {axes['smaller']}, and at most {axes['tallest']} on the larger one"
        return [Problem("LF405", target.name, f"a weight of {change.shape}", expected)]

    def delta(self, target: Target, change: Change, factors: Mapping[str, NDArray[Any]], scale: float) -> Delta:
        """Return the change as `(out, in)`, of rank bases·rank."""
        lambdas, gammas = factors["randlora_lambda"], factors["randlora_gamma"]
        rank, bases = lambdas.shape
        smaller, larger = min(change.shape), max(change.shape)
        narrow = lambdas[:, :, None] * factors["randlora_A"][:, :, :smaller] * gammas[None, :, :]
        wide = factors["randlora_B"][:larger, :bases].reshape(larger, bases * rank)
        product = scale_product(wide, narrow.reshape(bases * rank, smaller), scale)
        return product if change.shape[1] == smaller else product.transposed()


KIND: Final = Randlora()
