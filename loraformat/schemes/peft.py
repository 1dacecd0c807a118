"""PEFT: `adapter_config.json` beside `adapter_model.safetensors`, or that file alone when the scale is given.

Keys are `base_model.model.<target>.<role>`; scale, ranks and everything that changes the meaning of a tensor stand in
the configuration (huggingface/peft, LoraConfig as of 0.21).
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from loraformat.adapter import Adapter, BaseBinding, Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.base_facts import BaseFacts
from loraformat.derived import find_origins
from loraformat.errors import LoraformatError, error_for, refuse
from loraformat.manifest import MANIFEST_KEY
from loraformat.problems import Problem
from loraformat.schemes import ALL_SLOTS, Bundle, ConfigReading, Holds, StatedScale, WrittenBundle
from loraformat.schemes._known_names import find_model, find_original
from loraformat.schemes._memory import recall
from loraformat.schemes._peft.checks import (
    StoredModule,
    announced_kinds,
    check_numbers,
    find_lost,
    find_lost_biases,
    find_oddities,
)
from loraformat.schemes._peft.config import PeftConfig, is_lora, read_config
from loraformat.schemes._peft.groups import BASE, COPY, REPLACE, SHARED, TOKENS, Group
from loraformat.schemes._peft.keys import PREFIX, choose_adapter, group_tensors, name_adapters
from loraformat.schemes._peft.targets import TargetReader
from loraformat.schemes._peft.type import PeftType, spread_shared
from loraformat.schemes._peft.types import TYPES
from loraformat.schemes._table import NameTable, Row

_LEFT_OUT: Final = "LF226"
"""Says that tensors of the training run alone were left out."""
_PIPELINE: Final = (
    *("diffusion_model.", "text_encoders.", "unet.", "text_encoder.", "text_encoder_2.", "prior.", "clip_l.", "t5."),
    *("transformer.transformer_blocks.", "transformer.single_transformer_blocks.", "transformer.blocks."),
    *("transformer.base_model.", "transformer.double_blocks.", "transformer.single_blocks.", "transformer.layers."),
    *(
        "transformer.double_stream_blocks.",
        "transformer.single_stream_blocks.",
        "transformer.joint_transformer_blocks.",
    ),
    *("transformer.visual_transformer_blocks.", "transformer.text_transformer_blocks.", "transformer_2."),
    *("double_blocks.", "single_blocks.", "joint_blocks.", "transformer_blocks.", "single_transformer_blocks."),
    *("down_blocks.", "up_blocks.", "mid_block.", "input_blocks.", "middle_block.", "output_blocks.", "final_layer."),
    *("lora_unet_", "lora_te", "lycoris_", "oft_unet_", "conditional_transformer.", "pipe.dit."),
    "text_embedding_projection.",
)
"""How keys of diffusion pipelines begin, which have schemes of their own."""
_OTHERS: Final = re.compile(
    r".*\.lora_[ab](?:\.weight)?$|.*\.loras\.[^.]+\.|layers\.\d+\.(?:attention|feed_forward)\.|w_[ab]_\d{3,}$"
    r"|.*\.(?:experts\.w[123]|unembed_tokens)\.lora_[AB]\.|.*\.dora_scale$"
)
"""Keys of schemes that share PEFT's file names or endings: torchtune, mlx-lm, AdapterHub, mistral, SAMed, Tinker, and
of LyCORIS."""

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
        Row("lora_B.bias", "lora", "lora_B.bias"),
        Row("lora_B.{adapter}.bias", "lora", "lora_B.bias"),
        Row("lora_magnitude_vector", "dora", "lora_magnitude_vector"),
        Row("lora_magnitude_vector.{adapter}.weight", "dora", "lora_magnitude_vector"),
        Row("lora_diag", "kasa", "lora_diag"),
        Row("lora_diag.{adapter}", "kasa", "lora_diag"),
        Row("modules_to_save.{adapter}.weight", REPLACE, "weight"),
        Row("modules_to_save.{adapter}.bias", REPLACE, "bias"),
        Row("modules_to_save.weight", COPY, "modules_to_save.weight"),
        Row("modules_to_save.bias", COPY, "modules_to_save.bias"),
        Row("token_adapter.base_layer.weight", BASE, "base_layer.weight"),
        Row("base_layer.weight", BASE, "base_layer.weight"),
        Row("base_layer.bias", BASE, "base_layer.bias"),
        Row("token_adapter.trainable_tokens_delta", TOKENS, "trainable_tokens_delta"),
        Row("token_adapter.trainable_tokens_delta.{adapter}", TOKENS, "trainable_tokens_delta"),
        Row("trainable_tokens_delta", TOKENS, "trainable_tokens_delta"),
        Row("trainable_tokens_delta.{adapter}", TOKENS, "trainable_tokens_delta"),
        Row("weight", REPLACE, "weight"),
        Row("bias", REPLACE, "bias"),
    ]
)

_ENDS: Final = {row.role: row.pattern for row in reversed(TABLE.rows) if "{" not in row.pattern}
_OTHER_KINDS: Final = frozenset({row.kind for row in TYPES.values()} | {"miss_bat"}) - {REPLACE}
"""Kinds of other types than LORA."""


class Peft:
    """The scheme `peft`."""

    name = "peft"
    title = "PEFT: adapter_config.json and adapter_model.safetensors"
    names = "peft"
    holds = Holds(
        kinds=frozenset({row.kind for row in TABLE.rows} - {BASE, COPY} | {"lora and replace"} | _OTHER_KINDS),
        slots=ALL_SLOTS,
    )

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
        if bundle.config is not None and is_lora(bundle.config) and any(".lora_A." in key for key in bundle.tensors):
            return "adapter_config.json with r, lora_alpha and target_modules"
        if "lora_adapter_metadata" in bundle.metadata or bundle.config is not None:
            return None
        if find_model(bundle) or find_original(bundle, PREFIX) or find_model(bundle, "transformer."):
            return None
        marked = [key for key in bundle.tensors if ".lora_A." in key or key.endswith(".lora_embedding_A")]
        return f"keys such as {marked[0]}" if marked else None

    def is_named(self, bundle: Bundle) -> bool:
        """Say whether the configuration has `peft_type` and every key PEFT's prefix."""
        return "peft_type" in (bundle.config or {}) and all(key.startswith(PREFIX) for key in bundle.tensors)

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; what this version cannot merge becomes a problem of it."""
        config = read_config(bundle.config, bundle.path)
        other = TYPES.get(config.check_type(bundle, TYPES))
        chosen, notes = choose_adapter(bundle, other.table if other else TABLE)
        read = self._read_lora(chosen, config, stated) if other is None else self._read_other(chosen, config, other)
        left = tuple(each for key, each in bundle.tensors.items() if key not in chosen.tensors)
        return replace(read, problems=(*notes, *read.problems), absorbed=(*read.absorbed, *left))

    def list_adapters(self, bundle: Bundle) -> list[str]:
        """Return the names of adapters that stand in keys."""
        config = read_config(bundle.config, bundle.path)
        other = TYPES.get(str(config.fields.get("peft_type")))
        return sorted(set(name_adapters(bundle, other.table if other else TABLE).values()))

    def _read_lora(self, bundle: Bundle, config: PeftConfig, stated: StatedScale) -> Adapter:
        """Return an adapter of LORA or TRAINABLE_TOKENS."""
        groups, problems = group_tensors(bundle, config, TABLE)
        targets, found = TargetReader(groups, config, stated, bundle).read_all()
        stored = _summarise(groups)
        lost = [*find_lost(config, stored), *find_lost_biases(config, stored)]
        if not targets and not found:
            raise refuse("LF212", bundle.path, f"{len(bundle.tensors)} tensors, none of a target", "LoRA factors")
        used = {id(origin) for target in targets for each in target.factors.values() for origin in find_origins(each)}
        left_out = any(problem.code == _LEFT_OUT for problem in problems)
        return Adapter(
            targets=tuple(sorted(targets, key=lambda target: target.name)),
            base=BaseBinding(config.text("base_model_name_or_path"), config.text("revision"), config.layers()),
            scheme=self.name,
            source=str(bundle.path),
            provenance=recall(bundle.metadata) | ({"peft": dict(bundle.config)} if bundle.config else {}),
            problems=(*problems, *config.problems(), *found, *_find_lost_magnitudes(groups, config), *lost),
            absorbed=tuple(each for each in bundle.tensors.values() if left_out and id(each) not in used),
        )

    def write(self, adapter: Adapter, facts: BaseFacts) -> WrittenBundle:
        """Return the adapter as a folder; its own configuration where that still says the same."""
        # here: what only writes is much, and most adapters are only read
        from loraformat.schemes._engine import check_holds
        from loraformat.schemes._peft.other import fill_other, find_type
        from loraformat.schemes._peft.writing import fill_lora, fill_saved, is_saved_alone, write_folder

        against = check_holds(self.name, self.holds, adapter)
        if is_saved_alone(adapter):
            return write_folder(adapter, fill_saved, against)
        other = find_type(adapter, TYPES)
        if other is not None:
            return write_folder(adapter, lambda of, targets: fill_other(of, targets, other, TYPES[other]), against)
        expected = "one peft_type for the folder, and the configuration of the training run"
        against += [
            Problem("LF312", target.name, f"the kind {target.kind!r}", expected)
            for target in adapter.targets
            if target.kind in _OTHER_KINDS
        ]
        return write_folder(adapter, lambda of, targets: fill_lora(of, targets, _ENDS), against)

    def _read_other(self, bundle: Bundle, config: PeftConfig, other: PeftType) -> Adapter:
        """Return an adapter of another type than LORA."""
        arranged = other.arrange(bundle.tensors, config)
        if isinstance(arranged, Problem):
            raise error_for([arranged])
        groups, problems = group_tensors(replace(bundle, tensors=arranged), config, other.table)
        factors = spread_shared({name: group.factors for name, group in groups.items()})
        saved = {name for name in factors if groups[name].kinds == {REPLACE}}
        found = [
            _read_saved(name, groups[name].factors)
            if name in saved
            else other.read_target(name, factors[name], config, len(factors) - len(saved))
            for name in sorted(factors)
        ]
        targets = [each for each in found if isinstance(each, Target)]
        left = [each for each in found if isinstance(each, Problem)]
        if other.alpha:
            left += config.note_older(
                [(each.name, each.rank) for each in targets if each.name not in saved], other.alpha
            )
        if not targets:
            nothing = Problem("LF212", str(bundle.path), f"{len(bundle.tensors)} tensors, none of a target", "a target")
            against = [*other.find_obstacles(config), *left]
            raise error_for([each for each in against if each.severity == "error"] or [nothing])
        return Adapter(
            targets=tuple(targets),
            base=BaseBinding(config.text("base_model_name_or_path"), config.text("revision")),
            scheme=self.name,
            source=str(bundle.path),
            provenance=recall(bundle.metadata) | ({"peft": dict(bundle.config)} if bundle.config else {}),
            problems=(*problems, *other.find_obstacles(config), *left),
        )

    def check(self, bundle: Bundle) -> list[Problem]:
        """Return what is odd about configuration and tensors together; nothing of it stands against reading them."""
        config = read_config(bundle.config, bundle.path)
        other = TYPES.get(str(config.fields.get("peft_type")))
        bundle, _ = choose_adapter(bundle, other.table if other else TABLE)
        own = {key: tensor for key, tensor in bundle.tensors.items() if key not in bundle.beside}
        groups, _ = group_tensors(replace(bundle, tensors=own), config, other.table if other else TABLE)
        groups.pop(SHARED, None)
        return find_oddities(config, _summarise(groups))

    def check_config(self, bundle: Bundle) -> ConfigReading:
        """Return what a configuration without tensors says."""
        config = read_config(bundle.config, bundle.path)
        try:
            other = TYPES.get(config.check_type(bundle, TYPES))
        except LoraformatError as error:
            return ConfigReading(_describe_config(config), {}, error.problems)
        if other is not None:
            return ConfigReading(_describe_config(config), {other.kind: "peft_type"}, other.find_obstacles(config))
        problems = (*find_oddities(config, {}), *check_numbers(config), *config.problems())
        return ConfigReading(_describe_config(config), announced_kinds(config), problems)


def _read_saved(name: str, factors: Mapping[str, Factor]) -> Target:
    """Return a module that was saved whole."""
    scaling = Scaling(ScalingRule.MULTIPLIER, 1.0)
    return Target(name, REPLACE, SlotKind.PARAMETER, factors, 0, scaling)


def _summarise(groups: Mapping[str, Group]) -> dict[str, StoredModule]:
    return {name: StoredModule(group.kinds, group.factors) for name, group in groups.items()}


def _describe_config(config: PeftConfig) -> str:
    """Return what a configuration announces, in a few words."""
    shown = ("peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path")
    values = {field: config.fields[field] for field in shown if config.fields.get(field) is not None}
    return ", ".join(f"{field} {value!r:.60}" for field, value in values.items())


def _find_lost_magnitudes(groups: Mapping[str, Group], config: PeftConfig) -> list[Problem]:
    """Return the targets of a DoRA adapter that would pass for LoRA, since their magnitudes were not saved."""
    lost = sorted(name for name, group in groups.items() if "lora" in group.kinds and "dora" not in group.kinds)
    if not lost or not config.flag("use_dora"):
        return []
    return [Problem("LF201", name, "use_dora, but no lora_magnitude_vector", "a magnitude vector") for name in lost]


SCHEME: Final = Peft()
