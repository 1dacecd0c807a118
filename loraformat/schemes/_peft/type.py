"""What PEFT's types other than LORA have in common: a type is one row of the table in `types.py`.

Names with and without the adapter's, factors that all targets share, ranks and alphas by pattern stand here once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from loraformat.adapter import Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.errors import refuse
from loraformat.problems import Problem
from loraformat.schemes._peft.config import PeftConfig
from loraformat.schemes._peft.fields import Fields, find_unknown, name_fields
from loraformat.schemes._peft.groups import BASE, COPY, REPLACE, SHARED
from loraformat.schemes._table import NameTable, Row
from loraformat.strict_json import JsonValue

_REPLACED: Final = (
    Row("modules_to_save.{adapter}.weight", REPLACE, "weight"),
    Row("modules_to_save.{adapter}.bias", REPLACE, "bias"),
    Row("modules_to_save.weight", COPY, "modules_to_save.weight"),
    Row("modules_to_save.bias", COPY, "modules_to_save.bias"),
    Row("base_layer.weight", BASE, "base_layer.weight"),
    Row("base_layer.bias", BASE, "base_layer.bias"),
    Row("weight", REPLACE, "weight"),
    Row("bias", REPLACE, "bias"),
)

Factors = Mapping[str, Factor]
Options = Callable[[PeftConfig, str, Factors], Mapping[str, JsonValue]]
"""Configuration, target and factors to the target's options."""
Stow = Callable[[dict[str, Factor], "PeftConfig"], tuple[dict[str, Factor], list[Problem]]]
"""Tensors by key, from which it takes what is stored elsewhere, and configuration to what was taken, by whole key."""
Complete = Callable[[Mapping[str, Target], dict[str, JsonValue]], Sequence[Problem]]
"""Targets and the configuration that is made for them to what stands against it."""


@dataclass(frozen=True, slots=True)
class Barrier:
    """A field under which an adapter cannot be merged.

    Attributes:
        field: its name.
        holds: whether a value stands in the way.
        why: in words.
        default: PEFT's value where the field is missing.
        code: the reason code.
    """

    field: str
    holds: Callable[[JsonValue], bool]
    why: str
    default: JsonValue = None
    code: str = "LF209"


