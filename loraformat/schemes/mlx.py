"""mlx-lm: `adapters.safetensors` (older: `adapters.npz`) and a configuration that is not PEFT's, under the same name.

A is stored `(in, rank)` and B `(rank, out)`; of an embedding `(vocabulary, rank)` and `(rank, dim)`; of the experts of
a `switch_mlp`, which some models call `experts`, `(experts, rank, in)` and `(experts, out, rank)`. One rank and one
`scale` for all modules; the scale is the multiplier itself. Source: ml-explore/mlx-lm 0.32, tuner/utils.py, lora.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from loraformat.adapter import Adapter, Factor, ScalingRule, SlotKind, Target
from loraformat.base_facts import BaseFacts
from loraformat.manifest import MANIFEST_KEY
from loraformat.problems import Problem
from loraformat.schemes import Bundle, Holds, Layout, StatedScale, WrittenBundle
from loraformat.schemes._experts import EXPERTS_A, EXPERTS_B, is_stack, join_stacks, part_stacks
from loraformat.schemes._files import FiledScheme, level_multipliers, multiplier_of, pad_ranks
from loraformat.schemes._marks import Marks
from loraformat.schemes._memory import find_memory
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._one_scale import ConfigScale, inner
from loraformat.schemes._table import TRANSPOSED, NameTable, Row
from loraformat.strict_json import JsonValue

_EMBEDDING: Final = re.compile(r"(?:^|\.)(?:\w*embed\w*|wte)\.[a-z_]+$")
_BLOCK: Final = re.compile(r"^(?:.*\.)?(?:layers|h|blocks)\.\d+\.(.+)$")
_STACK: Final = ".switch_mlp"
_EXPERTS: Final = ".experts"
_EXPERT: Final = re.compile(r"(?P<module>.+)\.experts\.(?P<expert>\d+)\.(?P<projection>(?:gate|up|down)_proj|w[123])")
_MIXTRAL: Final = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""What Mixtral calls the projections of an expert."""
_MARKS: Final = ("fine_tune_type", "lora_parameters", "lora_layers")
"""Fields of the configuration that only mlx-lm's has; `lora_layers` in older ones."""


def _is_table(factor: Factor) -> bool:
    return len(factor.shape) < 3 and _EMBEDDING.search(factor.name) is not None


def _find_scale(config: Mapping[str, JsonValue]) -> JsonValue:
    found: JsonValue = inner(config, "lora_parameters", "scale")
    return found


