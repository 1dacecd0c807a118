"""PEFT: `adapter_config.json` beside `adapter_model.safetensors`, or that file alone when the scale is given.

Keys are `base_model.model.<target>.<role>`; scale, ranks and everything that changes the meaning of a tensor stand in
the configuration (huggingface/peft, LoraConfig as of 0.21).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from loraformat.adapter import Adapter, BaseBinding, Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.base_facts import BaseFacts
from loraformat.errors import LoraformatError, refuse
from loraformat.manifest import MANIFEST_KEY
from loraformat.problems import Problem
from loraformat.schemes import ALL_SLOTS, Bundle, Holds, StatedScale, WrittenBundle
from loraformat.schemes._checking import ConfigReading
from loraformat.schemes._engine import check_holds
from loraformat.schemes._memory import recall
from loraformat.schemes._peft_checks import StoredModule, announced_kinds, check_numbers, find_lost, find_oddities
from loraformat.schemes._peft_config import PeftConfig, read_config
from loraformat.schemes._peft_writing import write_folder
from loraformat.schemes._table import Name, NameTable, Row

_PREFIX: Final = "base_model.model."
_DATA_PARALLEL: Final = "module."
"""Wraps the whole model; further in, it may be a module's own name."""
_WRAPPERS: Final = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Wrap any module."""
_PIPELINE: Final = (
    *("diffusion_model.", "text_encoders.", "unet.", "text_encoder.", "text_encoder_2.", "prior.", "clip_l.", "t5."),
    *("transformer.transformer_blocks.", "transformer.single_transformer_blocks.", "transformer.blocks."),
    *("transformer.base_model.", "transformer.double_blocks.", "transformer.single_blocks.", "transformer.layers."),
    *("double_blocks.", "single_blocks.", "joint_blocks.", "transformer_blocks.", "single_transformer_blocks."),
    *("down_blocks.", "up_blocks.", "mid_block.", "input_blocks.", "middle_block.", "output_blocks.", "final_layer."),
    *("lora_unet_", "lora_te", "lycoris_"),
)
"""How keys of diffusion pipelines begin, which have schemes of their own."""
_OTHERS: Final = re.compile(
    r".*\.lora_[ab](?:\.weight)?$|.*\.loras\.[^.]+\.|layers\.\d+\.(?:attention|feed_forward)\.|w_[ab]_\d{3,}$"
    r"|.*\.(?:experts\.w[123]|unembed_tokens)\.lora_[AB]\."
)
"""Keys of schemes that share PEFT's file names or endings: torchtune, mlx-lm, AdapterHub, mistral, SAMed, Tinker."""
_DUMPS: Final = ("base_model.model.double_blocks.", "base_model.model.single_blocks.")
"""How fal's dumps of BFL's model begin, where no configuration is beside them."""

TABLE: Final = NameTable(
    [
        Row("lora_A.weight", "lora", "lora_A.weight"),
        Row("lora_B.weight", "lora", "lora_B.weight"),
        Row("lora_embedding_A", "lora", "lora_embedding_A"),
        Row("lora_embedding_B", "lora", "lora_embedding_B"),
        Row("lora_A.{adapter}.weight", "lora", "lora_A.weight"),
        Row("lora_B.{adapter}.weight", "lora", "lora_B.weight"),
        Row("lora_embedding_A.{adapter}", "lora", "lora_embedding_A"),
        Row("lora_embedding_B.{adapter}", "lora", "lora_embedding_B"),
        Row("lora_B.bias", "lora with bias", "lora_B.bias"),
        Row("lora_B.{adapter}.bias", "lora with bias", "lora_B.bias"),
        Row("lora_magnitude_vector", "dora", "lora_magnitude_vector"),
        Row("lora_magnitude_vector.{adapter}.weight", "dora", "lora_magnitude_vector"),
        Row("modules_to_save.{adapter}.weight", "replace", "weight"),
        Row("modules_to_save.{adapter}.bias", "replace", "bias"),
        Row("base_layer.weight", "replace", "weight"),
        Row("base_layer.bias", "replace", "bias"),
        Row("token_adapter.trainable_tokens_delta", "trained tokens", "trainable_tokens_delta"),
        Row("trainable_tokens_delta", "trained tokens", "trainable_tokens_delta"),
        Row("weight", "replace", "weight"),
        Row("bias", "replace", "bias"),
    ]
)


