"""Biases that adapters change and the base lacks: where they would be, and what is said of them.

Exporters and optimisers leave out biases of zeros, as those of a new classifier, and some models have none. Nothing is
lost where the adapter has zeros too; else a module is given one only where the user asks for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from loraformat.adapter import SlotKind
from loraformat.bases import FreeBias
from loraformat.dtypes import Dtype
from loraformat.evidence import Lookup
from loraformat.evidence.names import STRATEGY as NAMES
from loraformat.kinds import REST, UNKNOWN, Change, Nature
from loraformat.matching import Match, Want, count_rows, name_weight
from loraformat.matching.choosing import choose_weights
from loraformat.matching.mismatches import LISTED
from loraformat.problems import Problem

_OF_CHECKPOINT: Final = (
    "Merge with --new-biases (new_biases=True), and check that the architecture loads biases there. Or leave them out, "
    "which changes what the adapter does: --allow-unmatched PATTERN."
)
_OF_GRAPH: Final = (
    "Merge with --new-biases (new_biases=True): the graph gets an input or an Add more for each, and stays as it is "
    "otherwise. torch's exporter leaves out biases of zeros, as those of a new classifier; with torch.onnx.export(..., "
    "optimize=False) it keeps them. Or leave them out, which changes what the adapter does: --allow-unmatched PATTERN."
)
_MODULES: Final[Sequence[tuple[SlotKind, tuple[int, ...]]]] = (
    (SlotKind.LINEAR, (UNKNOWN,)),
    (SlotKind.CONV, (UNKNOWN, REST)),
    (SlotKind.PARAMETER, ()),
)
"""Slots of weights that a bias may stand beside, and their dimensions after the first."""


@dataclass(frozen=True, slots=True)
class NewBias:
    """A bias that a target changes and the base lacks.

    Attributes:
        want: the target and its change of the bias.
        beside: where the module's weight was found.
    """

    want: Want
    beside: Match

    @property
    def _places(self) -> list[FreeBias]:
        return [site.free_bias for site in self.beside.sites if site.free_bias is not None]

    @property
    def name(self) -> str:
        """The name that its tensor will have."""
        return self._places[0].name

    @property
    def dtype(self) -> Dtype:
        """The number form that it will have."""
        return self._places[0].dtype

    @property
    def reader(self) -> str:
        """What of a graph will read it, for people; empty where nothing more is needed."""
        return ", ".join(dict.fromkeys(place.reader for place in self._places if place.reader))

    @property
    def readers(self) -> tuple[str, ...]:
        """Ids of the sites of the weight beside it in a graph; empty where nothing is needed to read it."""
        return tuple(dict.fromkeys(site.id for site in self.beside.sites)) if self.reader else ()

    @property
    def obstacle(self) -> Problem | None:
        """Why the module can be given none."""
        found = next((place.obstacle for place in self._places if place.obstacle is not None), None)
        forms = {place.dtype.name for place in self._places}
        if found is None and len(forms) > 1:
            return Problem("LF630", self.name, f"nodes that compute in {', '.join(sorted(forms))}", "one number form")
        return found or self._check_rows()

    def _check_rows(self) -> Problem | None:
        """Return a problem where it has not as many numbers as the weight has rows."""
        site = self.beside.sites[0]
        slot = next(each for each in site.transposed if each is not SlotKind.PARAMETER or len(site.transposed) == 1)
        is_told = site.part is None and site.weight is not None and site.weight.coding is None
        rows = (count_rows(site, slot),) if is_told else self.want.shape
        if self.want.shape == rows:
            return None
        return Problem("LF405", name_weight(site), f"{rows[0]} rows", f"{self.want.shape} for its bias")

    @property
    def is_zero(self) -> bool:
        """Whether it is all zeros, so that a module without it computes the same; a function of none is not asked."""
        change = self.want.change
        if change.nature is Nature.FUNCTION_OF_BASE:
            return False
        return not any(self.want.target.factors[role].read().any() for role in change.roles)

    def as_match(self) -> Match:
        """Return the match that it would be if the base had it."""
        return replace(self.beside, want=self.want, transposed=False, divisor=1.0)


def find_lacking(missing: Sequence[Want], matches: Sequence[Match], lookup: Lookup) -> list[NewBias]:
    """Return the biases among what is missing that modules of the base could have but lack.

    Args:
        missing: what was not found.
        matches: what was found: the weight of the same target is beside its bias.
        lookup: where it was looked for; a target without a change of the weight names its module there.
    """
    beside = {match.target.name: match for match in matches if match.want.parameter == "weight"}
    biases = [want for want in missing if want.parameter == "bias"]
    pairs = [(want, beside.get(want.target.name) or _find_module(want, lookup)) for want in biases]
    return [
        NewBias(want, match)
        for want, match in pairs
        if match is not None and all(site.free_bias is not None for site in match.sites)
    ]


def _find_module(want: Want, lookup: Lookup) -> Match | None:
    """Return the weight of the module of which a target has the bias alone."""
    for slot, sizes in _MODULES:
        change = Change("weight", (*want.shape[:1], *sizes), Nature.REPLACEMENT, (), slot)
        weight = Want(want.target, change)
        candidates = [each for each in NAMES.find(weight, lookup) if slot in each.site.transposed]
        found = choose_weights(weight, candidates, None) if candidates else []
        if not isinstance(found, Problem) and len(found) == 1:
            return found[0]
    return None


def report_lacking(lacking: Sequence[NewBias], *, wanted: bool) -> list[Problem]:
    """Return what is to be said of biases that the base lacks; `wanted` is whether it is to have them."""
    blocked = ((each.want.name, each.obstacle) for each in lacking)
    problems = [
        Problem(found.code, f"{name} at {found.where}", found.found, found.expected, found.mend)
        for name, found in islice(((name, found) for name, found in blocked if found is not None), LISTED)
    ]
    free = [each for each in lacking if each.obstacle is None]
    if wanted:
        problems += [_say("LF632", each, each.reader) for each in free if each.reader and not each.is_zero]
        return problems + _list("LF415", [each for each in free if not each.reader], "an architecture that loads them")
    problems += report_zeros([each for each in free if each.is_zero])
    lost = [each for each in free if not each.is_zero]
    mend = _OF_GRAPH if any(each.reader for each in lost) else _OF_CHECKPOINT
    return problems + _list("LF401", lost, "biases in the base", mend)


def report_zeros(biases: Sequence[NewBias]) -> list[Problem]:
    """Return the note on biases of zeros that are not made, since nothing would come of them."""
    return _list("LF631", biases, "nothing: these are zeros")


def _say(code: str, bias: NewBias, found: str) -> Problem:
    return Problem(code, bias.want.name, found, severity="note")


def _list(code: str, biases: Sequence[NewBias], expected: str, mend: str = "") -> list[Problem]:
    if not biases:
        return []
    names = ", ".join(dict.fromkeys(each.name for each in biases[:LISTED]))
    where = biases[0].want.name if len(biases) == 1 else f"{len(biases)} targets"
    found = f"the base has no {names}" + (" ..." if len(biases) > LISTED else "")
    return [Problem(code, where, found, expected, mend, severity="error" if mend else "note")]
