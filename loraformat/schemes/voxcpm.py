"""VoxCPM, a speech model: `<module>.lora_A` in `lora_weights.safetensors`, beside `lora_config.json`.

Scale: alpha / r of `lora_config` in that configuration. Source: OpenBMB/VoxCPM, modules/layers/lora.py and
scripts/train_voxcpm_finetune.py.
"""

from typing import Final

from loraformat.adapter import ScalingRule, SlotKind
from loraformat.schemes import Bundle, Holds, Layout
from loraformat.schemes._engine import TableReader
from loraformat.schemes._marks import Marks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._one_scale import ConfigScale, inner
from loraformat.schemes._table import NameTable, Row

_FIELD: Final = "lora_config"


def _has_its_configuration(bundle: Bundle) -> bool:
    return _FIELD in (bundle.config or {})


class _VoxCpm(TableReader):
    layout = Layout(("lora_weights.safetensors", "lora_weights.ckpt"), ("lora_config.json",))


SCHEME: Final = _VoxCpm(
    name="voxcpm",
    title="VoxCPM: lora_weights.safetensors and lora_config.json",
    rows=NameTable([Row("lora_A", "lora", "lora_A.weight"), Row("lora_B", "lora", "lora_B.weight")]),
    naming=PlainNaming(),
    scale=ConfigScale(
        lambda config: inner(config, _FIELD, "alpha"),
        ScalingRule.ALPHA_OVER_RANK,
        lambda targets, before: dict(before),
    ),
    holds=Holds(kinds=frozenset({"lora"}), slots=frozenset({SlotKind.LINEAR}), scale="one for all"),
    marks=Marks(keys=(r".+\.lora_[AB]$",), asks=(_has_its_configuration,)),
)
