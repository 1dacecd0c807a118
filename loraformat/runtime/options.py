"""What a session in memory can be asked for."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from loraformat.arguments import AdapterOptions, EffortOptions, HintOptions
from loraformat.planning.wishes import NumberWishes

Providers: TypeAlias = Sequence[str | tuple[str, Mapping[str, Any]]]
"""Execution providers, as onnxruntime takes them."""


class RuntimeOptions(AdapterOptions, HintOptions, EffortOptions, NumberWishes, total=False):
    """What the merge into a session depends on besides base and adapters.

    Attributes:
        min_retained: as in `WorkOptions`, like `warn_retained`.
        warn_retained: the same.
        keep_merged: keep merged weights beside onnxruntime's copy of them, so that a session to come need not compute
            those again that it has in common with a living one.
    """

    min_retained: float
    warn_retained: float
    keep_merged: bool
