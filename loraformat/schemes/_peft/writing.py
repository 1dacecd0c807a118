"""A PEFT folder from an adapter: the configuration that says what the targets say, and keys as PEFT writes them.

The raw configuration that an adapter brings along is written as it was where it still says the same; otherwise the
fields that hold ranks, scales and names are made anew, and the rest stays.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from loraformat.adapter import Adapter, Factor, Scaling, Target
from loraformat.errors import LoraformatError
from loraformat.problems import Problem
from loraformat.schemes import NOT_STATED, WrittenBundle
from loraformat.schemes._lora_config import describe_lora
from loraformat.schemes._memory import COMPONENT_KEY, annotate
from loraformat.schemes._naming import find_denoiser, split_component
from loraformat.schemes._peft.column_orders import state_rank_major
from loraformat.schemes._peft.config import PeftConfig
from loraformat.schemes._peft.groups import REPLACE
from loraformat.schemes._peft.keys import PREFIX
from loraformat.schemes._peft.packed import list_parameters
from loraformat.schemes._peft.packing import Packed, compress_blocks, pack_experts
from loraformat.schemes._peft.patterns import fits_whole
from loraformat.strict_json import JsonValue

FACTORS_FILE: Final = "adapter_model.safetensors"
CONFIG_FILE: Final = "adapter_config.json"
_WHERE: Final = "the provenance"
_SLICES: Final = "enable_lora"
_SURE_OF_SIDES: Final = "0.19.1"
"""The first PEFT that reads packed parameters by the module, not by the place of their axes."""
_OWN_TYPES: Final = ("LORA", "TRAINABLE_TOKENS")
_FLAGS: Final = ("use_dora", "lora_bias", "fan_in_fan_out")
_KASA: Final = "kasa_config"
_DIAGONAL: Final = "lora_diag"
_REGULARISATION: Final[Mapping[str, JsonValue]] = {"beta": 1e-4, "gamma": 1e-3}
"""PEFT's defaults of KaSA's configuration, which only training reads; an empty one is none."""
_FOR_ALL: Final = {"lora_magnitude_vector": "use_dora", _DIAGONAL: _KASA}
"""Roles that all targets have or none, and the fields that say so."""
_TRAINED: Final = "base_layer.bias"
_OF_TARGETS: Final = "lora_only"
_OF_ALL: Final = "all"
"""PEFT's words for biases that were trained beside the factors, and for those of other modules too: of a module that is
listed as saved, PEFT wants every parameter."""
_EVERYWHERE: Final = "all-linear"
Targets: TypeAlias = Mapping[str, Target]
"""Targets by the path of their module in the model."""
_NONE: Final[Targets] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Folder:
    """What a folder of one `peft_type` holds.

    Attributes:
        tensors: key, without the prefix that all have, to tensor.
        config: the configuration.
        problems: what stands against it.
        shared: whole key to tensor of what all targets share.
    """

    tensors: Mapping[str, Factor]
    config: Mapping[str, JsonValue]
    problems: list[Problem]
    shared: Mapping[str, Factor] = field(default_factory=dict)


def write_folder(adapter: Adapter, fill: Callable[[Adapter, Targets], Folder], against: list[Problem]) -> WrittenBundle:
    """Return the bundle.

    Args:
        adapter: what to write.
        fill: makes the folder of its targets.
        against: targets that the scheme does not hold, which are left out.
    """
    refused = {problem.where for problem in against}
    problems = list(against)
    names = _name_modules(adapter, problems)
    folder = fill(adapter, {names[each.name]: each for each in adapter.targets if each.name not in refused})
    carried = {name: value for name, value in adapter.provenance.items() if name != "peft"}
    left_out = {name.removesuffix(f".{module}") for name, module in names.items() if name != module}
    if len(left_out) == 1:
        carried[COMPONENT_KEY] = left_out.pop()
    return WrittenBundle(
        tensors={f"{PREFIX}{key}": factor for key, factor in folder.tensors.items()} | dict(folder.shared),
        metadata={"format": "pt"} | annotate(carried),
        config=folder.config,
        file_name=FACTORS_FILE,
        other_files={"adapter_model.bin": "torch_zip"},
        config_name=CONFIG_FILE,
        problems=(*problems, *folder.problems),
    )


def place(targets: Targets, ends: Mapping[str, str]) -> tuple[dict[str, Factor], list[Problem]]:
    """Return the tensors of targets by key, and the roles for which `ends` has no end of a key."""
    tensors: dict[str, Factor] = {}
    problems: list[Problem] = []
    for name, target in targets.items():
        for role, factor in target.factors.items():
            end = ends.get(role, role if target.kind == REPLACE else None)
            if end is None:
                problems.append(Problem("LF312", target.name, f"{role} of shape {factor.shape}", "a role of PEFT"))
            else:
                tensors[f"{name}.{end}"] = factor
    return tensors, problems


def fill_lora(adapter: Adapter, targets: Targets, ends: Mapping[str, str]) -> Folder:
    """Return the folder of `peft_type` LORA; `ends` says how the key of a role ends."""
    raw = dict(find_raw(adapter))
    kept = raw if raw.get("peft_type") in _OWN_TYPES else {}
    compact = compress_blocks(targets, kept)
    packed = pack_experts(targets if compact is None else compact, kept)
    if compact is None:  # Written in full, which acts alike.
        kept = {name: value for name, value in kept.items() if name != "use_bdlora"}
    tensors, problems = place(packed.plain, ends)
    config = _write_config(adapter, kept, packed)
    config = state_rank_major(config) if packed.parameters else config
    against = [*_find_slices(adapter, kept), *find_uneven(packed.plain), *packed.problems, *problems]
    return Folder(tensors | packed.tensors, config, against)


def is_saved_alone(adapter: Adapter) -> bool:
    """Say whether an adapter only replaces weights and biases: as LORA, without a factor, PEFT does not load it."""
    kinds = {target.kind for target in adapter.targets}
    roles = {role for target in adapter.targets for role in target.factors}
    return kinds == {REPLACE} and roles <= {"weight", "bias"} and not find_raw(adapter)


def fill_saved(adapter: Adapter, targets: Targets) -> Folder:
    """Return the folder of `peft_type` LN_TUNING, which has trained copies of modules of whatever class."""
    tensors = {
        f"{name}.ln_tuning_layers.{role}": factor
        for name, target in targets.items()
        for role, factor in target.factors.items()
    }
    own: dict[str, JsonValue] = {"peft_type": "LN_TUNING", "target_modules": sorted(targets), "modules_to_save": None}
    return Folder(tensors, begin_config(adapter) | own, [])


def find_raw(adapter: Adapter) -> Mapping[str, Any]:
    """Return the configuration that an adapter came with; empty where it came without."""
    raw = adapter.provenance.get("peft")
    return raw if isinstance(raw, Mapping) else {}


def _find_slices(adapter: Adapter, kept: Mapping[str, Any]) -> list[Problem]:
    """Return a problem of slices of a fused weight, whose factors were taken apart."""
    if not kept.get(_SLICES):
        return []
    where = adapter.source or "the adapter"
    return [Problem("LF312", where, f"{_SLICES} of the source, whose tensors were taken apart", "plain factors")]


def find_uneven(targets: Targets) -> list[Problem]:
    """Return the targets without a factor that one field of the configuration gives all: PEFT would make one up."""
    factored = {name: target for name, target in targets.items() if target.rank}
    return [
        Problem("LF312", target.name, f"no {role}", f"one, as other targets have it: {field} is said of all")
        for role, field in _FOR_ALL.items()
        if any(role in target.factors for target in factored.values())
        for target in factored.values()
        if role not in target.factors
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


def begin_config(adapter: Adapter) -> dict[str, JsonValue]:
    """Return the fields that every configuration has."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base.name,
        "revision": adapter.base.revision,
        "inference_mode": True,
    }


