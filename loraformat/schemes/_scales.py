"""Where a scheme keeps the scale: in a tensor beside each module, in a configuration, or nowhere."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from loraformat.adapter import Factor, Scaling, ScalingRule, Target
from loraformat.derived import NewFactor
from loraformat.errors import refuse
from loraformat.problems import Problem
from loraformat.rescaling import rescale
from loraformat.schemes import NOT_STATED, Bundle, StatedScale
from loraformat.schemes._beside import (
    ALPHA,
    FLOAT32,
    Form,
    Module,
    as_number,
    form_of,
    make_number,
    read_alpha,
    recall_form,
    remember_forms,
)
from loraformat.schemes._header_scales import (
    ADAPTER_METADATA,
    find_header_alpha,
    find_scaling,
    read_adapter_metadata,
)
from loraformat.schemes._options import BOUNDED
from loraformat.strict_json import JsonValue

UNIT: Final = Scaling(ScalingRule.MULTIPLIER, 1.0)


@dataclass(slots=True)
class ScalesRead:
    """What became of the scales.

    Attributes:
        scalings: target to scaling.
        problems: what was not stated or odd.
        remembered: what `write` needs to restore the scheme's own form.
    """

    scalings: dict[str, Scaling] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    remembered: dict[str, JsonValue] = field(default_factory=dict)


@dataclass(slots=True)
class ScalesWritten:
    """Where the scales go.

    Attributes:
        sidecars: target to role to tensor.
        metadata: annotations of the file.
        config: the configuration beside it, or None.
        problems: scales that would be rounded.
    """

    sidecars: dict[str, dict[str, Factor]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, JsonValue] | None = None
    problems: list[Problem] = field(default_factory=list)


class ScalePlace(Protocol):
    """Where a scheme keeps the scale."""

    def read(self, modules: Sequence[Module], bundle: Bundle, stated: StatedScale) -> ScalesRead:
        """Return the scaling of every module."""
        ...

    def write(self, targets: Sequence[Target], remembered: Mapping[str, JsonValue]) -> ScalesWritten:
        """Return what holds the scalings of the targets."""
        ...


@dataclass(frozen=True, slots=True)
class AlphaTensors:
    """A tensor `alpha` of one number beside each module: s = alpha / rank.

    Without it, or with an alpha of 0, s is 1, as kohya's own loader and its followers have it.

    Attributes:
        asked: whether a file without any alpha must be told its scale; otherwise it is what every reader takes, 1.
    """

    asked: bool = False

    def read(self, modules: Sequence[Module], bundle: Bundle, stated: StatedScale) -> ScalesRead:
        """Return the scalings; alphas that have no effect are remembered."""
        result = ScalesRead()
        forms: dict[str, str] = {}
        idle: dict[str, JsonValue] = {}
        silent = [module.name for module in modules if ALPHA not in module.sidecars and module.rank]
        for module in modules:
            alpha = read_alpha(module)
            if alpha is not None:
                tensor = module.sidecars[ALPHA]
                forms[module.name] = form_of(tensor)
                if not (alpha and module.rank):
                    idle[module.name] = alpha
            result.scalings[module.name] = _scale_by(alpha, module.rank) if alpha is not None else UNIT
        silent = self._read_header(silent, bundle, stated, result)
        if silent:
            fallback = self._fall_back(silent, bundle, stated, result)
            result.scalings |= dict.fromkeys(silent, fallback)
            result.remembered["silent"] = len(silent) == len(modules) or silent
        result.remembered |= remember_forms(forms)
        if idle:
            result.remembered["idle_alphas"] = idle
        return result

    def _read_header(self, silent: Sequence[str], bundle: Bundle, stated: StatedScale, result: ScalesRead) -> list[str]:
        """Take the scalings that diffusers' annotation gives modules without an alpha; return the other modules."""
        configs = read_adapter_metadata(bundle) if silent and stated == NOT_STATED else {}
        scalings = {name: find_scaling(name, configs, bundle) for name in silent} if configs else {}
        known = {name: scaling for name, scaling in scalings.items() if scaling is not None}
        if known:
            result.scalings |= known
            alphas = ", ".join(sorted({f"{scaling.value:g}" for scaling in known.values()}))
            found = f"{ADAPTER_METADATA}: lora_alpha {alphas} for {len(known)} modules"
            result.problems.append(Problem("LF326", str(bundle.path), found, severity="note"))
        return [name for name in silent if name not in known]

    def _fall_back(self, silent: Sequence[str], bundle: Bundle, stated: StatedScale, result: ScalesRead) -> Scaling:
        """Return the scaling of modules without an alpha tensor."""
        if stated.multiplier is not None:
            return Scaling(ScalingRule.MULTIPLIER, stated.multiplier)
        config = bundle.config or {}
        alpha = stated.alpha if stated.alpha is not None else config.get("lora_alpha")
        if isinstance(alpha, int | float) and not isinstance(alpha, bool):
            rule = ScalingRule.ALPHA_OVER_SQRT_RANK if config.get("use_rslora") else ScalingRule.ALPHA_OVER_RANK
            return Scaling(rule, float(alpha))
        stated_there = find_header_alpha(bundle.metadata)
        if stated_there is not None:
            scaling, words = stated_there
            found = f"{words}, for {len(silent)} modules without an alpha of their own"
            result.problems.append(Problem("LF326", str(bundle.path), found, severity="note"))
            return scaling
        found = f"no alpha for {len(silent)} modules, such as {silent[0]}"
        if self.asked:
            raise refuse("LF211", bundle.path, found, "the scale of the training run")
        found += ": taken as 1, as every reader does"
        result.problems.append(Problem("LF321", str(bundle.path), found, severity="note"))
        return UNIT

    def write(self, targets: Sequence[Target], remembered: Mapping[str, JsonValue]) -> ScalesWritten:
        """Return an alpha for each target but those with a multiplier of 1, or that had none and still need none."""
        result = ScalesWritten()
        idle = remembered.get("idle_alphas")
        idle = idle if isinstance(idle, Mapping) else {}
        silent = remembered.get("silent")
        for target in targets:
            was_silent = silent is True or (isinstance(silent, Sequence) and target.name in silent)
            alpha = as_number(idle.get(target.name)) if target.scaling == UNIT else _alpha_of(target)
            if alpha is None or (was_silent and target.scale == 1.0):
                continue
            factor = _make_alpha(target.name, alpha, recall_form(remembered, target.name))
            result.sidecars[target.name] = {ALPHA: factor}
            stored = float(factor.read().astype(np.float64).reshape(-1)[0])
            if stored != alpha:
                found = f"alpha {alpha!r} as {factor.dtype.name}, relative error {abs(stored / alpha - 1):.2g}"
                result.problems.append(Problem("LF320", target.name, found, severity="note"))
        return result


