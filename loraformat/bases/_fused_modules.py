"""Modules that one family of models stores as one matrix, and another as several: q, k and v; gate and up.

Both directions: a fused weight offers each member as a site on a part of it, and members that are stored apart offer
the fused module as sections. How the rows of a fused weight are arranged is a fact about a family (`model_type` of
transformers' `config.json`), never guessed from a shape: where it is not known, the sites carry an obstacle.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from loraformat.bases._tied_tables import INNER_CONFIGS
from loraformat.strict_json import JsonValue

Config: TypeAlias = Mapping[str, JsonValue]


class Run(NamedTuple):
    """Rows of a member that lie together.

    Attributes:
        start: the first in the member.
        stored: the first in the fused matrix.
        rows: how many.
    """

    start: int
    stored: int
    rows: int


Arrangement: TypeAlias = Sequence[Sequence[Run]]
"""For each member its runs."""

_Layout: TypeAlias = Callable[[Config, int, int], Arrangement | None]
"""From the configuration, the rows and the number of members to the arrangement; None where they do not fit."""


def _lay_equal(config: Config, rows: int, members: int) -> Arrangement | None:
    """One member after the other, all of one size."""
    size, rest = divmod(rows, members)
    return None if rest else [[Run(0, index * size, size)] for index in range(members)]


def _lay_heads(config: Config, rows: int, members: int) -> Arrangement | None:
    """All heads of q, then those of k, then those of v; k and v may have fewer."""
    heads, groups, size = _count_heads(config)
    sizes = (heads * size, groups * size, groups * size)
    if members != len(sizes) or sum(sizes) != rows or not size:
        return None
    return [[Run(0, sum(sizes[:index]), count)] for index, count in enumerate(sizes)]


def _lay_each_head(config: Config, rows: int, members: int) -> Arrangement | None:
    """Head by head: q, k and v of the first, then of the second (GPT-NeoX, Bloom)."""
    heads, _, _ = _count_heads(config)
    size, rest = divmod(rows, max(heads, 1) * members)
    if rest or not heads:
        return None
    return [
        [Run(head * size, (head * members + index) * size, size) for head in range(heads)] for index in range(members)
    ]


def _lay_falcon(config: Config, rows: int, members: int) -> Arrangement | None:
    """Falcon's three: groups of q heads with their k and v, one k and v for all q heads, or head by head."""
    heads, _, _ = _count_heads(config)
    if not heads or members != 3:
        return None
    if config.get("new_decoder_architecture") is True:
        groups = _whole(config.get("num_kv_heads"))
    elif config.get("multi_query", True) is True:
        groups = 1
    else:
        return _lay_each_head(config, rows, members)
    size, rest = divmod(rows, heads + 2 * groups)
    per_group, uneven = divmod(heads, max(groups, 1))
    if rest or uneven or not groups:
        return None
    step = (per_group + 2) * size
    query = [Run(group * per_group * size, group * step, per_group * size) for group in range(groups)]
    key = [Run(group * size, group * step + per_group * size, size) for group in range(groups)]
    return [query, key, [run._replace(stored=run.stored + size) for run in key]]


def _count_heads(config: Config) -> tuple[int, int, int]:
    """Return heads, key-value heads and the size of a head; 0 for what is not stated."""
    heads = _first(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    groups = _first(config, "num_key_value_heads", "multi_query_group_num", "kv_n_heads") or heads
    size = _first(config, "head_dim", "kv_channels")
    width = _first(config, "hidden_size", "n_embd", "d_model")
    return heads, groups, size or (width // heads if heads else 0)


def _first(config: Config, *names: str) -> int:
    return next((number for name in names if (number := _whole(config.get(name)))), 0)


def _whole(value: JsonValue) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


@dataclass(frozen=True, slots=True)
class Family:
    """A module that is fused here and split there.

    Attributes:
        fused: its name.
        members: the names of what it fuses, in order; several spellings.
        layouts: `model_type` to how its rows are arranged.
        splits: whether bases that store the members apart offer the fused module, one member after the other.
    """

    fused: str
    members: tuple[tuple[str, ...], ...]
    layouts: Mapping[str, _Layout]
    splits: bool = False


def _for_all(layout: _Layout, *families: str) -> dict[str, _Layout]:
    return dict.fromkeys(families, layout)


_QKV: Final = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
_GATE_UP: Final = (("gate_proj", "up_proj"), ("w1", "w3"))

FAMILIES: Final = (
    Family("qkv_proj", _QKV[:1], _for_all(_lay_heads, "phi3", "phi4_multimodal"), splits=True),
    Family(
        "gate_up_proj",
        _GATE_UP,
        _for_all(_lay_equal, "phi3", "phi4_multimodal", "glm", "glm4", "glm4v", "glm4v_text"),
        splits=True,
    ),
    Family(
        "c_attn",
        _QKV,
        _for_all(_lay_equal, "gpt2", "imagegpt", "decision_transformer", "qwen"),
    ),
    Family("W_pack", _QKV[:1], _for_all(_lay_equal, "baichuan"), splits=True),
    Family("Wqkv", _QKV[:1], _for_all(_lay_equal, "mpt", "modernbert", "nomic_bert")),
    Family(
        "query_key_value",
        _QKV,
        _for_all(_lay_each_head, "gpt_neox", "gpt_neox_japanese", "bloom")
        | _for_all(_lay_falcon, "falcon", "RefinedWeb", "RefinedWebModel")
        | _for_all(_lay_heads, "chatglm"),
    ),
    Family("qkv", _QKV, _for_all(_lay_equal, "sam", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")),
)
"""Order and arrangement as the modelling code of transformers, or of the model's own repository, has them."""

_BY_FUSED: Final = {family.fused: family for family in FAMILIES}
_SPLIT: Final = [(family.fused, spelling) for family in FAMILIES if family.splits for spelling in family.members]
_BY_FIRST: Final = {first: [each for each in _SPLIT if each[1][0] == first] for first in {s[0] for _, s in _SPLIT}}
"""First member to the modules that it may begin, with all members."""


def find_family(module: str) -> Family | None:
    """Return the family of a fused module, by the last part of its name."""
    return _BY_FUSED.get(module.rpartition(".")[2])


def arrange(family: Family, config: Config, rows: int) -> Arrangement | None:
    """Return where each member's rows are in a fused matrix; None where the configuration does not tell."""
    for fields in (config, *(config.get(key) for key in INNER_CONFIGS)):
        model_type = fields.get("model_type") if isinstance(fields, Mapping) else None
        layout = family.layouts.get(model_type) if isinstance(model_type, str) else None
        if layout is not None and isinstance(fields, Mapping):
            return layout(fields, rows, len(family.members[0]))
    return None


def find_splits(modules: Mapping[str, int]) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Yield each module that the base stores in parts, with the parts' names and rows in order.

    Args:
        modules: names of the modules that are stored, with their rows.
    """
    for name in modules:
        parent, dot, last = name.rpartition(".")
        for fused, spelling in _BY_FIRST.get(last, ()):
            whole = f"{parent}{dot}{fused}"
            parts = [f"{parent}{dot}{member}" for member in spelling]
            if whole not in modules and all(part in modules for part in parts):
                yield whole, [(part, modules[part]) for part in parts]
