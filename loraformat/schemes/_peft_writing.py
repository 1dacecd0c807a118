"""A PEFT folder from an adapter: the configuration that says what the targets say, and keys as PEFT writes them.

The raw configuration that an adapter brings along is written as it was where it still says the same; otherwise the
fields that hold ranks, scales and names are made anew, and the rest stays.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loraformat.adapter import Adapter, Factor, Scaling, Target
from loraformat.errors import LoraformatError
from loraformat.problems import Problem
from loraformat.schemes import NOT_STATED, WrittenBundle
from loraformat.schemes._lora_config import describe_lora
from loraformat.schemes._memory import COMPONENT_KEY, annotate
from loraformat.schemes._naming import find_denoiser, split_component
from loraformat.schemes._peft_config import PeftConfig
from loraformat.strict_json import JsonValue

FACTORS_FILE: Final = "adapter_model.safetensors"
CONFIG_FILE: Final = "adapter_config.json"
_PREFIX: Final = "base_model.model."
_WHERE: Final = "the provenance"
_FLAGS: Final = ("use_dora", "lora_bias", "fan_in_fan_out")


def write_folder(adapter: Adapter, keys: Mapping[str, str], problems: list[Problem]) -> WrittenBundle:
    """Return the bundle.

    Args:
        adapter: what to write, whose targets the scheme holds.
        keys: role to the end of its key.
        problems: what was found before; more are added.
    """
    names = _name_modules(adapter, problems)
    tensors: dict[str, Factor] = {}
    for target in adapter.targets:
        # A bias or weight beside factors is that of the layer that PEFT has wrapped.
        inside = "base_layer." if "lora" in target.kind and "replace" in target.kind else ""
        for role, factor in target.factors.items():
            end = f"{inside}{role}" if role in ("weight", "bias") else keys.get(role)
            if end is None:
                problems.append(Problem("LF312", target.name, f"{role} of shape {factor.shape}", "a role of PEFT"))
            else:
                tensors[f"{_PREFIX}{names[target.name]}.{end}"] = factor
    carried = {name: value for name, value in adapter.provenance.items() if name != "peft"}
    left_out = {name.removesuffix(f".{module}") for name, module in names.items() if name != module}
    if len(left_out) == 1:
        carried[COMPONENT_KEY] = left_out.pop()
    return WrittenBundle(
        tensors=tensors,
        metadata={"format": "pt"} | annotate(carried),
        config=_write_config(adapter, {names[target.name]: target for target in adapter.targets}),
        file_name=FACTORS_FILE,
        config_name=CONFIG_FILE,
        problems=tuple(problems),
    )


def _name_modules(adapter: Adapter, problems: list[Problem]) -> dict[str, str]:
    """Return target to module path: a folder of PEFT is about one model, so that a pipeline's component is left out."""
    targets = [target.name for target in adapter.targets]
    parts = {split_component(target)[0] for target in targets}
    if not find_denoiser(targets) and not any(part.startswith("text_encoder") for part in parts):
        return {target: target for target in targets}
    if len(parts) > 1:
        found = f"targets in {', '.join(sorted(part or 'no component' for part in parts))}"
        problems.append(Problem("LF312", adapter.source or "the adapter", found, "one model for a folder of PEFT"))
    return {target: split_component(target)[1] for target in targets}


def _write_config(adapter: Adapter, targets: Mapping[str, Target]) -> dict[str, JsonValue]:
    raw = adapter.provenance.get("peft")
    kept: dict[str, Any] = dict(raw) if isinstance(raw, Mapping) else {}
    low_rank = {name: target for name, target in targets.items() if target.rank}
    if kept and says_the_same(kept, low_rank):
        return kept
    fresh: dict[str, JsonValue] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base.name,
        "revision": adapter.base.revision,
        "inference_mode": True,
    }
    saved = sorted(name for name, target in targets.items() if not target.rank)
    saved_field: dict[str, JsonValue] = {"modules_to_save": saved or None}
    return fresh | kept | (describe_lora(low_rank) if low_rank else {}) | saved_field


def says_the_same(fields: Mapping[str, Any], targets: Mapping[str, Target]) -> bool:
    """Say whether a configuration gives every target the rank and scale that it has."""
    config = PeftConfig(fields, _WHERE, True)
    wanted = describe_lora(targets) if targets else {}
    try:
        numbers = all(
            (config.rank_of(name, 0), _scaling(config, name)) == (target.rank, target.scaling)
            for name, target in targets.items()
        )
        return numbers and all(config.flag(flag) == bool(wanted.get(flag)) for flag in _FLAGS if targets)
    except LoraformatError:
        return False


def _scaling(config: PeftConfig, name: str) -> Scaling:
    return config.scaling_of(name, NOT_STATED, Path(_WHERE))
