"""ONNX Runtime's `.onnx_adapter`: A stored `(in, rank)`, B stored `(rank, out)`, the scale folded into B.

Names are those of the graph's inputs, in exports of Olive and onnxruntime-genai those of transformers. Source:
microsoft/Olive (convert_adapters.py), microsoft/onnxruntime (lora/adapter_format).
"""

from typing import Final

from loraformat.adapter import SlotKind
from loraformat.schemes import Bundle, Holds
from loraformat.schemes._files import FiledScheme, fold_scales
from loraformat.schemes._marks import Marks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._one_scale import Folded
from loraformat.schemes._table import TRANSPOSED, NameTable, Row


def _has_versions(bundle: Bundle) -> bool:
    """Say whether the file's annotations are those of the container."""
    return {"format_version", "adapter_version", "model_version"} <= set(bundle.metadata)


SCHEME: Final = FiledScheme(
    name="onnx_adapter",
    title="ONNX Runtime: .onnx_adapter, transposed, the scale folded",
    rows=NameTable(
        [
            Row("lora_A.weight", "lora", "lora_A.weight", TRANSPOSED),
            Row("lora_B.weight", "lora", "lora_B.weight", TRANSPOSED),
        ]
    ),
    naming=PlainNaming(),
    scale=Folded(),
    marks=Marks(keys=(r".+\.lora_[AB]\.weight$",), asks=(_has_versions,)),
    holds=Holds(
        kinds=frozenset({"lora"}),
        slots=frozenset({SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED}),
        scale="folded",
    ),
    names="onnx_adapter",
    fits=(fold_scales,),
    container="onnx_adapter",
    annotates=False,
)