@dataclass(frozen=True, slots=True)
class PeftType:
    """One type.

    Attributes:
        kind: what its targets are.
        heeds: fields of its configuration that count besides those which other attributes name.
        ignores: those that change no number; the shape of a tensor says what most ranks do.
        roles: its tensors, each by the end of its key and with its role.
        rank: roles and the axis of theirs that is the rank; the first that a target has counts.
        alpha: the field that is divided by the rank to give the scale, and goes by `alpha_pattern`; or none.
        scale: the field that is the scale itself; or none.
        options: fields that become options of the same name, with PEFT's default.
        more: what other options there are.
        convolves: roles that have more than two axes in a convolution.
        adjust: what is done with a target in the end; it may become a problem.
        scaling: how its scale follows where neither field says it.
        obstacles: fields under which it cannot be merged.
        remarks: what is to be said of it, and does not stand against it.
        drawn: roles that all targets share, and that are drawn again from a seed where they were not saved.
        shared: roles that all targets share, which PEFT stores once.
        arrange: gives targets what they share in groups, each under a name of its own.
        stow: takes it out of their tensors again, to be written; None for what all targets share.
        complete: adds to a configuration made for targets what a type with rank and alpha has besides, and returns what
            PEFT cannot hold; None for a type that is only written with the configuration it came with.
    """

    kind: str
    roles: Mapping[str, str]
    rank: Sequence[tuple[str, int]] = ()
    alpha: str = ""
    scale: str = ""
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    more: Options = field(default=lambda config, target, factors: {})
    convolves: Sequence[str] = ()
    adjust: Callable[[Target, PeftConfig], Target | Problem] = field(default=lambda target, config: target)
    scaling: Callable[[PeftConfig, Factors], float] = field(default=lambda config, factors: 1.0)
    obstacles: Sequence["Barrier"] = ()
    remarks: Callable[[PeftConfig], list[Problem]] = field(default=lambda config: [])
    drawn: Sequence[str] = ()
    shared: Sequence[str] = ()
    arrange: Callable[[Factors, PeftConfig], Factors | Problem] = field(default=lambda tensors, config: tensors)
    stow: Stow | None = None
    complete: Complete | None = None
    heeds: str = ""
    ignores: str = ""

    @property
    def fields(self) -> Fields:
        """The fields that its configurations have."""
        alpha = f"{self.alpha} r rank_pattern alpha_pattern" if self.alpha else ""
        barriers = " ".join(each.field for each in self.obstacles)
        seed = "projection_prng_key save_projection" if self.drawn else ""
        read = f"{alpha} {self.scale} {' '.join(self.options)} {barriers} {seed} {self.heeds}"
        return name_fields(read, self.ignores)

    @property
    def table(self) -> NameTable:
        """How its tensors are called."""
        rows = [Row(end, self.kind, role) for end, role in self.roles.items()]
        rows += [Row(_with_adapter(end), self.kind, role) for end, role in self.roles.items()]
        return NameTable([*rows, *_REPLACED])

    def read_target(self, name: str, factors: Factors, config: PeftConfig, targets: int) -> Target | Problem:
        """Return the target that these factors are, one of several, or why there is none."""
        rank = next((_size(factors[role], axis) for role, axis in self.rank if role in factors), 0)
        options = {each: config.fields.get(each, default) for each, default in self.options.items()}
        target = Target(
            name=name,
            kind=self.kind,
            slot=self._slot(factors, config),
            factors=factors,
            rank=rank,
            scaling=self._find_scaling(name, rank, factors, config),
            options={**options, **self.more(config, name, factors), **self._find_seed(factors, config, targets)},
        )
        return self.adjust(target, config)

    def find_obstacles(self, config: PeftConfig) -> list[Problem]:
        """Return the settings under which this version cannot merge, and those that it does not know."""
        return [
            *(
                Problem(
                    each.code, f"{config.where}: {each.field}", f"{config.fields.get(each.field)!r:.80}: {each.why}"
                )
                for each in self.obstacles
                if each.holds(config.fields.get(each.field, each.default))
            ),
            *self.remarks(config),
            *find_unknown(config.fields, config.where, self.fields),
        ]

    def _slot(self, factors: Factors, config: PeftConfig) -> SlotKind:
        if any("embedding" in role for role in factors):
            return SlotKind.EMBEDDING
        if any(role in factors and len(factors[role].shape) > 2 for role in self.convolves):
            return SlotKind.CONV
        return SlotKind.LINEAR_TRANSPOSED if config.flag("fan_in_fan_out") else SlotKind.LINEAR

    def _find_seed(self, factors: Factors, config: PeftConfig, targets: int) -> Mapping[str, JsonValue]:
        """Return what factors are drawn by that were left out of the file."""
        if not self.drawn or config.fields.get("save_projection") is not False or set(self.drawn) & set(factors):
            return {}
        return {"projection_prng_key": config.fields.get("projection_prng_key", 0), "sharing": targets}

    def _find_scaling(self, name: str, rank: int, factors: Factors, config: PeftConfig) -> Scaling:
        if self.scale:
            return Scaling(ScalingRule.MULTIPLIER, read_number(config, self.scale, config.fields.get(self.scale)))
        if not self.alpha:
            return Scaling(ScalingRule.MULTIPLIER, self.scaling(config, factors))
        stated, of_patterns = config.numbers_of(name, rank, self.alpha)
        alpha = read_number(config, self.alpha, of_patterns)
        if rank:
            return Scaling(ScalingRule.ALPHA_OVER_RANK, alpha)
        if not isinstance(stated, int) or isinstance(stated, bool) or stated < 1:
            raise refuse("LF213", f"{config.where}: r", f"{stated!r:.80}", "a whole number of at least 1")
        return Scaling(ScalingRule.MULTIPLIER, alpha / stated)


def spread_shared(groups: Mapping[str, dict[str, Factor]]) -> dict[str, dict[str, Factor]]:
    """Return the factors by target, those that all share in each of them."""
    shared = groups.get(SHARED, {})
    return {name: {**shared, **factors} for name, factors in groups.items() if name != SHARED}


def _with_adapter(end: str) -> str:
    """Return how a key ends in a raw state dict, where the adapter's name stands behind the parameter."""
    first, dot, rest = end.partition(".")
    return f"{first}.{{adapter}}{dot}{rest}"


def _size(factor: Factor, axis: int) -> int:
    return factor.shape[axis] if len(factor.shape) > axis else 0


def read_number(config: PeftConfig, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise refuse("LF213", f"{config.where}: {name}", f"{value!r:.80}", "a finite number")
    return float(value)
