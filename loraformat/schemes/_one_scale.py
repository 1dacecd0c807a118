"""Where schemes of language models keep their one scale: in a configuration, in a file's own values, or nowhere."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loraformat.adapter import Scaling, ScalingRule, Target
from loraformat.errors import refuse
from loraformat.schemes import Bundle, StatedScale
from loraformat.schemes._beside import Module
from loraformat.schemes._files import UNIT
from loraformat.schemes._scales import ScalesRead, ScalesWritten
from loraformat.strict_json import JsonValue

Config = Mapping[str, JsonValue]
_ALPHA_NOTE: Final = "loraformat.alpha"
"""An annotation: the alpha that a multiplier was, which schemes with alphas want back."""


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
            scaling = _recall_alpha(scaling, modules, bundle.metadata.get(_ALPHA_NOTE))
        return ScalesRead(
            {module.name: scaling if module.rank else UNIT for module in modules},
            remembered={"config": dict(config)} if config else {},
        )

    def write(self, targets: Sequence[Target], remembered: Mapping[str, JsonValue]) -> ScalesWritten:
        """Return the configuration."""
        before = remembered.get("config")
        ranked = [target for target in targets if target.rank]
        config = self.write_config(ranked, before if isinstance(before, Mapping) else {})
        alphas = {target.scaling for target in ranked if target.scaling.rule is ScalingRule.ALPHA_OVER_RANK}
        noted = self.rule is ScalingRule.MULTIPLIER and len(alphas) == 1
        return ScalesWritten(config=config, metadata={_ALPHA_NOTE: repr(alphas.pop().value)} if noted else {})


def _recall_alpha(scaling: Scaling, modules: Sequence[Module], note: str | None) -> Scaling:
    """Return the alpha that a multiplier came from, where an annotation of ours tells it and the scale agrees."""
    ranks = {module.rank for module in modules if module.rank}
    if note is None or len(ranks) != 1 or scaling.rule is not ScalingRule.MULTIPLIER:
        return scaling
    try:
        alpha = Scaling(ScalingRule.ALPHA_OVER_RANK, float(note))
    except ValueError:
        return scaling
    return alpha if math.isclose(alpha.effective(ranks.pop()), scaling.value, rel_tol=1e-12) else scaling


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
