"""litgpt's adapter_v2: `lit_model.pth.adapter_v2`, a scale and a bias for every linear layer, norms trained with them.

The same method trains LLaMA-Adapter's gated attention beside it, from block `adapter_start_layer` on; a file with gates
other than 0 does more than any weight can. Source: Lightning-AI/litgpt 0.5, adapter_v2.py.
"""

from dataclasses import replace
from typing import Final

from loraformat.adapter import Adapter, Factor, SlotKind
from loraformat.problems import Problem
from loraformat.recognition import recognise_tensors
from loraformat.schemes import DECODERS, Bundle, Holds, Layout, StatedScale
from loraformat.schemes._engine import TableReader
from loraformat.schemes._marks import Marks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._one_scale import Folded
from loraformat.schemes._table import NameTable, Row

_GATE: Final = ".gating_factor"
_PROMPT: Final = ".adapter_wte.weight"
_MEND: Final = "Train with adapter_start_layer beyond the last block, or load it with litgpt."


class _AdapterV2(TableReader):
    layout = Layout(("lit_model.pth.adapter_v2",), ("model_config.yaml",))

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter without the gated attention, which must be shut."""
        gates = {key: factor for key, factor in bundle.tensors.items() if key.endswith((_GATE, _PROMPT))}
        rest = {key: factor for key, factor in bundle.tensors.items() if key not in gates}
        adapter = super().read(replace(bundle, tensors=rest), stated)
        problems = [_refuse(bundle, key) for key, factor in sorted(gates.items()) if _is_open(key, factor)]
        found = f"{len(gates)} tensors of gated attention, whose gates are 0"
        notes = [Problem("LF226", str(bundle.path), found, severity="note")] if gates and not problems else []
        absorbed = (*adapter.absorbed, *gates.values())
        return replace(adapter, problems=(*adapter.problems, *problems, *notes), absorbed=absorbed)


def _is_open(key: str, factor: Factor) -> bool:
    return key.endswith(_GATE) and bool(factor.read().any())


def _refuse(bundle: Bundle, key: str) -> Problem:
    known = recognise_tensors([key])
    assert known is not None, "the table has it"
    return replace(known.as_problem(f"{bundle.path}: {key}"), mend=_MEND)


SCHEME: Final = _AdapterV2(
    name="litgpt_adapter_v2",
    title="litgpt: lit_model.pth.adapter_v2, a scale and a bias for each layer",
    rows=NameTable(
        [
            Row("adapter_scale", "adapter_v2", "adapter_scale"),
            Row("adapter_bias", "adapter_v2", "adapter_bias"),
            Row("weight", "replace", "weight"),
            Row("bias", "replace", "bias"),
        ]
    ),
    naming=PlainNaming(),
    scale=Folded(),
    marks=Marks(keys=(r".+\.adapter_(?:scale|bias)$",), neutral=(r".+\.(?:norm_[12]|ln_f)\.(?:weight|bias)$",)),
    holds=Holds(
        kinds=frozenset({"adapter_v2", "replace"}),
        slots=frozenset({SlotKind.LINEAR, SlotKind.PARAMETER}),
        scale="folded",
        models=DECODERS,
    ),
    names="litgpt",
)
