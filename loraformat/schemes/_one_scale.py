"""Where schemes of language models keep their one scale: in a configuration, in a file's own values, or nowhere."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraformat.adapter import Scaling, ScalingRule, Target
from loraformat.errors import refuse
from loraformat.schemes import Bundle, StatedScale
from loraformat.schemes._files import UNIT
from loraformat.schemes._scales import Module, ScalesRead, ScalesWritten
from loraformat.strict_json import JsonValue

Config = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class ConfigScale:
    """One number of the configuration beside the file, for all targets; the user states it where there is none.

    Attributes:
        find: the number in a configuration, None where it does not say.
        rule: what the number is.
        write_config: the configuration for targets of one scale and, where the scheme wants it, one rank; the second
            argument is the configuration that the adapter had in this scheme before, empty where it had none.
    """

    find: Callable[[Config], JsonValue]
    rule: ScalingRule
    write_config: Callable[[Sequence[Target], Config], dict[str, JsonValue]]

    def read(self, modules: Sequence[Module], bundle: Bundle, stated: StatedScale) -> ScalesRead:
        """Return the one scaling for every module that has a rank."""
        scaling = state(stated)
        config = bundle.config or {}
        if scaling is None:
            scaling = Scaling(self.rule, check_number(self.find(config), bundle))
        return ScalesRead(
            {module.name: scaling if module.rank else UNIT for module in modules},
            remembered={"config": dict(config)} if config else {},
        )

    def write(self, targets: Sequence[Target], remembered: Mapping[str, JsonValue]) -> ScalesWritten:
        """Return the configuration."""
        before = remembered.get("config")
        ranked = [target for target in targets if target.rank]
        return ScalesWritten(config=self.write_config(ranked, before if isinstance(before, Mapping) else {}))


@dataclass(frozen=True, slots=True)
class Folded:
    """The scale stands in the factors."""

    def read(self, modules: Sequence[Module], bundle: Bundle, stated: StatedScale) -> ScalesRead:
        """Return the scale 1, or what the user states."""
        scaling = state(stated) or UNIT
        return ScalesRead({module.name: scaling if module.rank else UNIT for module in modules})

    def write(self, targets: Sequence[Target], remembered: Mapping[str, JsonValue]) -> ScalesWritten:
        """Return nothing: the targets were folded before."""
        return ScalesWritten()


def state(stated: StatedScale) -> Scaling | None:
    """Return the scaling that the user states, None without one."""
    if stated.multiplier is not None:
        return Scaling(ScalingRule.MULTIPLIER, stated.multiplier)
    return Scaling(ScalingRule.ALPHA_OVER_RANK, stated.alpha) if stated.alpha is not None else None


def check_number(value: JsonValue, bundle: Bundle) -> float:
    """Return a number of a configuration.

    Raises:
        FindingError: LF207 not finite, LF211 nothing there.
        InputError: LF213 no number.
    """
    if value is None:
        raise refuse("LF211", bundle.path, "no configuration that states it", "the scale of the training run")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse("LF213", bundle.path, f"the scale {value!r:.80}", "a number")
    if not math.isfinite(value):
        raise refuse("LF207", bundle.path, f"{value}", "a finite number")
    return float(value)


def inner(config: Config, *path: str) -> Any:
    """Return what stands under a path of fields, None where a step is missing."""
    value: Any = config
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
