"""litgpt: `lit_model.pth.lora`, an outer dictionary `model` of `<module>.lora_A`, beside `hyperparameters.yaml`.

q, k and v are one weight; each of those that are adapted has rows of A and B of its own. One rank and one alpha for
all, in the settings, as is which of q, k and v are adapted. Source: Lightning-AI/litgpt 0.5, lora.py, finetune/lora.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, Final

import numpy as np

from loraformat.adapter import Adapter, Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.base_facts import BaseFacts, read_facts
from loraformat.derived import NewFactor
from loraformat.errors import LoraformatError, refuse
from loraformat.schemes import DECODERS, Bundle, Holds, Layout, StatedScale
from loraformat.schemes import WrittenBundle as Written
from loraformat.schemes._files import FiledScheme, level_multipliers, multiplier_of, pad_ranks
from loraformat.schemes._grouped import FUSED, Groups, gather, place_rows
from loraformat.schemes._marks import Marks
from loraformat.schemes._one_scale import ConfigScale
from loraformat.schemes._patterned import PatternedNaming
from loraformat.schemes._table import NameTable, Row
from loraformat.strict_json import JsonValue

_NAMES: Final = r"transformer\.h\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.(?:fc|fc_1|fc_2|proj))|lm_head|transformer\.wte"
_FUSED_NAME: Final = ".attn.qkv"
_FLAGS: Final = ("lora_query", "lora_key", "lora_value")
_BLOCKS: Final = "transformer.h."
_NEOX: Final = ".mlp.fc"
_DOWN: Final = ".mlp.proj"
_WHOLES: Final[tuple[tuple[str, ...], ...]] = (
    (".attn.qkv",),
    (".attn.proj",),
    (".mlp.fc_1", ".mlp.fc_2", _DOWN),
    (_NEOX, _DOWN),
)
"""What one setting adapts, in every block: litgpt loads a checkpoint only when all of it is there."""
_WRAPPER: Final = "torch.wrapper"
_COUNTS: Final = ("heads*head_dim", "kv_heads*head_dim", "kv_heads*head_dim")


class _Litgpt(FiledScheme):
    layout = Layout(("lit_model.pth.lora", "lit_model.lora.pth"), ("hyperparameters.yaml", "model_config.yaml"))

    def find_facts(self, bundle: Bundle) -> BaseFacts:
        """Return the counts of heads, which `model_config.yaml` states."""
        return read_facts(bundle.config or {}, str(bundle.path))

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; a fused weight becomes one target of the summed rank."""
        facts = bundle.facts.complete(self.find_facts(bundle))
        tensors = dict(bundle.tensors)
        fused: dict[str, JsonValue] = {}
        for key, down in sorted(bundle.tensors.items()):
            module = key.removesuffix(".lora_A")
            up = tensors.get(f"{module}.lora_B")
            if module != key and module.endswith(_FUSED_NAME) and up is not None:
                groups = _find_groups(module, down, up, bundle.config or {}, facts)
                tensors[f"{module}.lora_B"] = place_rows(up, groups)
                fused[module] = {str(part): up.shape[1] for part in groups.present}
        adapter = super().read(replace(bundle, tensors=tensors, facts=facts), stated)
        targets = tuple(_widen_alpha(target, fused.get(target.name)) for target in adapter.targets)
        provenance = dict(adapter.provenance) | ({FUSED: fused} if fused else {})
        return replace(adapter, targets=targets, provenance=provenance)

    def write(self, adapter: Adapter, facts: BaseFacts) -> Written:
        """Return tensors and settings; fused targets are taken apart into their groups."""
        levelled, problems = self.fit(adapter)
        known = adapter.provenance.get(FUSED)
        parts = {name: _read_parts(known, name) for name in (target.name for target in levelled.targets)}
        wanted = sorted({part for each in parts.values() for part in each})
        ranks = [
            max(parts[target.name].values(), default=0) or target.rank for target in levelled.targets if target.rank
        ]
        rank = max(ranks, default=0)
        targets = []
        for target in levelled.targets:
            try:
                targets.append(_store(target, parts[target.name], wanted, rank, facts))
            except LoraformatError as error:
                problems += error.problems
        plain, notes = pad_ranks([target for target in targets if target.rank])
        problems += notes
        added = _complete([target for target in plain if target.kind == "lora"], facts)
        rest = [target for target in targets if not target.rank]  # Of kinds that are refused.
        written = super().write(replace(levelled, targets=(*plain, *added, *rest)), facts)
        config = dict(written.config or {}) | {flag: part in wanted for part, flag in enumerate(_FLAGS)}
        metadata = {_WRAPPER: "model"}
        return replace(written, config=config, metadata=metadata, problems=(*problems, *written.problems))


def _find_groups(module: str, down: Factor, up: Factor, config: Mapping[str, JsonValue], facts: BaseFacts) -> Groups:
    """Return which of q, k and v have factors: as the settings say, else as the numbers of rows allow.

    Raises:
        FindingError: LF311 the counts of heads are not known, LF342 the rows allow no reading or several.
    """
    sizes = _find_sizes(module, facts)
    count = down.shape[0] // max(up.shape[1], 1)
    stated = [config.get(flag) for flag in _FLAGS]
    if all(isinstance(flag, bool) for flag in stated):
        options = [tuple(part for part, flag in enumerate(stated) if flag)]
    else:
        options = list(combinations(range(len(sizes)), count))
    fitting = [
        option for option in options if len(option) == count and sum(sizes[part] for part in option) == up.shape[0]
    ]
    if len(fitting) != 1:
        found = f"{count} groups of {up.shape[0]} rows in all, of {', '.join(map(str, sizes))}"
        raise refuse("LF342", module, found, "one reading; hyperparameters.yaml beside the file says which it is")
    return Groups(sizes, fitting[0])


