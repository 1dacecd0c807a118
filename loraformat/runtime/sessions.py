"""A base with adapters merged in memory, as a session of onnxruntime; no file is written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

from loraformat.arguments import AdapterArgument, AdapterOptions, EffortOptions, HintOptions, StrPath
from loraformat.errors import refuse
from loraformat.in_place import check_no_journal
from loraformat.loading import open_base

if TYPE_CHECKING:
    from loraformat.runtime._adapted_session import AdaptedSession
    from loraformat.runtime._session_options import SessionSettings

Providers: TypeAlias = Sequence[str | tuple[str, Mapping[str, Any]]]


class RuntimeOptions(AdapterOptions, HintOptions, EffortOptions, total=False):
    """What the merge into a session depends on besides base and adapters: as in `PlanOptions` and `WorkOptions`."""

    allow_unmatched: Sequence[str]
    strip_prefix: str | None
    allow_zero: bool
    ignore_fingerprints: bool
    keep_scales: bool
    accept_ranges: bool
    min_retained: float
    warn_retained: float


def session(
    base: StrPath,
    adapters: Sequence[AdapterArgument] = (),
    *,
    providers: Providers | None = None,
    session_options: "SessionSettings | None" = None,
    **options: Unpack[RuntimeOptions],
) -> "AdaptedSession":
    """Return a session of a base with adapters merged into it, in memory.

    The merged weights are bit for bit those that `merge` writes. All others stay in the base's files, which onnxruntime
    maps into memory; the files must not change while a session of them lives.

    Args:
        base: an ONNX model.
        adapters: as in `merge`; none for the base alone.
        providers: execution providers, as onnxruntime takes them; None leaves the choice to it.
        session_options: settings of onnxruntime, of which every session gets a copy; or a function that makes them,
            which settings need that onnxruntime does not copy: custom operators, and devices chosen one by one.
        options: `RuntimeOptions` says what there is; `switch` merges with the same.

    Returns:
        An `onnxruntime.InferenceSession`; its `switch` gives the next one.

    Raises:
        LoraformatError: what `merge` raises; LF810 a base that is no ONNX model, LF811 no onnxruntime, LF812 a graph
            too large to hand over, LF813 settings that cannot be copied.
    """
    from loraformat.bases.onnx_graph import OnnxGraph

    place = Path(base)
    check_no_journal(place.absolute())
    opened = open_base(place)
    if not isinstance(opened, OnnxGraph):
        raise refuse("LF810", place, f"a base of the format {opened.format!r}", "an ONNX model")
    try:
        from loraformat.runtime._adapted_session import AdaptedSession, ServedBase
    except ImportError as error:
        raise refuse("LF811", place, "no onnxruntime", "it installed: pip install 'loraformat[cpu]'") from error
    return AdaptedSession(ServedBase(opened, providers, session_options, options), adapters)
