"""Outer products as their trainer names them: `<module>.u` and `<module>.v`, the scale in the note `gain`."""

from collections import defaultdict

from loraformat.adapter import Adapter, Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.errors import refuse
from loraformat.schemes import Bundle, Holds, StatedScale


class SketchScheme:
    """The scheme `sketch`."""

    name = "sketch"
    title = "Sketch: outer products"
    holds = Holds(kinds=frozenset({"outer"}), slots=frozenset({SlotKind.LINEAR}), scale="one for all")

    def detect(self, bundle: Bundle) -> str | None:
        """Recognise the note."""
        return "the note 'gain'" if "gain" in bundle.metadata else None

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; a tensor of another name is refused."""
        factors: dict[str, dict[str, Factor]] = defaultdict(dict)
        for name, tensor in bundle.tensors.items():
            module, _, role = name.rpartition(".")
            if role not in ("u", "v"):
                raise refuse("LF202", name, f"the role {role!r}", "u or v")
            factors[module][role] = tensor
        scaling = Scaling(ScalingRule.MULTIPLIER, float(bundle.metadata["gain"]))
        targets = [Target(name, "outer", SlotKind.LINEAR, factors[name], 1, scaling) for name in sorted(factors)]
        return Adapter(tuple(targets), scheme=self.name, source=str(bundle.path))


SCHEME = SketchScheme()
