"""Schemes whose files have names, containers and limits of their own: one scale for all targets, one rank, or none.

What a target cannot keep is moved into its factors, by the rules of `rescaling`; ranks are made equal by zeros.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from loraformat.adapter import Adapter, Factor, Scaling, ScalingRule, Target
from loraformat.base_facts import BaseFacts
from loraformat.derived import derive
from loraformat.frozen_mapping import FrozenMapping
from loraformat.operations import Pad
from loraformat.problems import Problem
from loraformat.rescaling import rescale
from loraformat.schemes import WrittenBundle
from loraformat.schemes._engine import TableScheme

_SAME: Final = 1e-12
"""Scales that differ by less are one number that was rounded on different ways."""
_RANK_AXES: Final = {"lora_A.weight": 0, "lora_embedding_A": 0, "lora_B.weight": 1, "lora_embedding_B": 1}

Level = Callable[[Target], float]
"""The number that a scheme stores for a target: its multiplier, or its alpha."""


def multiplier_of(target: Target) -> float:
    """Return the effective scale."""
    return target.scale


def alpha_of(target: Target) -> float:
    """Return the alpha that gives the target's scale when divided by its rank."""
    if target.scaling.rule is ScalingRule.ALPHA_OVER_RANK:
        return target.scaling.value
    return target.scale * max(target.rank, 1)


UNIT: Final = Scaling(ScalingRule.MULTIPLIER, 1.0)


def level_multipliers(targets: Sequence[Target]) -> tuple[list[Target], list[Problem]]:
    """Return the targets with the commonest multiplier for all, and what that cost."""
    if len({(target.scaling, target.rank) for target in targets if target.rank}) < 2:
        return list(targets), []
    common = _commonest(targets, multiplier_of)
    return _move(targets, lambda target: Scaling(ScalingRule.MULTIPLIER, common))


def level_alphas(targets: Sequence[Target]) -> tuple[list[Target], list[Problem]]:
    """Return the targets with the commonest alpha, over each one's own rank, for all, and what that cost."""
    common = _commonest(targets, alpha_of)
    return _move(targets, lambda target: Scaling(ScalingRule.ALPHA_OVER_RANK, common))


def fold_scales(targets: Sequence[Target]) -> tuple[list[Target], list[Problem]]:
    """Return the targets with the scale 1, and what that cost."""
    return _move(targets, lambda target: UNIT)


def pad_ranks(targets: Sequence[Target]) -> tuple[list[Target], list[Problem]]:
    """Return the targets with the largest rank for all, zeros in the new rows of A and columns of B.

    Their scalings must not depend on the rank.
    """
    rank = max((target.rank for target in targets), default=0)
    smaller = sorted(target.name for target in targets if 0 < target.rank < rank)
    padded = [_pad(target, rank) if target.rank else target for target in targets]
    if not smaller:
        return padded, []
    found = f"{len(smaller)} targets of a lower rank, such as {smaller[0]}, padded with zeros to {rank}"
    return padded, [Problem("LF340", "ranks", found, severity="note")]


def _pad(target: Target, rank: int) -> Target:
    def grow(role: str, factor: Factor) -> Factor:
        missing = rank - target.rank
        return derive(Pad(0, missing, _RANK_AXES[role]), factor) if role in _RANK_AXES and missing else factor

    return replace(target, rank=rank, factors={role: grow(role, factor) for role, factor in target.factors.items()})


def _commonest(targets: Sequence[Target], level: Level) -> float:
    """Return the number of most targets; of equally many the largest."""
    counts = Counter(level(target) for target in targets if target.rank)
    return max(counts, key=lambda value: (counts[value], abs(value)), default=1.0)


def _move(targets: Sequence[Target], scaling_for: Callable[[Target], Scaling]) -> tuple[list[Target], list[Problem]]:
    moved: list[Target] = []
    problems: list[Problem] = []
    for target in targets:
        wanted = replace(target, scaling=scaling_for(target))
        if not target.rank:
            moved.append(target)
        elif math.isclose(wanted.scale, target.scale, rel_tol=_SAME):
            moved.append(wanted)
        else:
            rescaled = rescale(target, wanted.scaling)
            moved.append(rescaled.target)
            problems += [rescaled.problem] if rescaled.problem else []
    return moved, problems


@dataclass(frozen=True)
class FiledScheme(TableScheme):
    """A table scheme with files of its own.

    Attributes:
        container: in what the tensors are written.
        file_name: what the file is called in its folder; empty for a single file.
        other_files: other names of it, each with the container that it says.
        config_name: what the configuration is called.
        annotates: whether the container has a place for annotations.
    """

    container: str = "safetensors"
    file_name: str = ""
    other_files: Mapping[str, str] = field(default_factory=FrozenMapping)
    config_name: str = ""
    annotates: bool = True

    def write(self, adapter: Adapter, facts: BaseFacts) -> WrittenBundle:
        """Return the tensors under this scheme's names, in files of its own."""
        written = super().write(adapter, facts)
        return replace(
            written,
            container=self.container,
            file_name=self.file_name,
            other_files=self.other_files,
            config_name=self.config_name,
            metadata=written.metadata if self.annotates else {},
        )
