"""What layers do in a model, whatever they are called."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

Place: TypeAlias = tuple[str, tuple[int, int]]
"""The id of a site, and start and stop of rows of its canonical matrix `(out, in)`."""


@dataclass(frozen=True, slots=True)
class Role:
    """What a linear layer does in a stack of transformer layers.

    Attributes:
        layer: which layer of the stack, from 0.
        name: `query`, `key`, `value`, or `qkv` for the three in one; `output`; `first` and `second`, or `gate`, `up`
            (`gate_up` in one) and `down`. In a cross-attention `cross query` and so on.
        stack: which stack of several, `encoder` or `decoder`; empty for the only one, without cross-attention.
    """

    layer: int
    name: str
    stack: str = ""


@dataclass(frozen=True, slots=True)
class Roles:
    """What the flow of values through a graph tells of its linear layers.

    Attributes:
        by_site: roles by ids of sites; each layer of a stack has the same. Branches of which one runs have each their
            own site of a role.
        stacks: how many layers each stack has.
        reason: why nothing is told; empty where it is.
        parts: of roles that one layer has together, such as those of a packed `qkv` or `gate_up`, the sites, and start
            and stop of the rows of their canonical matrix `(out, in)`.
        is_ordered: whether an operator says how the rows of packed weights lie: queries, then keys, then values. Then
            they may lie otherwise than in the module.
        is_unscaled: whether scores are not divided by the root of the heads' size, and a table of relative positions is
            added to them: as in T5, or with a scale that was folded into a weight.
    """

    by_site: Mapping[str, Role]
    stacks: Mapping[str, int]
    reason: str = ""
    parts: Mapping[Role, tuple[Place, ...]] = field(default_factory=dict)
    is_ordered: bool = False
    is_unscaled: bool = False


@runtime_checkable
class StructuredBase(Protocol):
    """A base that tells what its layers do, whatever they are called."""

    def find_roles(self) -> Roles:
        """Return the roles of its linear layers."""
        ...


@dataclass(frozen=True, slots=True)
class Anchor:
    """Names that are left beside layers that work together: those of one attention, or of one block behind it.

    Attributes:
        attends: whether they are those of an attention.
        named: module paths of members by roles, as names at their nodes, weights or biases give them; `query_norm` and
            `key_norm` are the norms of heads.
        norm: path of the norm whose result all of them read and nothing else does; empty where no name tells, or where
            it may be another layer's.
        crosses: whether keys and values are made of something else than queries.
    """

    attends: bool
    named: Mapping[str, str]
    norm: str
    crosses: bool = False


@dataclass(frozen=True, slots=True)
class Anchors:
    """What layers of a graph do together, and which names stand beside them.

    Attributes:
        roles: the roles; the number of the layer is that of the anchor.
        anchors: the names.
        reason: what keeps attentions from being told; empty for nothing.
    """

    roles: Roles
    anchors: tuple[Anchor, ...]
    reason: str = ""


@runtime_checkable
class AnchoredBase(Protocol):
    """A base that tells which names stand beside layers that have none."""

    def find_anchors(self) -> Anchors:
        """Return roles of linear layers and the names beside them."""
        ...
