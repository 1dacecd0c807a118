"""AdapterHub's `adapters`: `<module>.loras.<name>.lora_A` beside an `adapter_config.json` of its own form.

Scale: alpha / r of that configuration. Source: adapter-hub/adapters 1.3, methods/lora.py, configuration.
"""

from typing import Final

from loraformat.adapter import Adapter, ScalingRule, SlotKind
from loraformat.errors import refuse
from loraformat.schemes import Bundle, Holds, Layout, StatedScale
from loraformat.schemes._engine import TableReader
from loraformat.schemes._marks import Marks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._one_scale import ConfigScale, inner
from loraformat.schemes._table import NameTable, Row


class _AdapterHub(TableReader):
    layout = Layout(("adapter.safetensors", "pytorch_adapter.bin"), ("adapter_config.json",))

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; (IA)³, which has the same names, is refused."""
        mode = inner(bundle.config or {}, "config", "composition_mode")
        if mode not in (None, "add"):
            raise refuse("LF209", bundle.path, f"the composition mode {mode!r:.40}", "add, which is LoRA")
        return super().read(bundle, stated)


SCHEME: Final = _AdapterHub(
    name="adapterhub",
    title="AdapterHub: LoRA of the adapters library",
    rows=NameTable(
        [
            Row("loras.{adapter}.lora_A", "lora", "lora_A.weight"),
            Row("loras.{adapter}.lora_B", "lora", "lora_B.weight"),
            Row("loras.{adapter}.m.weight", "dora", "lora_magnitude_vector"),
            Row("loras.{adapter}.gate.weight", "gated lora", "gate.weight"),
            Row("loras.{adapter}.gate.bias", "gated lora", "gate.bias"),
        ]
    ),
    naming=PlainNaming(),
    scale=ConfigScale(
        lambda config: inner(config, "config", "alpha"),
        ScalingRule.ALPHA_OVER_RANK,
        lambda targets, before: dict(before),
    ),
    holds=Holds(kinds=frozenset({"lora", "dora"}), slots=frozenset({SlotKind.LINEAR}), scale="one for all"),
    marks=Marks(keys=(r".+\.loras\.[^.]+\.(?:lora_[AB]|m\.weight|gate\.)",)),
    names="peft",
)
