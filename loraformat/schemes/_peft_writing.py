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
_PACKING: Final = ("target_parameters", "use_bdlora", "enable_lora")
"""Options under which one stored tensor is several factors."""
_FLAGS: Final = ("use_dora", "lora_bias", "fan_in_fan_out")


def write_folder(adapter: Adapter, keys: Mapping[str, str], problems: list[Problem]) -> WrittenBundle:
    """Return the bundle.

    Args:
        adapter: what to write, whose targets the scheme holds.
        keys: role to the end of its key.
        problems: what was found before; more are added.
    """
    problems += _find_packed(adapter)
    names = _name_modules(adapter, problems)
    tensors: dict[str, Factor] = {}
    for target in adapter.targets:
        for role, factor in target.factors.items():
            end = keys.get(role)
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
        other_files={"adapter_model.bin": "torch_zip"},
        config_name=CONFIG_FILE,
        problems=tuple(problems),
    )


def _find_packed(adapter: Adapter) -> list[Problem]:
    """Return the options of the source under which its tensors were not one for each target: they stay apart."""
    raw = adapter.provenance.get("peft")
    fields = raw if isinstance(raw, Mapping) else {}
    where = adapter.source or "the adapter"
    kind = fields.get("peft_type", "LORA")
    if kind != "LORA":
        return [Problem("LF312", where, f"peft_type {kind!r}", "a folder of LORA")]
    return [
        Problem("LF312", where, f"{field} of the source, whose tensors were taken apart", "plain factors")
        for field in _PACKING
        if fields.get(field)
    ]


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
    tokens: dict[str, JsonValue] = {
        name: target.options["token_indices"] for name, target in targets.items() if "token_indices" in target.options
    }
    saved = sorted(name for name, target in targets.items() if not target.rank and target.kind == "replace")
    extra: dict[str, JsonValue] = {"modules_to_save": saved or None}
    if tokens:
        extra["trainable_token_indices"] = tokens
    return fresh | kept | (describe_lora(low_rank) if low_rank else {}) | extra


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