@dataclass(frozen=True, slots=True)
class StatedAlone:
    """No place at all: the user must say it."""

    def read(self, modules: Sequence[Module], bundle: Bundle, stated: StatedScale) -> ScalesRead:
        """Return what the user states; raises LF211 where nothing is stated."""
        if stated.multiplier is not None:
            scaling = Scaling(ScalingRule.MULTIPLIER, stated.multiplier)
        elif stated.alpha is not None:
            scaling = Scaling(ScalingRule.ALPHA_OVER_RANK, stated.alpha)
        else:
            raise refuse(
                "LF211", bundle.path, "a scheme that has no place for a scale", "the scale of the training run"
            )
        return ScalesRead({module.name: scaling if module.rank else UNIT for module in modules})

    def write(self, targets: Sequence[Target], remembered: Mapping[str, JsonValue]) -> ScalesWritten:
        """Return nothing: the targets must have been folded before."""
        return ScalesWritten()


def fold_rankless(targets: Sequence[Target]) -> tuple[list[Target], list[Problem]]:
    """Return targets without a rank, whose alpha would count for nothing, with a scale of 1, and what that cost."""
    moved = [target if target.rank or target.kind in BOUNDED else None for target in targets]
    rescaled = [rescale(target, UNIT) for target, same in zip(targets, moved, strict=True) if same is None]
    made = iter(rescaled)
    return [same or next(made).target for same in moved], [each.problem for each in rescaled if each.problem]


def _scale_by(alpha: float, rank: int) -> Scaling:
    return Scaling(ScalingRule.ALPHA_OVER_RANK, alpha) if alpha and rank else UNIT


def _alpha_of(target: Target) -> float | None:
    """Return the alpha that gives the target's scale when divided by its rank; None where there is nothing to say."""
    rule, value = target.scaling.rule, target.scaling.value
    if not target.rank:
        return None
    if rule is ScalingRule.ALPHA_OVER_RANK:
        return value
    return value * math.sqrt(target.rank) if rule is ScalingRule.ALPHA_OVER_SQRT_RANK else value * target.rank


def _make_alpha(name: str, alpha: float, form: Form) -> NewFactor:
    """Return an alpha in its remembered form where that holds the number, else in float32."""
    return make_number(name, ALPHA, alpha, form, FLOAT32)
