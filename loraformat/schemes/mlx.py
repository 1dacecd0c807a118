"""mlx-lm: `adapters.safetensors` (older: `adapters.npz`) and a configuration that is not PEFT's, under the same name.

A is stored `(in, rank)` and B `(rank, out)`; of an embedding `(vocabulary, rank)` and `(rank, dim)`. One rank and one
`scale` for all modules; the scale is the multiplier itself. Source: ml-explore/mlx-lm 0.32, tuner/utils.py, lora.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from loraformat.adapter import Factor, ScalingRule, SlotKind, Target
from loraformat.problems import Problem
from loraformat.schemes import Bundle, Holds, Layout
from loraformat.schemes._engine import Marks
from loraformat.schemes._files import FiledScheme, level_multipliers, multiplier_of, pad_ranks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._one_scale import ConfigScale, inner
from loraformat.schemes._table import TRANSPOSED, NameTable, Row
from loraformat.strict_json import JsonValue

_EMBEDDING: Final = re.compile(r"(?:^|\.)(?:\w*embed\w*|wte)\.[a-z_]+$")
_BLOCK: Final = re.compile(r"^(?:.*\.)?(?:layers|h|blocks)\.\d+\.(.+)$")
_MARKS: Final = ("fine_tune_type", "lora_parameters", "lora_layers")
"""Fields of the configuration that only mlx-lm's has; `lora_layers` in older ones."""


def _is_table(factor: Factor) -> bool:
    return len(factor.shape) < 3 and _EMBEDDING.search(factor.name) is not None


def _is_packed(factor: Factor) -> bool:
    return len(factor.shape) == 3


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


class _Mlx(FiledScheme):
    layout = Layout(
        ("adapters.safetensors", "adapters.npz", "*_adapters.safetensors", "*_adapters.npz"), ("adapter_config.json",)
    )

    def detect(self, bundle: Bundle) -> str | None:
        """Recognise the configuration, or the names of the tensors."""
        fields = [name for name in _MARKS if name in (bundle.config or {})]
        return f"adapter_config.json with {fields[0]}" if fields else self.marks.find(bundle)


SCHEME: Final = _Mlx(
    name="mlx",
    title="mlx-lm: adapters.safetensors and adapter_config.json",
    rows=NameTable(
        [
            Row("lora_a", "packed experts", "experts_A", fits=_is_packed),
            Row("lora_b", "packed experts", "experts_B", fits=_is_packed),
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
