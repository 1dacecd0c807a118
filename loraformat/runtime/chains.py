"""Nodes of a graph under construction, and new names for them and for what they make."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx


class Names:
    """Gives new names to values and nodes of a graph.

    Args:
        taken: the names that it has.
    """

    def __init__(self, taken: set[str]) -> None:
        self._taken = set(taken)

    def take(self, wanted: str) -> str:
        """Return a name that is not taken, as near as can be to the wanted one, and take it."""
        name, number = wanted, 0
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name


class Chain:
    """Nodes under construction, one after the other.

    Attributes:
        nodes: the nodes so far.

    Args:
        path: what their names begin with.
        names: gives names.
    """

    def __init__(self, path: str, names: Names) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.path = path
        self._names = names

    def take(self, wanted: str) -> str:
        """Return a new name, as `Names.take`."""
        return self._names.take(wanted)

    def add(self, op: str, inputs: Sequence[str], role: str, *, domain: str = "", output: str = "", **more: Any) -> str:
        """Add a node; return the name of the first value that it makes."""
        from onnx import helper

        name = self.take("/".join(filter(None, (self.path, role, op))))
        made = output or self.take(f"{name}_output_0")
        self.nodes.append(helper.make_node(op, list(inputs), [made], name=name, domain=domain, **more))
        return made
