"""What a base knows and an adapter does not: the names of its modules, its counts of heads and experts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraformat.frozen_mapping import FrozenMapping
from loraformat.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """Facts about a base, as far as they are known.

    Attributes:
        source: where they are from, for messages; empty when nothing is known.
        modules: paths of its modules; empty when unknown.
        counts: `heads`, `kv_heads`, `head_dim`, `experts`, `hidden` ... by name.
        architecture: what it calls its own class or architecture, such as `FluxTransformer2DModel` or `llama`.
        config: its own configuration.
        kernels: shapes of the convolutions' weights, `(out, in / groups, *kernel)`, by module path.
    """

    source: str = ""
    modules: frozenset[str] = frozenset()
    counts: Mapping[str, int] = field(default_factory=FrozenMapping)
    architecture: str = ""
    config: Mapping[str, JsonValue] = field(default_factory=FrozenMapping)
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=FrozenMapping)

    def complete(self, other: "BaseFacts") -> "BaseFacts":
        """Return these facts, and the other's where there are none."""
        return BaseFacts(
            self.source or other.source,
            self.modules or other.modules,
            {**other.counts, **self.counts},
            self.architecture or other.architecture,
            self.config or other.config,
            self.kernels or other.kernels,
        )

    def count(self, expression: str) -> int | None:
        """Return a product of counts such as `heads*head_dim`, None where one of them is not known."""
        factors = [self.counts.get(name) for name in expression.split("*")]
        known = [factor for factor in factors if factor is not None]
        return math.prod(known) if len(known) == len(factors) else None


NO_FACTS = BaseFacts()

_COUNT_FIELDS: Mapping[str, tuple[str, ...]] = FrozenMapping(
    {
        "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
        "kv_heads": ("num_key_value_heads", "n_kv_heads", "n_query_groups", "num_query_groups"),
        "head_dim": ("head_dim", "head_size", "kv_channels"),
        "hidden": ("hidden_size", "n_embd", "dim"),
        "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
        "intermediate": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    }
)
"""What configurations call the counts: transformers, GPT-2, litgpt, mistral-inference, Megatron."""


def read_facts(config: Mapping[str, JsonValue], source: str, modules: frozenset[str] = frozenset()) -> BaseFacts:
    """Return the facts that a `config.json` states; what follows from others is filled in.

    Without key-value heads of their own, all heads are (as transformers reads it); without a size, a head has its share
    of the hidden size.
    """
    text_part = config.get("text_config")
    fields = {**config, **text_part} if isinstance(text_part, Mapping) else config
    counts = {name: value for name, names in _COUNT_FIELDS.items() if (value := _first_count(fields, names))}
    if "heads" in counts:
        counts.setdefault("kv_heads", counts["heads"])
        if "hidden" in counts:
            counts.setdefault("head_dim", counts["hidden"] // counts["heads"])
    return BaseFacts(source, modules, counts, _architecture(fields), config)


def _first_count(fields: Mapping[str, JsonValue], names: tuple[str, ...]) -> int | None:
    values = (fields.get(name) for name in names)
    return next((each for each in values if isinstance(each, int) and not isinstance(each, bool) and each > 0), None)


def _architecture(fields: Mapping[str, JsonValue]) -> str:
    for name in ("_class_name", "general.architecture", "model_type"):
        value = fields.get(name)
        if isinstance(value, str):
            return value
    return ""
