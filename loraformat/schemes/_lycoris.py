"""The tensors of kohya's LoRA and of LyCORIS, which stand beside each other in flat and in dotted files.

Source: KohakuBlueleaf/LyCORIS, the `weight_list` of its modules; kohya-ss/sd-scripts, networks/lora.py.
"""

from typing import Final

from loraformat.adapter import Factor
from loraformat.schemes._scales import ALPHA, ON_INPUT
from loraformat.schemes._table import COLUMN, Row


def _is_column(factor: Factor) -> bool:
    """Say whether a magnitude is one for each output: `(out, 1, ...)`. The other kind is `(1, in, ...)`."""
    return len(factor.shape) > 1 and all(size == 1 for size in factor.shape[1:])


def _is_diagonal(factor: Factor) -> bool:
    """Say whether blocks are those of diag-OFT; those of a butterfly have stages before."""
    return len(factor.shape) == 3


_LOHA: Final = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR: Final = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_GLORA: Final = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")

LYCORIS_ROWS: Final = (
    Row("lora_mid.weight", "locon", "lora_mid.weight"),
    Row("dora_scale", "dora", "lora_magnitude_vector", COLUMN, _is_column),
    Row("dora_scale", "dora", "dora_scale"),
    *(Row(role, "loha", role) for role in _LOHA),
    *(Row(role, "lokr", role) for role in _LOKR),
    *(Row(role, "lycoris_glora", role) for role in _GLORA),
    Row("diff", "diff", "diff"),
    Row("diff_b", "diff", "diff_b"),
    Row("w_norm", "diff", "w_norm"),
    Row("b_norm", "diff", "b_norm"),
    Row("oft_blocks", "lycoris_oft", "oft_blocks", fits=_is_diagonal),
    Row("oft_blocks", "lycoris_boft", "oft_blocks"),
    Row("rescale", "rescaled", "rescale"),
    Row("set_weight", "replace", "weight"),
    Row("weight", "lycoris_ia3", "weight"),
    Row(ON_INPUT, "", ON_INPUT),
    Row(ALPHA, "", ALPHA),
)

LYCORIS_KINDS: Final = frozenset(
    {"lora", "locon", "dora", "loha", "lokr", "dora_loha", "dora_lokr", "lycoris_glora", "lycoris_ia3"}
    | {"lycoris_oft", "lycoris_boft", "diff", "replace", "diff and lora", "diff and dora", "diff and locon"}
)
"""What these rows can hold: the kinds, and the kinds that they make together."""