def _write_config(adapter: Adapter, kept: Mapping[str, Any], packed: Packed) -> dict[str, JsonValue]:
    low_rank = {name: target for name, target in packed.plain.items() if target.rank}
    if kept and says_the_same(kept, low_rank, packed.parameters) and _says_tokens(kept, packed.plain):
        return dict(kept)
    tokens: dict[str, JsonValue] = {
        name: target.options["token_indices"]
        for name, target in packed.plain.items()
        if "token_indices" in target.options
    }
    whole = {name: target for name, target in packed.plain.items() if not target.rank and target.kind == REPLACE}
    biases = {name for name, target in whole.items() if set(target.factors) == {"bias"}}
    saved = sorted(whole.keys() - biases if low_rank else whole)
    extra: dict[str, JsonValue] = {"modules_to_save": saved or None}
    if low_rank and biases:
        extra["bias"] = _OF_ALL
    elif any(_TRAINED in target.factors for target in low_rank.values()):
        extra["bias"] = _OF_TARGETS
    if _has_diagonal(low_rank):
        extra[_KASA] = kept.get(_KASA) or dict(_REGULARISATION)
    elif kept.get(_KASA):
        extra[_KASA] = None
    if tokens:
        extra["trainable_token_indices"] = tokens
    ranked = low_rank | packed.parameters
    numbers = describe_lora(ranked) if ranked else {}
    if packed.parameters:
        names: dict[str, JsonValue] = {"target_modules": sorted(low_rank), "target_parameters": [*packed.parameters]}
        numbers |= names
        extra.setdefault("peft_version", kept.get("peft_version") or _SURE_OF_SIDES)
    own: dict[str, JsonValue] = {"peft_type": "LORA"}
    return begin_config(adapter) | dict(kept) | own | numbers | extra


