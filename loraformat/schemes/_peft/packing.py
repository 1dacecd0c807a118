"""The way back of `_peft_packed`: experts of one parameter into one pair of factors, blocks into a compact one."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from loraformat.adapter import Factor, Target
from loraformat.derived import DerivedFactor, derive
from loraformat.operations import BlockDiagonal, Concatenate, Take
from loraformat.problems import Problem
from loraformat.row_orders import Permute
from loraformat.schemes._experts import check_experts
from loraformat.schemes._peft.config import PeftConfig
from loraformat.schemes._peft.packed import ORDER, WRAPPED, A, B, list_blocks, list_parameters

_EXPERT: Final = re.compile(r"(?P<module>.+)\.(?P<expert>\d+)\.(?P<parameter>\w+)")
_NO_MODULE: Final = "gate_up_proj"
"""A parameter of transformers' experts that no expert has as a module of its own."""
Targets = Mapping[str, Target]


@dataclass(slots=True)
class Packed:
    """What a folder has in one pair of factors.

    Attributes:
        plain: the other targets.
        parameters: `<module>.<parameter>` to the target of all its experts.
        tensors: key to tensor.
        problems: what keeps experts from lying in one.
    """

    plain: dict[str, Target] = field(default_factory=dict)
    parameters: dict[str, Target] = field(default_factory=dict)
    tensors: dict[str, Factor] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def pack_experts(targets: Targets, raw: Mapping[str, Any]) -> Packed:
    """Return the targets with those of packed parameters put together.

    Experts are packed where the configuration that the adapter came with says so, and where a name is that of a
    parameter; `experts.3.down_proj` alone is a module, as models with a module for each expert have it.
    """
    packed = Packed()
    groups: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in targets:
        match = _EXPERT.fullmatch(name)
        if match is not None:
            groups[match["module"]][match["parameter"]][int(match["expert"])] = name
    config = PeftConfig(raw, "adapter_config.json", True)
    taken: set[str] = set()
    for module, parameters in groups.items():
        stated = list_parameters(module, config, len(parameters))
        names = [each for each in parameters if each in stated or (_NO_MODULE in parameters and each in ORDER)]
        taken |= {name for each in names for name in parameters[each].values()}
        ordered = sorted(names, key=lambda each: (stated + list(ORDER)).index(each))
        for index, parameter in enumerate(ordered):
            experts = {number: targets[name] for number, name in parameters[parameter].items()}
            wrappers = WRAPPED * (len(ordered) - 1 - index)
            _pack(f"{module}.{parameter}", f"{module}{wrappers}", experts, packed)
    for name in sorted(targets.keys() - taken):
        owner = _find_lone_module(name, config)
        if owner is None:
            packed.plain[name] = targets[name]
        else:
            packed.parameters[name if owner != name else f"{name}.weight"] = targets[name]
            packed.tensors |= {f"{owner}.{role}": factor for role, factor in targets[name].factors.items()}
    return packed


def _find_lone_module(name: str, config: PeftConfig) -> str | None:
    """Return the module of which a target is the only targeted parameter, without experts; None for a module itself."""
    if list_parameters(name, config, 1) == ["weight"]:
        return name
    module, _, parameter = name.rpartition(".")
    return module if list_parameters(module, config, 1) == [parameter] else None


def _pack(name: str, key: str, experts: Mapping[int, Target], packed: Packed) -> None:
    problem = check_experts(name, experts)
    if problem is not None:
        packed.problems.append(problem)
        return
    ordered = [experts[number] for number in sorted(experts)]
    downs, ups = ([target.factors[role] for target in ordered] for role in (A, B))
    side_by_side = derive(Concatenate(axis=1), *ups)
    factors = {
        A: derive(Concatenate(), *downs),
        B: derive(Permute((len(ordered), ups[0].shape[1]), (1, 0), axis=1), side_by_side),
    }
    packed.parameters[name] = replace(ordered[0], name=name, factors=factors, fingerprint=None)
    packed.tensors |= {f"{key}.{role}": factor for role, factor in factors.items()}


def compress_blocks(targets: Targets, raw: Mapping[str, Any]) -> dict[str, Target] | None:
    """Return the targets with the block diagonals of BD-LoRA in their compact form; None where they are none by now."""
    config = PeftConfig(raw, "adapter_config.json", True)
    compressed: dict[str, Target] = {}
    for name, target in targets.items():
        stated = list_blocks(name, config)
        factors = dict(target.factors)
        for role in stated.roles:
            compact = _compress(factors[role], stated.count) if role in factors else None
            if compact is None:
                return None
            factors[role] = compact
        compressed[name] = replace(target, factors=factors)
    return compressed


def _compress(factor: Factor, count: int) -> Factor | None:
    """Return the blocks of a diagonal one below the other; None where there are numbers outside them."""
    if isinstance(factor, DerivedFactor) and isinstance(factor.operation, BlockDiagonal):
        return derive(Concatenate(), *factor.sources) if len(factor.sources) == count else None
    rows, columns = factor.shape[0], factor.shape[1]
    if rows % count or columns % count or not _is_diagonal(factor, count):
        return None
    return derive(Concatenate(), *_take_blocks(factor, rows // count, columns // count, count))


def _take_blocks(factor: Factor, rows: int, columns: int, count: int) -> Sequence[Factor]:
    return [
        derive(Take(each * columns, (each + 1) * columns, axis=1), derive(Take(each * rows, (each + 1) * rows), factor))
        for each in range(count)
    ]


def _is_diagonal(factor: Factor, count: int) -> bool:
    values = factor.read().astype(bool)
    blocks = values.reshape(count, values.shape[0] // count, count, values.shape[1] // count)
    outside = ~np.eye(count, dtype=bool)[:, None, :, None]
    return not bool((blocks & outside).any())
