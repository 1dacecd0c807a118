"""Adapters on a model that runs on onnxruntime: merged in memory, or as inputs of the model itself.

runtime.session("base.onnx", [("style.safetensors", 0.8)])

runtime.export_runtime("base.onnx", ["style.safetensors"], "base.lora.onnx")
runtime.export_adapter("base.lora.onnx", ["style.safetensors"], "style.onnx_adapter")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraformat.runtime._adapted_session import AdaptedSession, SwitchCost
    from loraformat.runtime.adapters import ExportedAdapter, adapter_feeds, export_adapter
    from loraformat.runtime.batched import ADAPTER_INDEX
    from loraformat.runtime.export import RuntimeExport, export_runtime
    from loraformat.runtime.options import RuntimeOptions
    from loraformat.runtime.sessions import session

__all__ = [
    "ADAPTER_INDEX",
    "AdaptedSession",
    "ExportedAdapter",
    "RuntimeExport",
    "RuntimeOptions",
    "SwitchCost",
    "adapter_feeds",
    "export_adapter",
    "export_runtime",
    "session",
]

_HOMES = {
    "ADAPTER_INDEX": "loraformat.runtime.batched",
    "ExportedAdapter": "loraformat.runtime.adapters",
    "RuntimeExport": "loraformat.runtime.export",
    "AdaptedSession": "loraformat.runtime._adapted_session",
    "SwitchCost": "loraformat.runtime._adapted_session",
    "RuntimeOptions": "loraformat.runtime.options",
    "adapter_feeds": "loraformat.runtime.adapters",
    "export_adapter": "loraformat.runtime.adapters",
    "export_runtime": "loraformat.runtime.export",
    "session": "loraformat.runtime.sessions",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