def _find_sizes(module: str, facts: BaseFacts) -> tuple[int, ...]:
    counts = [facts.count(expression) for expression in _COUNTS]
    sizes = tuple(count for count in counts if count is not None)
    if len(sizes) != len(counts):
        raise refuse("LF311", module, "a fused weight", "the base's counts of heads, and the size of one")
    return sizes


def _widen_alpha(target: Target, parts: JsonValue) -> Target:
    """Return the target with the scale of one group: alpha is over the group's rank, not over the sum."""
    if not isinstance(parts, Mapping) or target.scaling.rule is not ScalingRule.ALPHA_OVER_RANK:
        return target
    return replace(target, scaling=replace(target.scaling, value=target.scaling.value * len(parts)))


def _read_parts(known: Any, name: str) -> dict[int, int]:
    """Return part to rank as it is remembered; where it is not, all parts share one A, which is rank 0."""
    if not name.endswith(_FUSED_NAME):
        return {}
    found = known.get(name) if isinstance(known, Mapping) else None
    if not isinstance(found, Mapping):
        return dict.fromkeys(range(len(_FLAGS)), 0)
    return {int(part): rank for part, rank in found.items() if part.isdecimal() and isinstance(rank, int)}


def _store(target: Target, parts: Mapping[int, int], wanted: Sequence[int], rank: int, facts: BaseFacts) -> Target:
    """Return a fused target with its factors as they are stored."""
    if not target.name.endswith(_FUSED_NAME) or set(target.factors) != {"lora_A.weight", "lora_B.weight"}:
        return target
    sizes = _find_sizes(target.name, facts)
    present = tuple(sorted(parts))
    ranks = [parts.get(part, 0) for part in present]
    down, up = target.factors["lora_A.weight"], target.factors["lora_B.weight"]
    if sum(sizes) != up.shape[0] or (any(ranks) and sum(ranks) != target.rank):
        raise refuse("LF315", target.name, f"{up.shape[0]} rows, rank {target.rank}", f"{sum(sizes)} rows")
    factors = gather(down, up, ranks, Groups(sizes, present), wanted, rank)
    scaling = Scaling(ScalingRule.MULTIPLIER, target.scale)  # An alpha would be over the sum of the ranks.
    return replace(target, rank=rank, scaling=scaling, factors=dict(zip(target.factors, factors, strict=True)))


def _complete(targets: Sequence[Target], facts: BaseFacts) -> list[Target]:
    """Return targets without effect for the modules that litgpt would have adapted as well."""
    known = {_suffix_of(target.name): target for target in targets}
    blocks = [int(target.name.split(".")[2]) for target in targets if target.name.startswith(_BLOCKS)]
    names = {target.name for target in targets}
    missing = [
        (f"{_BLOCKS}{block}{end}", end)
        for whole in _WHOLES
        if set(whole) & set(known) and (_DOWN not in whole or (_NEOX in whole) is (_NEOX in known))
        for block in range(facts.count("layers") or max(blocks) + 1)
        for end in whole
    ]
    return [_without_effect(name, end, known) for name, end in missing if name not in names]


def _suffix_of(name: str) -> str:
    return f".{'.'.join(name.split('.')[3:])}" if name.startswith(_BLOCKS) else name


def _without_effect(name: str, end: str, known: Mapping[str, Target]) -> Target:
    """Return a target of zeros; the modules of an MLP have one size, the last of them turned round."""
    like = known.get(end) or next(
        known[other] for whole in _WHOLES if end in whole for other in whole if other in known
    )
    shapes = [factor.shape for factor in like.factors.values()]
    if end not in known and _DOWN in (end, _suffix_of(like.name)):
        shapes = [shape[::-1] for shape in reversed(shapes)]
    zeros: dict[str, Factor] = {
        role: NewFactor("zeros", np.zeros(shape, dtype=factor.dtype.numpy()))
        for (role, factor), shape in zip(like.factors.items(), shapes, strict=True)
    }
    return replace(like, name=name, factors=zeros, fingerprint=None)


def _write_config(targets: Sequence[Target], before: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the settings that say what is adapted, and how strongly."""
    rank = max((target.rank for target in targets), default=0)
    names = {target.name for target in targets}
    return dict(before) | {
        "lora_r": rank,
        "lora_alpha": multiplier_of(targets[0]) * rank if targets else 0.0,
        "lora_projection": any(name.endswith(".attn.proj") for name in names),
        "lora_mlp": any(".mlp." in name for name in names),
        "lora_head": "lm_head" in names,
    }


SCHEME: Final = _Litgpt(
    name="litgpt",
    title="litgpt: lit_model.pth.lora and hyperparameters.yaml, fused q, k and v",
    rows=NameTable([Row("lora_A", "lora", "lora_A.weight"), Row("lora_B", "lora", "lora_B.weight")]),
    naming=PatternedNaming(_NAMES, "litgpt"),
    scale=ConfigScale(lambda config: config.get("lora_alpha"), ScalingRule.ALPHA_OVER_RANK, _write_config),
    marks=Marks(keys=(rf"(?:{_NAMES})\.lora_[AB]$",)),
    holds=Holds(
        kinds=frozenset({"lora"}),
        slots=frozenset({SlotKind.LINEAR}),
        scale="one for all",
        needs="the counts of heads, by which q, k and v are parts of one weight",
        models=DECODERS,
    ),
    names="litgpt",
    fits=(level_multipliers,),
    container="torch_zip",
    file_name="lit_model.pth.lora",
    config_name="hyperparameters.yaml",
    annotates=False,
)