@dataclass(frozen=True, slots=True)
class _Group:
    """The tensors of one target, and the kinds that they speak for."""

    factors: dict[str, Factor]
    kinds: set[str]


class Peft:
    """The scheme `peft`."""

    name = "peft"
    title = "PEFT: adapter_config.json and adapter_model.safetensors"
    names = "peft"
    holds = Holds(kinds=frozenset({row.kind for row in TABLE.rows} | {"lora and replace"}), slots=ALL_SLOTS)

    def detect(self, bundle: Bundle) -> str | None:
        """Recognise `peft_type` in the configuration, or PEFT's keys in a file without a configuration."""
        if MANIFEST_KEY in bundle.metadata:  # Our own file, which PEFT can read beside a configuration.
            return None
        if any(key.startswith(_PIPELINE) for key in bundle.tensors):  # diffusion-pipe writes PEFT's configuration too.
            return None
        if any(map(_OTHERS.match, bundle.tensors)) or "adapter_version" in bundle.metadata:  # ONNX Runtime's container.
            return None
        if bundle.config is not None and "peft_type" in bundle.config:
            return "adapter_config.json with peft_type"
        if "lora_adapter_metadata" in bundle.metadata or bundle.config is not None:
            return None
        if any(key.startswith(_DUMPS) for key in bundle.tensors):
            return None
        marked = [key for key in bundle.tensors if ".lora_A." in key or key.endswith(".lora_embedding_A")]
        return f"keys such as {marked[0]}" if marked else None

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; what this version cannot merge becomes a problem of it."""
        config = read_config(bundle.config, bundle.path)
        config.check_type(bundle)
        groups, problems = _group(bundle)
        targets = tuple(_read_target(name, group, config, stated, bundle) for name, group in sorted(groups.items()))
        lost = find_lost(config, _summarise(groups))
        if not targets:
            raise refuse("LF212", bundle.path, f"{len(bundle.tensors)} tensors, none of a target", "LoRA factors")
        return Adapter(
            targets=targets,
            base=BaseBinding(config.text("base_model_name_or_path"), config.text("revision")),
            scheme=self.name,
            source=str(bundle.path),
            provenance=recall(bundle.metadata) | ({"peft": dict(bundle.config)} if bundle.config else {}),
            problems=(*problems, *config.problems(), *_find_lost_magnitudes(groups, config), *lost),
        )

    def write(self, adapter: Adapter, facts: BaseFacts) -> WrittenBundle:
        """Return the adapter as a folder; its own configuration where that still says the same."""
        keys = {row.role: row.pattern for row in reversed(TABLE.rows) if "{" not in row.pattern}
        return write_folder(adapter, keys, check_holds(self.name, self.holds, adapter))

    def check(self, bundle: Bundle) -> list[Problem]:
        """Return what is odd about configuration and tensors together; nothing of it stands against reading them."""
        groups, _ = _group(bundle)
        return find_oddities(read_config(bundle.config, bundle.path), _summarise(groups))

    def check_config(self, bundle: Bundle) -> ConfigReading:
        """Return what a configuration without tensors says."""
        config = read_config(bundle.config, bundle.path)
        try:
            config.check_type(bundle)
        except LoraformatError as error:
            return ConfigReading(_describe_config(config), {}, error.problems)
        problems = (*find_oddities(config, {}), *check_numbers(config), *config.problems())
        return ConfigReading(_describe_config(config), announced_kinds(config), problems)


def _group(bundle: Bundle) -> tuple[dict[str, _Group], list[Problem]]:
    """Return the tensors by target, wrapper prefixes removed, and problems of unknown or colliding keys."""
    groups: dict[str, _Group] = {}
    stripped: set[str] = set()
    problems: list[Problem] = []
    for key, tensor in bundle.tensors.items():
        name = _read_key(key, stripped)
        if name is None:
            problems.append(Problem("LF202", key, f"a tensor of shape {tensor.shape}", "a role that PEFT has"))
            continue
        group = groups.setdefault(name.target, _Group({}, set()))
        if name.row.role in group.factors:
            problems.append(Problem("LF302", key, f"a second {name.row.role} for {name.target}", "one"))
            continue
        group.factors[name.row.role] = tensor
        group.kinds.add(name.row.kind)
    if stripped:
        found = f"the prefixes {', '.join(sorted(stripped))} in its names, left out"
        problems.append(Problem("LF304", str(bundle.path), found, severity="note"))
    return groups, problems


def _summarise(groups: Mapping[str, _Group]) -> dict[str, StoredModule]:
    return {name: StoredModule(group.kinds, group.factors) for name, group in groups.items()}


def _describe_config(config: PeftConfig) -> str:
    """Return what a configuration announces, in a few words."""
    shown = ("peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path")
    values = {field: config.fields[field] for field in shown if config.fields.get(field) is not None}
    return ", ".join(f"{field} {value!r:.60}" for field, value in values.items())


def _read_key(key: str, stripped: set[str]) -> Name | None:
    for wrapper in _WRAPPERS:
        while f".{wrapper}" in f".{key}":
            key = f".{key}".replace(f".{wrapper}", ".", 1)[1:]
            stripped.add(wrapper)
    for prefix in ("", _PREFIX):
        key = key.removeprefix(prefix)
        while key.startswith(_DATA_PARALLEL):
            key = key.removeprefix(_DATA_PARALLEL)
            stripped.add(_DATA_PARALLEL)
    return TABLE.read(key)


def _find_lost_magnitudes(groups: Mapping[str, _Group], config: PeftConfig) -> list[Problem]:
    """Return the targets of a DoRA adapter that would pass for LoRA, since their magnitudes were not saved."""
    lost = sorted(name for name, group in groups.items() if "lora" in group.kinds and "dora" not in group.kinds)
    if not lost or not config.flag("use_dora"):
        return []
    return [Problem("LF201", name, "use_dora, but no lora_magnitude_vector", "a magnitude vector") for name in lost]


def _read_target(name: str, group: _Group, config: PeftConfig, stated: StatedScale, bundle: Bundle) -> Target:
    kind = _choose_kind(group.kinds)
    slot = _slot_of(group.factors, config) if kind != "replace" else SlotKind.PARAMETER
    if "lora" not in group.kinds:
        return Target(name, kind, slot, group.factors, 0, Scaling(ScalingRule.MULTIPLIER, 1.0))
    down = group.factors.get("lora_A.weight") or group.factors.get("lora_embedding_A")
    rank = config.rank_of(name, down.shape[0] if down is not None and down.shape else 0)
    return Target(name, kind, slot, group.factors, rank, config.scaling_of(name, stated, bundle.path))


def _choose_kind(kinds: set[str]) -> str:
    """Return the one kind that a target's tensors make; several that do not belong together keep all names."""
    special = sorted(kinds if "replace" in kinds else kinds - {"lora"})
    return " and ".join(special) if special else "lora"


def _slot_of(factors: Mapping[str, Any], config: PeftConfig) -> SlotKind:
    factor = factors.get("lora_A.weight") or factors.get("lora_B.weight")
    if factor is None:
        return SlotKind.EMBEDDING
    if len(factor.shape) > 2:
        return SlotKind.CONV
    return SlotKind.LINEAR_TRANSPOSED if config.flag("fan_in_fan_out") else SlotKind.LINEAR


SCHEME: Final = Peft()
