"""ExecuTorch and torchtitan: torchtune's tensors under Meta's names, `layers.0.attention.wq.lora_a.weight`.

Rotary rows are as the model that runs has them: interleaved for Llama, in halves for Qwen. One rank and one alpha for
all, in ExecuTorch's case in a configuration in PEFT's form; torchtitan's checkpoints state none. Since its 0.3 the
module of queries is `attention.qkv_linear.wq`. Source: pytorch/executorch 1.5, examples/models/llama;
pytorch/torchtitan 0.3, components/lora.py and models/llama3/state_dict_adapter.py.
"""

from typing import Final

from loraformat.adapter import ScalingRule, SlotKind
from loraformat.schemes import DECODERS, Holds
from loraformat.schemes._engine import TableReader
from loraformat.schemes._marks import NOISE, Alias, Marks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._one_scale import ConfigScale
from loraformat.schemes._table import NameTable, Row

_BLOCK: Final = r"layers\.\d+\.(?:attention\.(?:qkv_linear\.)?w[qkvo]|feed_forward\.w[123])"

SCHEME: Final = TableReader(
    name="executorch",
    title="ExecuTorch, torchtitan: Meta's names with torchtune's tensors",
    rows=NameTable(
        [Row("lora_a.weight", "lora", "lora_A.weight"), Row("lora_b.weight", "lora", "lora_B.weight")],
    ),
    naming=PlainNaming(),
    scale=ConfigScale(
        lambda config: config.get("lora_alpha"), ScalingRule.ALPHA_OVER_RANK, lambda targets, before: dict(before)
    ),
    marks=Marks(keys=(rf"{_BLOCK}\.lora_[ab]\.weight$",)),
    holds=Holds(
        kinds=frozenset({"lora"}),
        slots=frozenset({SlotKind.LINEAR}),
        scale="one for all",
        models=DECODERS,
    ),
    names="executorch",
    aliases=(*NOISE, Alias(r"\.attention\.qkv_linear\.(w[qkv]\.)", r".attention.\1")),
)
