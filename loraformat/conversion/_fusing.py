"""Parts of a weight that is one elsewhere: splitting and fusing, exact both ways.

Splitting gives every part a copy of A and its rows of B. Fusing keeps A where all parts have the same, bit by bit: that
undoes a split. Otherwise the ranks add up: A one below the other, B on a block diagonal. Where B is such a diagonal, a
split takes it apart again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from loraformat.adapter import Factor, Scaling, ScalingRule, Target
from loraformat.base_facts import BaseFacts
from loraformat.derived import DerivedFactor, KeptFactor, NewFactor, derive
from loraformat.operations import BlockDiagonal, Concatenate, Take
from loraformat.problems import Problem
from loraformat.rescaling import rescale
from loraformat.spans import StoredTensor
from loraformat.spellings import ModuleRow
from loraformat.strict_json import JsonValue

_ROWS: Final[Mapping[str, tuple[str, ...]]] = {
    "lora": ("lora_B.weight", "lora_B.bias"),
    "dora": ("lora_B.weight", "lora_B.bias", "lora_magnitude_vector"),
    "loha": ("hada_w1_a", "hada_w2_a"),
    "diff": ("diff", "diff_b"),
    "replace": ("weight", "bias"),
}
"""Kind to the roles of which every row belongs to one output."""
_SHARED: Final[Mapping[str, tuple[str, ...]]] = {
    "lora": ("lora_A.weight",),
    "dora": ("lora_A.weight",),
    "loha": ("hada_w1_b", "hada_w2_b"),
    "onetrainer_oft": ("oft_R.weight",),
}
"""Kind to the roles that all outputs share."""
_LOW_RANK: Final = frozenset({"lora", "dora"})


@dataclass(slots=True)
class Made:
    """What was made of a row.

    Attributes:
        targets: part to target.
        problems: what stands against it.
        absorbed: tensors that are bit by bit the same as one that was kept.
    """

    targets: dict[int, Target] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    absorbed: list[Factor] = field(default_factory=list)


def describe_parts(parts: Mapping[int, Target]) -> JsonValue:
    """Return what is remembered of a fusion: part to its rank, 0 where the parts shared one A."""
    shared = len(parts) > 1 and _share_down(list(parts.values()))
    return {str(part): 0 if shared else target.rank for part, target in sorted(parts.items())}


def row_roles(target: Target) -> tuple[str, ...]:
    """Return the roles of a target whose rows are its outputs."""
    return tuple(role for role in _ROWS.get(target.kind, ()) if role in target.factors)


def split(target: Target, row: ModuleRow, paths: Sequence[str], facts: BaseFacts, known: JsonValue) -> Made:
    """Return the parts of a fused target.

    Args:
        target: the fused target.
        row: its row, which says how the rows are divided.
        paths: names of the parts.
        facts: the base, for rows that are counted in heads.
        known: what is remembered of a fusion that it came from.
    """
    divisible = {*_ROWS.get(target.kind, ()), *_SHARED.get(target.kind, ())}
    if not divisible or not set(target.factors) <= divisible:
        found = f"factors {', '.join(sorted(target.factors))} of the kind {target.kind!r}"
        return Made(problems=[Problem("LF315", target.name, found, f"factors that split into {len(paths)} parts")])
    sizes, problem = [0] * len(paths), None
    if row_roles(target):  # Without them the parts are all alike, whatever rows they have.
        sizes, problem = _divide(row, facts, _count_rows(target), target.name)
    if problem:
        return Made(problems=[problem])
    ranks = _find_blocks(target, sizes, known)
    wanted = {int(part) for part in known} if isinstance(known, Mapping) and _parts_are_known(known) else None
    made = Made()
    for part, path in enumerate(paths):
        if wanted is None or part in wanted:
            made.targets[part] = _take_part(target, path, sizes, ranks, part)
    return made


def _parts_are_known(known: Mapping[str, JsonValue]) -> bool:
    return all(part.isdecimal() for part in known)


def _count_rows(target: Target) -> int:
    role = row_roles(target)[0]
    return target.factors[role].shape[0]


def _divide(row: ModuleRow, facts: BaseFacts, total: int, where: str) -> tuple[list[int], Problem | None]:
    """Return how many rows each part has."""
    if all(isinstance(share, int) for share in row.shares):
        shares = [int(share) for share in row.shares]
        if not shares or total % sum(shares):
            return [], Problem("LF315", where, f"{total} rows", f"a multiple of {sum(shares)}")
        return [share * total // sum(shares) for share in shares], None
    counts = [facts.count(str(share)) for share in row.shares]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return [], Problem(
            "LF311", where, f"{total} rows of {len(counts)} parts", f"the base's {', '.join(map(str, row.shares))}"
        )
    if sum(known) != total:
        return [], Problem("LF315", where, f"{total} rows", f"{' + '.join(map(str, known))} as {facts.source} has it")
    return known, None


def _find_blocks(target: Target, sizes: Sequence[int], known: JsonValue) -> list[int] | None:
    """Return the ranks of the parts where B is a block diagonal, None where all parts share A.

    Equal blocks are recognised by their zeros, which is kohya's rule; others only where a fusion is remembered.
    """
    up = target.factors.get("lora_B.weight")
    if target.kind not in _LOW_RANK or up is None or not target.rank:
        return None
    remembered = [known.get(str(part), 0) for part in range(len(sizes))] if isinstance(known, Mapping) else None
    if remembered is not None and all(isinstance(rank, int) for rank in remembered):
        ranks = [int(rank) for rank in remembered if isinstance(rank, int)]
        if sum(ranks) == target.rank and _is_diagonal(up, sizes, ranks):
            return ranks
        return None
    if target.rank % len(sizes):
        return None
    ranks = [target.rank // len(sizes)] * len(sizes)
    return ranks if _is_diagonal(up, sizes, ranks) else None


def _is_diagonal(up: Factor, sizes: Sequence[int], ranks: Sequence[int]) -> bool:
    """Say whether B is zero outside the blocks, and not zero altogether."""
    values = up.read().reshape(up.shape[0], -1).astype(bool)
    inside = np.zeros(values.shape, dtype=bool)
    row = column = 0
    for size, rank in zip(sizes, ranks, strict=True):
        inside[row : row + size, column : column + rank] = True
        row, column = row + size, column + rank
    return bool(values.any()) and not bool((values & ~inside).any())


def _take_part(target: Target, name: str, sizes: Sequence[int], ranks: list[int] | None, part: int) -> Target:
    start = sum(sizes[:part])
    factors: dict[str, Factor] = {}
    for role, factor in target.factors.items():
        if role not in _ROWS.get(target.kind, ()):
            factors[role] = factor
        else:
            factors[role] = derive(Take(start, start + sizes[part]), factor)
    if ranks is None:
        return replace(target, name=name, factors=factors)
    first, last = sum(ranks[:part]), sum(ranks[: part + 1])
    factors["lora_A.weight"] = derive(Take(first, last), factors["lora_A.weight"])
    factors["lora_B.weight"] = derive(Take(first, last, axis=1), factors["lora_B.weight"])
    scaling = _keep_scale(target.scaling, target.rank, ranks[part])
    return replace(target, name=name, factors=factors, rank=ranks[part], scaling=scaling)


def _keep_scale(scaling: Scaling, old: int, new: int) -> Scaling:
    """Return the scaling that has the same effect at another rank."""
    if scaling.rule is ScalingRule.MULTIPLIER or old == new:
        return scaling
    if scaling.rule is ScalingRule.ALPHA_OVER_RANK:
        return Scaling(scaling.rule, scaling.value * new / old)
    return Scaling(scaling.rule, scaling.value * float(np.sqrt(new / old)))


def fuse(parts: Mapping[int, Target], row: ModuleRow, name: str, facts: BaseFacts) -> Made:
    """Return the one target that its parts make; parts that are missing are rows of zeros.

    Args:
        parts: part to target.
        row: their row.
        name: of the fused target.
        facts: the base, for rows that are counted in heads.
    """
    targets = [parts[part] for part in sorted(parts)]
    problem = _find_misfit(targets, name, len(row.shares))
    if problem:
        return Made(problems=[problem])
    sizes, problem = _size_parts(parts, row, facts, name)
    if problem:
        return Made(problems=[problem])
    made = Made()
    shared = _share_down(targets)
    scaling = targets[0].scaling
    if not shared or any(target.scaling != scaling for target in targets):
        targets, made.problems = _level(targets)
        scaling = targets[0].scaling
    rank = targets[0].rank if shared else sum(target.rank for target in targets)
    levelled = dict(zip(sorted(parts), targets, strict=True))
    try:
        factors = _join(levelled, sizes, rank, shared)
    except ValueError as error:
        return Made(problems=[Problem("LF315", name, str(error), "parts of one number form")])
    if shared:
        made.absorbed += [target.factors["lora_A.weight"] for target in targets[1:]]
    scaling = _keep_scale(scaling, targets[0].rank, rank)
    made.targets[0] = replace(targets[0], name=name, factors=factors, rank=rank, scaling=scaling)
    return made


def _find_misfit(targets: Sequence[Target], name: str, count: int) -> Problem | None:
    kinds = {target.kind for target in targets}
    if len(kinds) != 1 or not kinds <= _LOW_RANK:
        return Problem("LF315", name, f"parts of the kinds {', '.join(sorted(kinds))}", "low-rank parts of one kind")
    if kinds == {"dora"} and len(targets) < count:
        return Problem("LF315", name, f"magnitudes of {len(targets)} parts of {count}", "magnitudes of all")
    joined = {*_ROWS[targets[0].kind], *_SHARED[targets[0].kind]}
    apart = sorted({role for target in targets for role in target.factors} - joined)
    if apart:
        return Problem("LF315", name, f"parts with {', '.join(apart)}", f"parts of {', '.join(sorted(joined))}")
    if len({frozenset(target.factors) for target in targets}) != 1:
        return Problem("LF315", name, "parts with different factors", "the same factors for each part")
    return None


def _size_parts(
    parts: Mapping[int, Target], row: ModuleRow, facts: BaseFacts, name: str
) -> tuple[list[int], Problem | None]:
    """Return the rows of every part, those of missing ones from the shares."""
    given = {part: target.factors["lora_B.weight"].shape[0] for part, target in parts.items()}
    if all(isinstance(share, int) for share in row.shares):
        shares = [int(share) for share in row.shares]
        units = {rows / shares[part] for part, rows in given.items()}
        if len(units) != 1:
            found = ", ".join(f"{rows} rows" for rows in given.values())
            return [], Problem("LF315", name, found, f"rows in the proportion {':'.join(map(str, shares))}")
        return [int(share * units.copy().pop()) for share in shares], None
    if len(given) == len(row.shares):
        return [given[part] for part in range(len(row.shares))], None
    counts = [facts.count(str(share)) for share in row.shares]
    missing = [str(row.shares[part]) for part, count in enumerate(counts) if count is None and part not in given]
    if missing:
        return [], Problem("LF311", name, f"{len(given)} parts of {len(counts)}", f"the base's {', '.join(missing)}")
    return [given.get(part, count or 0) for part, count in enumerate(counts)], None


def _level(targets: Sequence[Target]) -> tuple[list[Target], list[Problem]]:
    """Return the targets with one multiplier for all."""
    first = targets[0]
    levelled, problems = [first], []
    for target in targets[1:]:
        wanted = _keep_scale(first.scaling, first.rank, target.rank)
        moved = rescale(target, wanted)
        levelled.append(moved.target)
        problems += [moved.problem] if moved.problem else []
    return levelled, problems


def _share_down(targets: Sequence[Target]) -> bool:
    """Say whether all targets have the same A, bit by bit."""
    first, *others = (target.factors["lora_A.weight"] for target in targets)
    scalings = {target.scaling for target in targets}
    return bool(others) and len(scalings) == 1 and all(_is_same(first, other) for other in others)


def _is_same(one: Factor, other: Factor) -> bool:
    one, other = (each.source if isinstance(each, KeptFactor) else each for each in (one, other))
    if one is other:
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if isinstance(one, DerivedFactor) and isinstance(other, DerivedFactor) and one.operation == other.operation:
        return all(map(_is_same, one.sources, other.sources))
    if isinstance(one, StoredTensor) and isinstance(other, StoredTensor):
        return one.equals(other)
    return one.read().tobytes() == other.read().tobytes()


def _join(parts: Mapping[int, Target], sizes: Sequence[int], rank: int, shared: bool) -> dict[str, Factor]:
    """Return the factors of the fused target."""
    first = next(iter(parts.values()))
    downs = [target.factors["lora_A.weight"] for target in parts.values()]
    factors: dict[str, Factor] = {
        "lora_A.weight": downs[0] if shared or len(downs) == 1 else derive(Concatenate(), *downs)
    }
    for role in row_roles(first):
        pieces = [
            parts[part].factors[role] if part in parts else _zeros(first.factors[role], size, rank if shared else 0)
            for part, size in enumerate(sizes)
        ]
        diagonal = role == "lora_B.weight" and not shared
        factors[role] = derive(BlockDiagonal() if diagonal else Concatenate(), *pieces)
    return factors


def _zeros(like: Factor, rows: int, rank: int) -> Factor:
    """Return what a part that was not trained has in place of its rows."""
    shape = (rows, rank, *like.shape[2:]) if len(like.shape) > 1 else (rows,)
    return NewFactor("zeros", np.zeros(shape, dtype=like.dtype.numpy()))
