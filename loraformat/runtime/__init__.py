"""Adapters on a model that runs on onnxruntime.

`session` merges into memory: an `onnxruntime.InferenceSession` of a base with adapters, which gives the next one with
others. onnxruntime is imported when a session is made.
"""

from loraformat.runtime.sessions import RuntimeOptions, session

__all__ = ["RuntimeOptions", "session"]
