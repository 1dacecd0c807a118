"""What of a scheme's files another scheme has no place for, pair by pair, from what each says that it holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from loraformat.kinds import KINDS
from loraformat.schemes import SCHEMES, Holds, Scheme, WritingScheme

_EVERY: Final = "each target"
_SCALES: Final = {
    _EVERY: "",
    "one for all": "levelled",
    "folded": "folded",
    "not stored": "not stored",
}
"""Where a scheme keeps the scale, to what becomes of scales that each target has for itself."""
_MARKS: Final = {"levelled": "1", "folded": "B", "not stored": "?"}


@dataclass(frozen=True, slots=True)
class Pair:
    """What becomes of the files of one scheme in another.

    Attributes:
        source: the scheme that is read.
        target: the scheme that is written.
        kinds: adapter kinds of the source that are refused.
        slots: kinds of slots that are refused.
        models: how many of the source's models the target can name: `all`, `some` or `none`.
        scale: empty where it is kept; `levelled`, where scales that differ are moved into B; `folded`, where all are;
            `not stored`.
    """

    source: str
    target: str
    kinds: tuple[str, ...]
    slots: tuple[str, ...]
    models: str
    scale: str

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        return {
            "source": self.source,
            "target": self.target,
            "refused_kinds": list(self.kinds),
            "refused_slots": list(self.slots),
            "models": self.models,
            "scale": self.scale or "kept",
        }

    def __str__(self) -> str:
        """Return the marks of a cell: `k`, `s` and `n` for what is refused, `1`, `B` and `?` for the scale."""
        if self.models == "none":
            return "–"
        marks = (
            "n" * (self.models == "some") + "k" * bool(self.kinds) + "s" * bool(self.slots) + _MARKS.get(self.scale, "")
        )
        return marks or "="


def list_pairs() -> list[Pair]:
    """Return every scheme with every one that is written."""
    members = [scheme for _, scheme in SCHEMES]
    return [_compare(one, other) for one in members for other in members if isinstance(other, WritingScheme)]


def _compare(source: Scheme, target: WritingScheme) -> Pair:
    if source.name == target.name:
        return Pair(source.name, target.name, (), (), "all", "")
    left, right = source.holds, target.holds
    kinds = () if not right.kinds else tuple(sorted(_kinds_of(left) - right.kinds))
    slots = tuple(sorted(slot.value for slot in left.slots - right.slots))
    return Pair(source.name, target.name, kinds, slots, _count_models(left, right), _follow_scale(left, right))


def _count_models(source: Holds, target: Holds) -> str:
    if not target.models or (source.models and source.models <= target.models):
        return "all"
    return "some" if not source.models or source.models & target.models else "none"


def _kinds_of(holds: Holds) -> frozenset[str]:
    return holds.kinds or frozenset(KINDS.names())


def _follow_scale(source: Holds, target: Holds) -> str:
    """Return what becomes of the scale; one that is the same for all stays what it is."""
    found = _SCALES[target.scale]
    return "" if found == "levelled" and source.scale != _EVERY else found


def tabulate_pairs(pairs: Sequence[Pair]) -> str:
    """Return a table in Markdown: sources below each other, targets beside each other."""
    targets = list(dict.fromkeys(pair.target for pair in pairs))
    lines = ["| from \\ to | " + " | ".join(f"`{name}`" for name in targets) + " |", "|---" * (len(targets) + 1) + "|"]
    for source in dict.fromkeys(pair.source for pair in pairs):
        cells = [str(pair) for pair in pairs if pair.source == source]
        lines.append(f"| `{source}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)
