"""What the name of a target says of its place: in which module, and what it does there."""

import re
from dataclasses import dataclass
from typing import Final

from loraformat.evidence.structure import ATTENTION, BEHIND, IN_ATTENTION, NUMBER

_ALSO_IN_ATTENTION: Final = (
    (r"to_q", "query"),
    (r"to_k", "key"),
    (r"to_v", "value"),
    (r"to_out", "output"),
)
"""Names of diffusers, whose stacks only names tell apart."""
_LAYER: Final = re.compile(r"(?P<layer>(?:.*\.)?\d+)(?:\.(?P<inner>.*))?")
_LISTED: Final = ".to_out.0"


@dataclass(frozen=True, slots=True)
class Place:
    """What a target's name says.

    Attributes:
        owner: path of the module that its module is in.
        end: what follows.
        roles: what the module may do there.
        attends: whether it is one of an attention's.
    """

    owner: str
    end: str
    roles: tuple[str, ...]
    attends: bool

    @property
    def inner(self) -> str | None:
        """The owner's path from the innermost layer that has a number on; None without one."""
        match = _LAYER.fullmatch(self.owner)
        return (match["inner"] or "") if match is not None else None


def read_place(name: str) -> Place | None:
    """Return what a name says; None for one that does not say what its module does."""
    head = name.removesuffix(".0") if name.endswith(_LISTED) else name
    attends = ATTENTION.search(NUMBER.split(head)[-1]) is not None
    known = (*IN_ATTENTION, *_ALSO_IN_ATTENTION) if attends else BEHIND
    for ends, roles in known:
        match = re.search(rf"\.(?:{ends})$", head)
        if match is not None:
            return Place(name[: match.start()], name[match.start() + 1 :], tuple(roles.split("|")), attends)
    return None
