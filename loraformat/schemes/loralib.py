"""loralib, the library of the LoRA paper: `<module>.lora_A` in a torch checkpoint, which says nothing of the scale.

A MergedLinear has a group of rows of A for each of the parts that `enable_lora` names; the file does not keep that
mask. Two groups are q and v, as in all of the paper's own code. The factors of a ConvLoRA look like those of a linear
layer; only where the base is known, and has a convolution there, are they taken for what they are. Source:
microsoft/LoRA, loralib/layers.py, utils.py.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from loraformat.adapter import Adapter, Factor, ScalingRule, SlotKind, Target
from loraformat.base_facts import BaseFacts
from loraformat.errors import refuse
from loraformat.problems import Problem
from loraformat.schemes import Bundle, Holds, StatedScale, WrittenBundle
from loraformat.schemes._facing import are_transposed
from loraformat.schemes._files import FiledScheme, alpha_of, level_alphas
from loraformat.schemes._grouped import Groups, place_rows
from loraformat.schemes._marks import Marks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._scales import StatedAlone
from loraformat.schemes._table import NameTable, Row
from loraformat.strict_json import JsonValue

_MASKS: Final[Mapping[int, tuple[int, ...]]] = {2: (0, 2), 3: (0, 1, 2)}
"""Number of groups to the parts of q, k, v that they are."""
_CONV1D: Final = re.compile(r"(?:^|\.)h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)$")
"""Modules of GPT-2, whose weight is stored `(in, out)`."""
_LIT_LLAMA: Final = re.compile(r"(?:^|\.)h\.\d+\.mlp\.c_fc1$")
"""A module of lit-llama, which calls the others as GPT-2 does and stores them `(out, in)`."""
_TABLES: Final = re.compile(r"(?:^|\.)(?:\w*embed\w*|wte)\.lora_[AB]$")
_LITGPT: Final = r"transformer\.h\.\d+\.(?:attn\.(?:qkv|attn|proj)|mlp\.(?:fc|fc_1|fc_2|proj))\.lora_[AB]$"
_CONFIGURED: Final = frozenset({"lora_config", "rslora", "trainable_bias"})
"""Fields of configurations that stand beside keys of the same form."""
_HEAD: Final = re.compile(r"lm_head\.(?:lora_[AB]|weight|bias)$")


def _has_more_than_a_head(bundle: Bundle) -> bool:
    """Say whether there are factors besides those of an output layer, which litgpt calls alike."""
    return not all(_HEAD.match(key) for key in bundle.tensors)


def _has_no_configuration(bundle: Bundle) -> bool:
    """Say whether nothing beside it states a scale, which VoxCPM's and Paddle's files of such keys have."""
    return not _CONFIGURED.intersection(bundle.config or {})


def _is_not_transposed(bundle: Bundle) -> bool:
    return not are_transposed(bundle.tensors)


def _is_table(factor: Factor) -> bool:
    return _TABLES.search(factor.name) is not None


class _Loralib(FiledScheme):
    told_by_base = frozenset({"lora", "conv_lora"})

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; merged layers become targets of the summed rank."""
        merged = _find_merged(bundle)
        tensors = dict(bundle.tensors)
        for module, count in merged.items():
            up = tensors[f"{module}.lora_B"]
            tensors[f"{module}.lora_B"] = place_rows(up, _divide(module, up, count, bundle))
        adapter = super().read(replace(bundle, tensors=tensors), stated)
        turned = None if any(map(_LIT_LLAMA.search, bundle.facts.modules)) else _CONV1D
        targets = tuple(
            _see_kernel(_finish(target, merged.get(target.name, 1), turned), bundle.facts.kernels)
            for target in adapter.targets
        )
        notes = [
            Problem("LF343", module, f"{count} groups, read as those of q and v", "enable_lora", severity="warning")
            for module, count in merged.items()
            if count == 2
        ]
        return replace(adapter, targets=targets, problems=(*adapter.problems, *notes))

    def write(self, adapter: Adapter, facts: BaseFacts) -> WrittenBundle:
        """Return the tensors, and in words what the file cannot say: the scale."""
        written = super().write(adapter, facts)
        alpha = next((alpha_of(target) for target in self.fit(adapter)[0].targets if target.rank), 1.0)
        found = f"lora_alpha = {alpha:g}, which its reader must be told"
        note = Problem("LF345", self.name, found, severity="warning")
        return replace(written, stated=StatedScale(alpha), problems=(*written.problems, note))


