"""Settings of onnxruntime, a copy for each session: what is added to one must not reach the next."""

from collections.abc import Callable
from typing import Final, TypeAlias

import onnxruntime

from loraformat.errors import refuse

SessionSettings: TypeAlias = onnxruntime.SessionOptions | Callable[[], onnxruntime.SessionOptions]

_CPU: Final = "CPUExecutionProvider"
_WRITES: Final[tuple[tuple[str, bool | str], ...]] = (("enable_profiling", False), ("optimized_model_filepath", ""))
"""Settings that have a session write files, and what does not."""


def copy_settings(settings: SessionSettings) -> onnxruntime.SessionOptions:
    """Return settings that nobody else holds: what the function makes, or a copy of the object.

    onnxruntime copies them only into a session, which gives them out again; LF813 for what it does not copy.
    """
    if not isinstance(settings, onnxruntime.SessionOptions):
        return settings()
    if getattr(settings, "has_providers", bool)():  # onnxruntime 1.22 and later
        raise refuse("LF813", "session_options", "devices, which onnxruntime does not copy", "a function")
    kept = {name: getattr(settings, name) for name, _ in _WRITES}
    try:
        for name, value in _WRITES:
            setattr(settings, name, value)
        copied = onnxruntime.InferenceSession(
            _make_smallest(), settings, ["CPUExecutionProvider"]
        ).get_session_options()
    finally:
        for name, value in kept.items():
            setattr(settings, name, value)
    for name, value in kept.items():
        setattr(copied, name, value)
    return copied


def _make_smallest() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "copy", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data
