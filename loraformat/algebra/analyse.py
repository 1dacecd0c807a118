"""What adapters have learned, in numbers: spectra, where the energy is, what is shared, what is amplified.

Section 7 of the LoRA paper (Hu et al., arXiv 2106.09685) for any adapter, from the factors. Targets are opened module
after module, and for comparisons once more, so that the factors of one module are held; with a base also one dense
weight. `docs/analysis.md` says what each number means.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TypeGuard

import numpy as np

from loraformat.adapter import Adapter, Target
from loraformat.algebra._directions import (
    MAX_RANK,
    NUMBER,
    PURPOSE,
    Opened,
    Subject,
    name_modules,
    open_target,
    order_of,
)
from loraformat.algebra._maps import compare_subjects, map_layers
from loraformat.algebra._random import generator
from loraformat.algebra._randomised import leading_svd
from loraformat.algebra._targets import nature_of, tells_size
from loraformat.algebra._weights import read_weight
from loraformat.algebra.analysis import AdapterAnalysis, Amplification, Analysis, LayerMap, TargetAnalysis
from loraformat.algebra.subspaces import effective_rank, project, stable_rank
from loraformat.bases import BaseModel
from loraformat.errors import error_for
from loraformat.evidence import Hints
from loraformat.kinds import Nature
from loraformat.matching import Match
from loraformat.problems import Problem
from loraformat.resolve import gather_clues, resolve
from loraformat.rules import check_adapter


def analyse_adapters(
    adapters: Sequence[tuple[str, Adapter]], base: BaseModel | None = None, *, seed: int = 0
) -> Analysis:
    """Analyse adapters, each alone and each pair.

    Args:
        adapters: name and adapter.
        base: the model that they were trained on, for what they amplify; None does without.
        seed: of the random matrices that amplification is compared with.

    Raises:
        LoraformatError: LF725 no target has singular values; what is wrong with factors or their place in the base.
    """
    if not adapters:
        raise error_for([Problem("LF725", "adapters", "none", "at least one")])
    problems = [problem for name, adapter in adapters for problem in _list_left_out(name, adapter)]
    subjects = [_choose_targets(name, adapter) for name, adapter in adapters]
    matches = [_match(subject.adapter, base) for subject in subjects]
    problems += [_report_parts(*pair) for pair in zip(subjects, matches, strict=True) if _count_parts(pair[1])]
    return Analysis(
        adapters=tuple(_analyse_one(*pair, seed) for pair in zip(subjects, matches, strict=True)),
        comparisons=tuple(
            compared for pair in combinations(subjects, 2) if (compared := compare_subjects(*pair)) is not None
        ),
        base=str(base.path) if base is not None else "",
        problems=tuple(problems),
    )


def _choose_targets(name: str, adapter: Adapter) -> Subject:
    """Return the targets that have singular values; LF725 when there are none."""
    chosen = replace(adapter, targets=tuple(each for each in adapter.targets if _has_values(each)))
    if not chosen.targets:
        kinds = ", ".join(sorted({target.kind for target in adapter.targets})) or "no targets"
        raise error_for([Problem("LF725", name, kinds, "targets whose change is added, and tells its size")])
    errors = [problem for problem in check_adapter(chosen, allow_zero=True) if problem.severity == "error"]
    if errors:
        raise error_for(errors)
    return Subject(name, chosen, name_modules([target.name for target in chosen.targets]))


def _has_values(target: Target) -> bool:
    """Say whether a target has singular values that it tells by itself."""
    return nature_of(target) is Nature.ADDITIVE and tells_size(target)


def _list_left_out(name: str, adapter: Adapter) -> Iterator[Problem]:
    counts = Counter(target.kind for target in adapter.targets if not _has_values(target))
    for kind, count in sorted(counts.items()):
        yield Problem("LF726", name, f"{count} targets of the kind {kind!r}", severity="warning")


def _analyse_one(subject: Subject, matches: Mapping[str, Match], seed: int) -> AdapterAnalysis:
    targets: list[TargetAnalysis] = []
    within: list[LayerMap] = []
    for module, group in subject.groups().items():
        opened = [open_target(target) for target in group]
        targets += [_describe(each, module, matches.get(each.target.name), seed) for each in opened]
        within += map_layers(module, opened)
    whole = math.hypot(*(target.norm for target in targets))
    shared = [replace(each, energy=(each.norm / whole) ** 2 if whole else 0.0) for each in targets]
    ordered = sorted(shared, key=lambda each: order_of(each.name))
    return AdapterAnalysis(
        name=subject.name,
        parameters=subject.adapter.parameters,
        norm=whole,
        targets=tuple(ordered),
        by_layer=_share_energy(ordered, lambda each: "" if each.layer is None else str(each.layer)),
        by_module=_share_energy(sorted(shared, key=lambda each: each.module), lambda each: each.module),
        within=tuple(within),
    )


def _share_energy(targets: Sequence[TargetAnalysis], key: Callable[[TargetAnalysis], str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for each in targets:
        shares[key(each)] = shares.get(key(each), 0.0) + each.energy
    return shares


def _describe(opened: Opened, module: str, match: Match | None, seed: int) -> TargetAnalysis:
    target, values = opened.target, opened.svd.values
    numbers = NUMBER.findall(target.name)
    return TargetAnalysis(
        name=target.name,
        layer=int(numbers[0]) if numbers else None,
        module=module,
        shape=(opened.svd.left.shape[0], opened.svd.right.shape[1]),
        rank=target.rank,
        scale=target.scale,
        values=tuple(map(float, values)),
        norm=float(np.linalg.norm(values)),
        effective_rank=effective_rank(values),
        stable_rank=stable_rank(values),
        energy=0.0,
        amplification=_amplify(opened, match, seed) if _is_whole(match) and opened.count else None,
    )


def _match(adapter: Adapter, base: BaseModel | None) -> dict[str, Match]:
    """Return target to weight of the base, empty without a base."""
    if base is None:
        return {}
    resolution = resolve(adapter, base.sites, clues=gather_clues(adapter, base, Hints()))
    errors = [problem for problem in resolution.problems if problem.severity == "error"]
    if errors:
        raise error_for(errors)
    return {
        match.target.name: match
        for match in resolution.matches
        if match.want.change.nature is Nature.ADDITIVE and match.want.parameter == "weight"
    }


def _is_whole(match: Match | None) -> TypeGuard[Match]:
    """Say whether a target's weight is a tensor of its own, and not part of a fused, packed or split one."""
    return match is not None and match.part is None and match.section is None


