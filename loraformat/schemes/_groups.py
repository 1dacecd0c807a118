"""What the tensors of one module are together: their kind, their rank and their slot."""

from collections.abc import Mapping, Set
from typing import Final

from loraformat.adapter import Factor, SlotKind
from loraformat.schemes._options import BOUNDED

TOKEN: Final = "token embedding"  # noqa: S105 - a word of a text, and no secret
"""What is no change of a weight, but the row of a new token, which travels with an adapter."""
_RANK_AXES: Final = (
    *(("lora_A.weight", 0), ("lora_B.weight", 1), ("lora_embedding_A", 0), ("hada_w1_b", 0), ("lokr_t2", 0)),
    *(("lokr_w2_b", 0), ("lokr_w1_b", 0), ("a2.weight", 0), ("experts_A", 1)),
)
"""Where factors show a rank: a role and the axis."""
_KINDS_TOGETHER: Final[Mapping[frozenset[str], str]] = {
    frozenset({"lora", "dora"}): "dora",
    frozenset({"lora", "locon"}): "locon",
    frozenset({"dora", "loha"}): "dora_loha",
    frozenset({"dora", "lokr"}): "dora_lokr",
    frozenset({"lycoris_oft", "rescaled"}): "lycoris_oft",
    frozenset({"lycoris_boft", "rescaled"}): "lycoris_boft",
    frozenset({"diff_b"}): "diff",
    frozenset({"diff", "diff_b"}): "diff",
    frozenset({"diff_b", "lora"}): "lora",
    frozenset({"lora", "padded_lora"}): "padded_lora",
    frozenset({"diff_b", "lora", "padded_lora"}): "padded_lora",
    **{
        frozenset({*differences, *kinds}): f"diff and {kinds[-1]}"
        for differences in (("diff",), ("diff_b",), ("diff", "diff_b"))
        for kinds in (("lora", "dora"), ("lora", "locon"))
    },
    frozenset({"diff", "diff_b", "lora"}): "diff and lora",
}
"""What the rows of one module make together."""


def name_kind(kinds: Set[str]) -> str:
    """Return the kind that the rows of a module make; one that no room has where they do not go together."""
    return _KINDS_TOGETHER.get(frozenset(kinds)) or " and ".join(sorted(kinds))


def rank_of(factors: Mapping[str, Factor]) -> int:
    """Return the rank that the factors show; 0 for kinds without one."""
    return next(
        (factors[role].shape[axis] for role, axis in _RANK_AXES if role in factors and len(factors[role].shape) > axis),
        0,
    )


def slot_of(kind: str, factors: Mapping[str, Factor]) -> SlotKind:
    """Return the slot that the factors' axes show; values have none of their own."""
    if kind in ("replace", TOKEN) or (kind == "diff" and _is_vector_or_norm(factors)):
        return SlotKind.PARAMETER
    if kind in BOUNDED:  # Their blocks have axes of their own.
        factors = {role: factor for role, factor in factors.items() if role == "rescale"}
    if "lora_embedding_A" in factors:
        return SlotKind.EMBEDDING
    return SlotKind.CONV if any(len(factor.shape) > 2 for factor in factors.values()) else SlotKind.LINEAR


def _is_vector_or_norm(factors: Mapping[str, Factor]) -> bool:
    vectors = all(len(factor.shape) == 1 for factor in factors.values())
    return vectors or any(role.endswith("_norm") for role in factors)
