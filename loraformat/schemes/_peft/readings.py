"""What single types of PEFT's say in fields of their own: functions of configuration, target and factors.

Names of fields, their defaults and what they do are those of PEFT 0.21.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from loraformat.derived import derive
from loraformat.errors import refuse
from loraformat.problems import Problem
from loraformat.schemes._peft.config import PeftConfig
from loraformat.schemes._peft.patterns import fits_whole
from loraformat.schemes._peft.type import Factors, read_number
from loraformat.strict_json import JsonValue

_EXACT: Final = 1 << 24
"""Below it every whole number is a float32."""


def see_feedforward(config: PeftConfig, target: str, factors: Factors) -> Mapping[str, JsonValue]:
    """Say whether (IA)³ multiplies the inputs of a module, as PEFT chooses."""
    modules = config.fields.get("feedforward_modules")
    if isinstance(modules, str):
        try:
            return {"is_feedforward": fits_whole(modules, target)}
        except ValueError as error:
            found = f"the pattern {modules!r:.80}: {error}"
            where = f"{config.where}: feedforward_modules"
            raise refuse("LF213", where, found, "a simple regular expression") from error
    named = modules if isinstance(modules, Sequence) else ()
    return {"is_feedforward": any(target.endswith(str(name)) for name in named)}  # PEFT looks at no dot before it.


def read_oft_generation(config: PeftConfig, target: str, factors: Factors) -> Mapping[str, JsonValue]:
    """Return what the version of PEFT says of the Neumann series; without one it is of the newest kind."""
    version = str(config.fields.get("peft_version") or "")
    return {"last_neumann_coefficient": 2} if version.startswith(("0.16", "0.17")) else {}


def count_lokr_axes(config: PeftConfig, target: str, factors: Factors) -> Mapping[str, JsonValue]:
    """Say where a w2 of three axes has the kernel's."""
    whole = factors.get("lokr_w2")
    return {"kron_axes": "leading"} if whole is not None and len(whole.shape) == 3 else {}


def unscale_lokr(target: Target, config: PeftConfig) -> Target:
    """Return a target at the scale at which PEFT before 0.14 trained it: it left alpha and rank out."""
    return replace(target, scaling=Scaling(ScalingRule.MULTIPLIER, 1.0)) if _is_unscaled(config) else target


def remark_lokr(config: PeftConfig) -> list[Problem]:
    """Return a warning where the scale that is stated is not the one of the training run."""
    if not _is_unscaled(config) or config.fields.get("alpha") == config.fields.get("r"):
        return []
    found = "a scale of 1, as PEFT 0.6 to 0.13 trained it; newer ones load it with alpha / r"
    return [Problem("LF247", f"{config.where}: alpha", found, "alpha = r", severity="warning")]


def _is_unscaled(config: PeftConfig) -> bool:
    """Say whether PEFT 0.6 to 0.13 wrote a configuration: it has all fields of that time, and none of 0.14."""
    return "rank_dropout" in config.fields and not {"exclude_modules", "peft_version"} & set(config.fields)


def scale_adalora(config: PeftConfig, factors: Factors) -> float:
    """Return alpha over the rank that training began with, as PEFT has it; an alpha of 0 is that rank."""
    first_rank = read_number(config, "init_r", config.fields.get("init_r", 12))
    alpha = read_number(config, "lora_alpha", config.fields.get("lora_alpha", 8))
    return (alpha if alpha > 0 else first_rank) / (first_rank + 1e-5)


def halve_rank(target: Target, config: PeftConfig) -> Target:
    """Return a target whose rank, where no factor shows it, is half of the numbers in its middle."""
    middle = target.factors.get("pvera_lambda_d")
    return target if target.rank or middle is None else replace(target, rank=middle.elements // 2)


def drop_empty(target: Target, config: PeftConfig) -> Target | Problem:
    """Return a note in place of a target of rank 0."""
    if target.rank:
        return target
    return Problem("LF233", target.name, "a rank of 0: training took it all away", severity="note")


def scale_gralora(config: PeftConfig, factors: Factors) -> float:
    """Return alpha over the sum of both ranks."""
    alpha = read_number(config, "alpha", config.fields.get("alpha", 64))
    own, general = factors.get("gralora_A"), factors.get("gralora_A_general.weight")
    ranks = (own.shape[-1] if own is not None else 0) + (general.shape[0] if general is not None else 0)
    return alpha / ranks if ranks else alpha


def scale_deft(config: PeftConfig, factors: Factors) -> float:
    """Return alpha over the rank, which is never above the number of outputs; 1 without an alpha."""
    alpha, given = config.fields.get("alpha"), factors.get("deft_P")
    if not alpha or given is None or len(given.shape) != 2 or not given.shape[1]:
        return 1.0
    return read_number(config, "alpha", alpha) / given.shape[1]


def read_miss_variant(config: PeftConfig, target: str, factors: Factors) -> Mapping[str, JsonValue]:
    """Say whether a block is repeated along the outputs."""
    return {"is_repeated_along_outputs": True} if config.fields.get("init_weights") == "mini" else {}


def count_indices(target: Target, config: PeftConfig) -> Target | Problem:
    """Return SHiRA's places as whole numbers: on Windows PEFT saves them as float32."""
    places = target.factors.get("shira_indices")
    if places is None or places.dtype.name not in ("float32", "float64"):
        return target
    values = places.read()
    if not np.array_equal(values, np.rint(values)) or not (np.abs(values) < _EXACT).all():
        return Problem("LF210", f"{target.name}: shira_indices", f"{places.dtype.name}, not whole", "whole numbers")
    from loraformat.operations import WholeNumbers  # here: no other adapter needs an operation

    return replace(target, factors={**target.factors, "shira_indices": derive(WholeNumbers(), places)})


def choose_miss(target: Target, config: PeftConfig) -> Target:
    """Return the target as the variant that it is; of "bat" the rank is the side of its squares."""
    if config.fields.get("init_weights") != "bat":
        return target
    return replace(target, kind="miss_bat", rank=target.factors["miss_block"].shape[-1])


def scale_supra(config: PeftConfig, target: str, factors: Factors) -> Mapping[str, JsonValue]:
    """Return the scale of the LoRA beside the changed numbers."""
    if not config.fields.get("r"):
        return {}
    rank = read_number(config, "r", config.fields["r"])
    return {"lora_scale": read_number(config, "lora_alpha", config.fields.get("lora_alpha", 2 * rank)) / rank}


def see_convolution(target: Target, config: PeftConfig) -> Target:
    """Return a target with the slot that the shape of BOFT's scale tells: (1, out) is that of a convolution."""
    scale = target.factors.get("boft_s")
    flat = scale is not None and len(scale.shape) == 2 and scale.shape[0] == 1
    return replace(target, slot=SlotKind.CONV) if flat else target


def complete_loha(targets: Mapping[str, Target], config: dict[str, JsonValue]) -> Sequence[Problem]:
    """Add whether there are cores; PEFT can hold every other thing that the fields say."""
    config["use_effective_conv2d"] = any("hada_t1" in target.factors for target in targets.values())
    return ()
