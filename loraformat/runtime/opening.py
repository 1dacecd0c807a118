"""Opening the models that run-time adapters are for."""

from pathlib import Path

from loraformat.arguments import StrPath
from loraformat.bases.onnx_graph import OnnxGraph
from loraformat.errors import refuse
from loraformat.loading import open_base


def open_model(path: StrPath) -> OnnxGraph:
    """Index an ONNX model; LF828 for any other."""
    opened = open_base(Path(path))
    if not isinstance(opened, OnnxGraph):
        raise refuse("LF828", opened.path, f"a base of the format {opened.format!r}", "an ONNX model")
    return opened
