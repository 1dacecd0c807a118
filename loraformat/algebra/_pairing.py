"""Which parameter of a tuned model is which of its base, and which have no partner."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from loraformat.adapter import SlotKind
from loraformat.algebra._weights import hold_the_same
from loraformat.bases import BaseModel, Site
from loraformat.fingerprint import Fingerprint, sample_weight
from loraformat.problems import Problem

_TABLES: Final = frozenset(
    {"embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "embed_in", "shared"}
)
"""Last parts of the names of modules that are tables of embeddings: a state dict does not tell them from matrices."""
_LISTED: Final = 8


@dataclass(frozen=True, slots=True)
class Pair:
    """One parameter in both models.

    Attributes:
        module: module path.
        parameter: `weight`, `bias` ...
        tuned: where the tuned model has it.
        base: where the base has it; None where the base has no such parameter, or something stands against using it.
        obstacle: what stands against it in the base.
    """

    module: str
    parameter: str
    tuned: Site
    base: Site | None
    obstacle: Problem | None = None

    @property
    def name(self) -> str:
        """Module and parameter."""
        return f"{self.module}.{self.parameter}"

    @property
    def stored_bytes(self) -> int:
        """What it takes in the tuned model."""
        return self.tuned.weight.tensor.span.length if self.tuned.weight is not None else 0

    def is_unchanged(self) -> bool:
        """Say whether both have the same bytes."""
        if self.base is None or self.tuned.weight is None or self.base.weight is None:
            return False
        return self.tuned.divisor == self.base.divisor and hold_the_same(
            self.tuned.weight.tensor, self.base.weight.tensor
        )


def choose_slot(site: Site) -> SlotKind:
    """Return the slot that an adapter of this site should expect; `parameter` where no product of factors fits.

    A matrix that the base knows to be stored `(in, out)` is GPT-2's Conv1D where that is how the module's parameter is,
    and a Linear that an exporter turned around where it is not. A table of embeddings is known by its operator, or in a
    state dict by its module's name.
    """
    turned = site.transposed
    if SlotKind.CONV in turned and SlotKind.LINEAR not in turned:
        return SlotKind.CONV
    table = site.module.rsplit(".", 1)[-1] in _TABLES or SlotKind.LINEAR not in turned
    if SlotKind.EMBEDDING in turned and table:
        return SlotKind.EMBEDDING
    if turned.get(SlotKind.LINEAR) and turned.get(SlotKind.PARAMETER) is False:
        return SlotKind.LINEAR_TRANSPOSED
    return SlotKind.LINEAR if SlotKind.LINEAR in turned else SlotKind.PARAMETER


def list_sites(base: BaseModel) -> dict[tuple[str, str], Site]:
    """Return the sites that hold a weight whole, by module and parameter; of several for one, the first.

    Parts of fused or packed weights are left to the tensor that holds them.
    """
    sites: dict[tuple[str, str], Site] = {}
    taken: set[str] = set()
    for site in base.sites:
        key = site.module, site.parameter
        if site.part is not None or site.section is not None:
            continue
        if site.module and site.weight is not None and key not in sites and site.weight.key not in taken:
            sites[key] = site
            taken.add(site.weight.key)
    return sites


def pair_models(
    tuned: BaseModel, base: BaseModel, allow_missing: Sequence[str]
) -> tuple[list[Pair], list[tuple[str, str]], list[Problem]]:
    """Return the pairs in order of name, what has no partner with the reason, and what stands against a comparison.

    Args:
        tuned: the tuned model.
        base: the model it was tuned from.
        allow_missing: glob patterns of parameters that the tuned model may lack.
    """
    ours, theirs = list_sites(tuned), list_sites(base)
    if not ours.keys() & theirs.keys():
        found = f"{_name_some(ours)} in one, {_name_some(theirs)} in the other"
        return [], [], [Problem("LF721", f"{tuned.path} and {base.path}", found, "parameters of the same names")]
    missing = [f"{module}.{parameter}" for module, parameter in sorted(theirs.keys() - ours.keys())]
    refused = [name for name in missing if not matches_any(name, allow_missing)]
    problems = []
    if refused:
        listed = ", ".join(refused[:_LISTED])
        found = f"{len(refused)} parameters of the base are not in it: {listed}"
        problems.append(Problem("LF722", str(tuned.path), found, "every parameter of the base"))
    blocked = {(site.module, site.parameter): site.obstacle for site in base.sites if site.obstacle is not None}
    pairs = [Pair(*key, ours[key], theirs.get(key), blocked.get(key)) for key in sorted(ours)]
    problems += [problem for pair in pairs for problem in _check_shapes(pair)]
    apart = [(name, "only the base has it") for name in missing]
    return pairs, apart + _list_siteless(tuned, base, ours.values()), problems


def matches_any(name: str, globs: Iterable[str]) -> bool:
    """Say whether a name is matched by one of the glob patterns."""
    return any(fnmatchcase(name, glob) for glob in globs)


def _check_shapes(pair: Pair) -> list[Problem]:
    """Return a problem where the models differ in more than the number of rows of a parameter."""
    if pair.base is None:
        return []
    tuned, base = canonical_shape(pair.tuned), canonical_shape(pair.base)
    if len(tuned) == len(base) and tuned[1:] == base[1:]:
        return []
    return [Problem("LF721", pair.name, f"{tuned} in the tuned model, {base} in the base", "one shape, or more rows")]


def canonical_shape(site: Site) -> tuple[int, ...]:
    """Return the shape `(out, in, *kernel)` of a site's weight; of a table `(vocabulary, dim)`, as PyTorch has it."""
    assert site.weight is not None, "chosen so"
    shape = site.weight.tensor.shape
    return shape[::-1] if site.transposed.get(SlotKind.LINEAR) else shape


def factor_shape(site: Site, slot: SlotKind) -> tuple[int, ...]:
    """Return the shape of what a target's factors make, `(out, in, *kernel)`; of a table `(dim, vocabulary)`."""
    assert site.weight is not None, "chosen so"
    shape = site.weight.tensor.shape
    return shape[::-1] if site.transposed[slot] else shape


def take_fingerprint(target: str, site: Site, slot: SlotKind) -> Fingerprint:
    """Return the fingerprint of a site's weight for a target of this name."""
    assert site.weight is not None, "chosen so"
    shape = factor_shape(site, slot)
    samples = sample_weight(target, shape, site.weight.tensor, transposed=site.transposed[slot])
    return Fingerprint(shape, tuple(sample * site.divisor for sample in samples))


def _list_siteless(tuned: BaseModel, base: BaseModel, sites: Iterable[Site]) -> list[tuple[str, str]]:
    """Return the tensors of the tuned model that no adapter can change and that differ from the base's."""
    covered = {site.weight.tensor.name for site in sites if site.weight is not None}
    theirs = {tensor.name: tensor for tensor in base.list_tensors()}
    apart = []
    for tensor in tuned.list_tensors():
        other = theirs.get(tensor.name)
        if tensor.name not in covered and (other is None or not hold_the_same(tensor, other)):
            apart.append((tensor.name, "it differs, and is nothing that an adapter changes"))
    return apart


def _name_some(keys: Mapping[tuple[str, str], Site]) -> str:
    return ", ".join(f"{module}.{parameter}" for module, parameter in sorted(keys)[:3]) or "no parameters"
