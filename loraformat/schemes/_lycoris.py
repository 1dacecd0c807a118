"""The tensors of kohya's LoRA and of LyCORIS, which stand beside each other in flat and in dotted files.

Source: KohakuBlueleaf/LyCORIS, the `weight_list` of its modules; kohya-ss/sd-scripts, networks/lora.py.
"""

from typing import Final

from loraformat.adapter import Factor
from loraformat.schemes._scales import ALPHA
from loraformat.schemes._table import COLUMN, Row


def _is_column(factor: Factor) -> bool:
    """Say whether a magnitude is one for each output: `(out, 1, ...)`. The other kind is `(1, in, ...)`."""
    return len(factor.shape) > 1 and all(size == 1 for size in factor.shape[1:])


_LOHA: Final = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR: Final = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_GLORA: Final = ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight")

LYCORIS_ROWS: Final = (
    Row("lora_mid.weight", "lora", "lora_mid.weight"),
    Row("dora_scale", "dora", "lora_magnitude_vector", COLUMN, _is_column),
    Row("dora_scale", "dora of inputs", "dora_scale"),
    *(Row(role, "loha", role) for role in _LOHA),
    *(Row(role, "lokr", role) for role in _LOKR),
    *(Row(role, "glora", role) for role in _GLORA),
    Row("diff", "diff", "diff"),
    Row("diff_b", "diff", "diff_b"),
    Row("w_norm", "norm", "w_norm"),
    Row("b_norm", "norm", "b_norm"),
    Row("oft_blocks", "oft", "oft_blocks"),
    Row("oft_diag", "oft", "oft_diag"),
    Row("rescale", "oft", "rescale"),
    Row("on_input", "ia3", "on_input"),
    Row("set_weight", "replace", "weight"),
    Row(ALPHA, "", ALPHA),
)

LYCORIS_KINDS: Final = frozenset(
    {"lora", "dora", "dora of inputs", "loha", "lokr", "glora", "diff", "norm", "oft", "ia3", "replace"}
    | {f"{one} and {two}" for one, two in (("diff", "lora"), ("dora", "loha"), ("dora", "lokr"), ("diff", "dora"))}
)
"""What these rows can hold: the kinds, and the kinds that they make together."""