def _has_diagonal(targets: Targets) -> bool:
    return any(_DIAGONAL in target.factors for target in targets.values())


def _says_tokens(fields: Mapping[str, Any], targets: Targets) -> bool:
    """Say whether a configuration has just the trained tokens that the targets have."""
    config = PeftConfig(fields, _WHERE, True)
    return all(config.tokens_of(name) == target.options.get("token_indices") for name, target in targets.items())


def says_the_same(fields: Mapping[str, Any], targets: Targets, parameters: Targets = _NONE) -> bool:
    """Say whether a configuration names every target and parameter, and gives it the rank and scale that it has."""
    config = PeftConfig(fields, _WHERE, True)
    every = {**targets, **parameters}
    wanted = describe_lora(every) if every else {}
    try:
        numbers = all(
            (config.rank_of(name, 0), _scaling(config, name)) == (target.rank, target.scaling)
            for name, target in every.items()
        )
        named = all(is_covered(config, name) for name in targets) and _names_parameters(config, parameters)
        named = named and bool(fields.get(_KASA)) == _has_diagonal(every)
        return numbers and named and all(config.flag(flag) == bool(wanted.get(flag)) for flag in _FLAGS if every)
    except LoraformatError:
        return False


def _names_parameters(config: PeftConfig, parameters: Targets) -> bool:
    """Say whether a configuration targets just these parameters of their modules."""
    own: dict[str, set[str]] = defaultdict(set)
    for name in parameters:
        module, _, parameter = name.rpartition(".")
        own[module].add(parameter)
    return all(set(list_parameters(module, config, len(names))) == names for module, names in own.items())


def is_covered(config: PeftConfig, name: str) -> bool:
    """Say whether PEFT adapts a module by `target_modules`; what only the base can say is taken for yes."""
    stated = config.fields.get("target_modules")
    if isinstance(stated, str) and stated != _EVERYWHERE:
        try:
            return fits_whole(stated, name)
        except ValueError:
            return False
    named = stated if isinstance(stated, list | tuple) else ()
    return not named or any(name == each or name.endswith(f".{each}") for each in named)


def _scaling(config: PeftConfig, name: str) -> Scaling:
    return config.scaling_of(name, NOT_STATED, Path(_WHERE))