def _find_merged(bundle: Bundle) -> dict[str, int]:
    """Return the modules whose A has several groups, and how many."""
    merged = {}
    for key, down in sorted(bundle.tensors.items()):
        module = key.removesuffix(".lora_A")
        up = bundle.tensors.get(f"{module}.lora_B")
        if module == key or up is None or len(down.shape) != 2 or len(up.shape) != 2 or not up.shape[1]:
            continue
        count, rest = divmod(down.shape[0], up.shape[1])
        if count > 1 and not rest and not up.shape[0] % count:
            merged[module] = count
    return merged


def _divide(module: str, up: Factor, count: int, bundle: Bundle) -> Groups:
    if count not in _MASKS:
        raise refuse("LF342", f"{bundle.path}: {module}", f"{count} groups", "two or three, as q, k and v have them")
    return Groups((up.shape[0] // count,) * 3, _MASKS[count])


def _finish(target: Target, groups: int, turned: re.Pattern[str] | None) -> Target:
    """Return the target with the scale of one group, and in the slot of its module."""
    scaling = target.scaling
    if groups > 1 and scaling.rule is ScalingRule.ALPHA_OVER_RANK:
        scaling = replace(scaling, value=scaling.value * groups)
    is_turned = turned is not None and turned.search(target.name) and target.rank
    slot = SlotKind.LINEAR_TRANSPOSED if is_turned else target.slot
    return replace(target, scaling=scaling, slot=slot)


def _see_kernel(target: Target, kernels: Mapping[str, tuple[int, ...]]) -> Target:
    """Return a target as that of a convolution, where the base has one of as many numbers as B·A.

    loralib's own layer has it in a module of its own, `conv`.
    """
    down, up = target.factors.get("lora_A.weight"), target.factors.get("lora_B.weight")
    name = next((name for name in (target.name, f"{target.name}.conv") if name in kernels), None)
    if name is None or down is None or up is None or len(down.shape) != 2 or len(up.shape) != 2:
        return target
    _, inner, *kernel = kernels[name]
    size = kernel[0]
    groups = down.shape[1] // (inner * size)
    if set(kernel) != {size} or target.rank % size or up.shape[0] * down.shape[1] != math.prod(kernels[name]):
        return target
    options: dict[str, JsonValue] = {"kernel_size": size, "groups": groups, "axes": len(kernel)}
    return replace(target, name=name, kind="conv_lora", slot=SlotKind.CONV, rank=target.rank // size, options=options)


SCHEME: Final = _Loralib(
    name="loralib",
    title="loralib: a torch checkpoint without a scale (microsoft/LoRA)",
    rows=NameTable(
        [
            Row("lora_A", "lora", "lora_embedding_A", fits=_is_table),
            Row("lora_B", "lora", "lora_embedding_B", fits=_is_table),
            Row("lora_A", "lora", "lora_A.weight"),
            Row("lora_B", "lora", "lora_B.weight"),
            Row("weight", "replace", "weight"),
            Row("bias", "replace", "bias"),
        ]
    ),
    naming=PlainNaming(),
    scale=StatedAlone(),
    marks=Marks(
        keys=(r".+\.lora_[AB]$",),
        neutral=(r".+\.(?:weight|bias)$",),
        others=(_LITGPT, r"base_model\.model\.", r".+\.loras\..+", r"blocks\.\d+\..*\.lora_[AB]$"),
        asks=(_has_more_than_a_head, _has_no_configuration, _is_not_transposed),
    ),
    names="loralib",
    holds=Holds(
        kinds=frozenset({"lora", "replace"}),
        slots=frozenset({SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.EMBEDDING, SlotKind.PARAMETER}),
        scale="not stored",
    ),
    fits=(level_alphas,),
    container="torch_zip",
    annotates=False,
)
