"""PaddleNLP and PaddleFormers: `<module>.lora_A` as `(in, rank)`, `lora_B` as `(rank, out)`, and `lora_config.json`.

Paddle has weights as `(in, out)`, and factors likewise. Scale: lora_alpha / r of that configuration, or lora_alpha / √r
with `rslora`, whatever the rank of the factors: LoRA-GA saves them with twice the rank that it trained with. PaddleNLP
calls a decoder by its family (`llama.layers.0`), PaddleFormers `model` as transformers does. Source: PaddleNLP 3.0,
peft/lora/lora_model.py, lora_layers.py and lora_config.py; PaddleFormers 1.2, the same.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target
from loraformat.errors import refuse
from loraformat.schemes import Bundle, Holds, Layout, StatedScale
from loraformat.schemes._beside import Module
from loraformat.schemes._engine import TableReader
from loraformat.schemes._facing import are_transposed
from loraformat.schemes._marks import NOISE, Alias, Marks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._one_scale import check_number, state
from loraformat.schemes._scales import UNIT, ScalesRead, ScalesWritten
from loraformat.schemes._table import TRANSPOSED, NameTable, Row
from loraformat.strict_json import JsonValue

_FAMILIES: Final = r"(?:llama|mistral|mixtral|qwen2|qwen2_moe|qwen3|qwen3_moe|gemma|deepseek_v2|deepseek_v3|phi3)"
_OWN: Final = ("rslora", "lora_plus_scale", "trainable_bias", "enable_lora_list", "do_qat", "merge_weights")
"""Fields that a configuration of Paddle's has, and no other `lora_config.json`."""
_FUSED: Final = re.compile(r"\.(?:qkv_proj|gate_up_fused_proj|up_gate_proj|linear_qkv)\.lora_B$")
_REFUSED: Final = (
    (
        "pissa",
        "PiSSA, whose factors are for a base from which its own first ones were taken",
        "Merge it in Paddle: LoRAModel.from_pretrained, then merge.",
    ),
    (
        "enable_lora_list",
        "factors of parts of fused weights (MergedLoRALinear)",
        "Merge it in Paddle: LoRAModel.from_pretrained, then merge.",
    ),
    *(
        (name, "an option that is no LoRA", "Merge it in Paddle: LoRAModel.from_pretrained, then merge.")
        for name in ("lora_use_mixer", "use_mora", "nola", "lorapro")
    ),
)
"""Fields that make of the same tensors something else: what, and the way out."""
_PARALLEL: Final = ("tensor_model_parallel_size", "tensor_parallel_degree")
_JOIN: Final = (
    "Save it in Paddle with merge_tensor_parallel=True (model.save_pretrained(folder, merge_tensor_parallel=True)), "
    "which joins the parts of all processes."
)
_ORDERED: Final = (
    "Paddle has the rows of a fused weight by groups of heads, transformers one part below the other. Train or save it "
    "with fuse_attention_qkv=False and fuse_attention_ffn=False."
)


@dataclass(frozen=True, slots=True)
class _OfTheConfiguration:
    """The quotient that Paddle's layers multiply with, from the rank of the configuration."""

    def read(self, modules: Sequence[Module], bundle: Bundle, stated: StatedScale) -> ScalesRead:
        """Return the one scaling for every module that has a rank."""
        scaling = state(stated)
        if scaling is not None:
            return ScalesRead({module.name: scaling if module.rank else UNIT for module in modules})
        config = bundle.config or {}
        alpha = check_number(config.get("lora_alpha"), bundle)
        rank = check_number(config.get("r"), bundle)
        if rank <= 0:
            raise refuse("LF213", bundle.path, f"the rank {rank:g}", "a whole number from 1")
        root = config.get("rslora") is True
        rule = ScalingRule.ALPHA_OVER_SQRT_RANK if root else ScalingRule.ALPHA_OVER_RANK
        plain, other = (
            Scaling(rule, alpha),
            Scaling(ScalingRule.MULTIPLIER, alpha / (math.sqrt(rank) if root else rank)),
        )
        return ScalesRead(
            {module.name: (plain if module.rank == rank else other) if module.rank else UNIT for module in modules}
        )

    def write(self, targets: Sequence[Target], remembered: Mapping[str, JsonValue]) -> ScalesWritten:
        """Return nothing: it is only read."""
        return ScalesWritten()


def is_of_paddle(bundle: Bundle) -> bool:
    """Say whether the configuration is Paddle's, or the factors lie as Paddle has them."""
    config = bundle.config or {}
    return (sum(name in config for name in _OWN) > 1 and "r" in config) or (
        "peft_type" not in config and are_transposed(bundle.tensors)
    )


class _Paddle(TableReader):
    layout = Layout(("lora_model_state.pdparams", "peft_model.safetensors"), ("lora_config.json",))

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; parts of parallel training, fused weights and other methods are refused (LF209)."""
        config = bundle.config or {}
        for name, what, mend in _REFUSED:
            if config.get(name):
                raise refuse("LF209", f"{bundle.path}: {name}", what, "plain LoRA", mend)
        degrees = [size for name in _PARALLEL if type(size := config.get(name)) is int and size > 1]
        if degrees:
            raise refuse("LF209", bundle.path, f"one of {degrees[0]} parts of parallel training", "the whole", _JOIN)
        fused = next((key for key in sorted(bundle.tensors) if _FUSED.search(key)), None)
        if fused is not None:
            raise refuse("LF209", f"{bundle.path}: {fused}", "a fused weight of Paddle's", "its parts", _ORDERED)
        return super().read(bundle, stated)


SCHEME: Final = _Paddle(
    name="paddle",
    title="PaddleNLP, PaddleFormers: lora_model_state.pdparams and lora_config.json",
    rows=NameTable(
        [
            Row("lora_A", "lora", "lora_A.weight", TRANSPOSED),
            Row("lora_B", "lora", "lora_B.weight", TRANSPOSED),
        ]
    ),
    naming=PlainNaming(),
    scale=_OfTheConfiguration(),
    holds=Holds(kinds=frozenset({"lora"}), slots=frozenset({SlotKind.LINEAR}), scale="one for all"),
    marks=Marks(keys=(r".+\.lora_[AB]$",), neutral=(r".+\.(?:bias|weight)$",), asks=(is_of_paddle,)),
    names="peft",
    aliases=(*NOISE, Alias(rf"^{_FAMILIES}\.(layers\.\d+\.|embed_tokens\.)", r"model.\1")),
)
