"""`a + b`, `a - b`, `-a` and `0.5 * a` of adapters: what `Adapter` looks up by name when they are used."""

from loraformat.adapter import Adapter
from loraformat.algebra.compose import compose_adapters
from loraformat.algebra.scale import scale_adapter


def add(one: Adapter, other: Adapter, weight: float) -> Adapter:
    """Return `one + weight * other`, exactly."""
    return compose_adapters([(one, 1.0), (other, weight)])


def multiply(adapter: Adapter, factor: float) -> Adapter:
    """Return `factor * adapter`; only alphas and multipliers change."""
    return scale_adapter(adapter, factor)