def _count_parts(matches: Mapping[str, Match]) -> int:
    return sum(not _is_whole(match) for match in matches.values())


def _report_parts(subject: Subject, matches: Mapping[str, Match]) -> Problem:
    found = f"{_count_parts(matches)} targets whose weights are parts of tensors: no amplification"
    return Problem("LF726", subject.name, found, severity="warning")


def _amplify(opened: Opened, match: Match, seed: int) -> Amplification:
    """Return Table 7 of the paper for one target; the weight is read whole, and let go."""
    weight = read_weight(match.sites[0], transposed=match.transposed)
    count = min(opened.count, MAX_RANK)
    rng = generator(PURPOSE, seed, opened.target.name)
    own = leading_svd(weight, rng, rank=count).svd
    random = [np.linalg.qr(rng.standard_normal((size, count), np.float32))[0] for size in weight.shape]
    along_delta = project(weight, opened.svd.left[:, :count], opened.svd.right[:count].T)
    norm = float(np.linalg.norm(opened.svd.values))
    return Amplification(
        rank=count,
        weight_norm=float(np.linalg.norm(weight)),
        along_delta=along_delta,
        along_weight=project(weight, own.left, own.right.T),
        along_random=project(weight, *random),
        factor=norm / along_delta if along_delta else None,
    )