def _write_config(targets: Sequence[Target], before: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return the configuration; -1 stands for all blocks: those that it adds have a B of zeros."""
    names = sorted({block[1] if (block := _BLOCK.match(target.name)) else target.name for target in targets})
    known = before.get("lora_parameters")
    parameters: dict[str, JsonValue] = dict(known) if isinstance(known, Mapping) else {"dropout": 0.0, "keys": names}
    parameters |= {"rank": max((target.rank for target in targets), default=0)}
    parameters |= {"scale": multiplier_of(targets[0]) if targets else 1.0}
    is_dora = any(target.kind == "dora" for target in targets)
    fields: dict[str, JsonValue] = {"num_layers": -1} | dict(before)
    return fields | {"fine_tune_type": "dora" if is_dora else "lora", "lora_parameters": parameters}


def _keep_lengths_of_tokens(targets: Sequence[Target]) -> tuple[list[Target], list[Problem]]:
    """Return the targets, and a problem of embeddings with lengths of outputs: mlx-lm has one for each token."""
    return list(targets), [
        Problem("LF312", target.name, "an embedding with lora_magnitude_vector", "m, a length for each token")
        for target in targets
        if target.slot is SlotKind.EMBEDDING and "lora_magnitude_vector" in target.factors
    ]


def _name_expert(stack: str, expert: int) -> str:
    """Return what transformers calls one expert of a stack."""
    owner, _, projection = stack.rpartition(".")
    module = owner.removesuffix(_STACK).removesuffix(_EXPERTS)
    return f"{module}{_EXPERTS}.{expert}.{_own_names(module).get(projection, projection)}"


def _own_names(module: str) -> Mapping[str, str]:
    return _MIXTRAL if module.endswith(".block_sparse_moe") else {}


def _find_stack(name: str, stack: str = _STACK) -> tuple[str, int] | None:
    """Return the stack that mlx-lm has an expert in, and its number."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    own = {theirs: ours for ours, theirs in _own_names(match["module"]).items()}
    projection = own.get(match["projection"], match["projection"])
    return f"{match['module']}{stack}.{projection}", int(match["expert"])


_PLAIN_STACKS: Final = frozenset({"gpt_oss", "gpt-oss"})
"""Families whose stacks of experts mlx-lm calls `experts`."""


class _Mlx(FiledScheme):
    layout = Layout(
        ("adapters.safetensors", "adapters.npz", "*_adapters.safetensors", "*_adapters.npz"), ("adapter_config.json",)
    )

    def detect(self, bundle: Bundle) -> str | None:
        """Recognise the configuration, or the names of the tensors."""
        fields = [name for name in _MARKS if name in (bundle.config or {}) and MANIFEST_KEY not in bundle.metadata]
        return f"adapter_config.json with {fields[0]}" if fields else self.marks.find(bundle)

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; every expert of a stack is a target of its own."""
        adapter = super().read(bundle, stated)
        plain = [target.name for target in adapter.targets if EXPERTS_A in target.factors and _STACK not in target.name]
        parted = part_stacks(adapter, _name_expert)
        if not plain:
            return parted
        memory = {**find_memory(adapter.provenance, self.name), "stack": _EXPERTS}
        return replace(parted, provenance={**adapter.provenance, self.name: memory})

    def write(self, adapter: Adapter, facts: BaseFacts) -> WrittenBundle:
        """Return tensors and configuration; the family of the base says what a stack of experts is called."""
        if facts.architecture in _PLAIN_STACKS:
            memory = {**find_memory(adapter.provenance, self.name), "stack": _EXPERTS}
            adapter = replace(adapter, provenance={**adapter.provenance, self.name: memory})
        return super().write(adapter, facts)

    def fit(self, adapter: Adapter) -> tuple[Adapter, list[Problem]]:
        """Return the adapter with targets that the scheme can hold, experts in stacks."""
        fitted, problems = super().fit(adapter)
        stack = find_memory(adapter.provenance, self.name).get("stack")
        targets, against = join_stacks(
            fitted.targets, partial(_find_stack, stack=stack if stack == _EXPERTS else _STACK)
        )
        return replace(fitted, targets=tuple(targets)), [*problems, *against]


SCHEME: Final = _Mlx(
    name="mlx",
    title="mlx-lm: adapters.safetensors and adapter_config.json",
    rows=NameTable(
        [
            Row("lora_a", "lora", EXPERTS_A, fits=is_stack),
            Row("lora_b", "lora", EXPERTS_B, fits=is_stack),
            Row("lora_a", "lora", "lora_embedding_A", TRANSPOSED, fits=_is_table),
            Row("lora_b", "lora", "lora_embedding_B", TRANSPOSED, fits=_is_table),
            Row("m", "dora", "m", fits=_is_table),
            Row("lora_a", "lora", "lora_A.weight", TRANSPOSED),
            Row("lora_b", "lora", "lora_B.weight", TRANSPOSED),
            Row("m", "dora", "lora_magnitude_vector"),
        ]
    ),
    naming=PlainNaming(),
    scale=ConfigScale(_find_scale, ScalingRule.MULTIPLIER, _write_config),
    marks=Marks(keys=(r".+\.lora_[ab]$",), neutral=(r".+\.m$",), others=(r".+\.weight\.lora_[ab]$",)),
    holds=Holds(
        kinds=frozenset({"lora", "dora"}),
        slots=frozenset({SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.EMBEDDING}),
        scale="one for all",
        dtypes=frozenset({"float32", "float16", "bfloat16"}),
    ),
    names="mlx",
    fits=(_keep_lengths_of_tokens, level_multipliers, pad_ranks),
    file_name="adapters.safetensors",
    other_files={"adapters.npz": "npz", "*_adapters.npz": "npz"},
    config_name="adapter_config.json",
)
