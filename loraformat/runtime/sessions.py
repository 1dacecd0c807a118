"""A base with adapters merged in memory, as a session of onnxruntime; no file is written."""

from pathlib import Path
from typing import TYPE_CHECKING, Final, Unpack

from loraformat.apply.in_place import check_no_journal
from loraformat.arguments import AdapterArguments, StrPath, check_options
from loraformat.errors import refuse
from loraformat.loading import open_base
from loraformat.runtime.options import Providers, RuntimeOptions

if TYPE_CHECKING:
    from loraformat.runtime._adapted_session import AdaptedSession
    from loraformat.runtime._session_options import SessionSettings

_LEAST_VERSION: Final = (1, 21)
"""The first that looks in a folder for the external data of a model that it is handed over in memory."""


def session(
    base: StrPath,
    adapters: AdapterArguments = (),
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
        LoraformatError: what `merge` raises; LF810 a base that is no ONNX model, LF811 no onnxruntime, or an old
            one, LF812 a graph too large to hand over, LF813 settings that cannot be copied.
    """
    from loraformat.bases.onnx_graph import OnnxGraph

    check_options("session", options, RuntimeOptions)
    place = Path(base)
    check_no_journal(place.absolute())
    opened = open_base(place)
    if not isinstance(opened, OnnxGraph):
        raise refuse("LF810", place, f"a base of the format {opened.format!r}", "an ONNX model")
    _check_onnxruntime()
    from loraformat.runtime._adapted_session import AdaptedSession, ServedBase

    return AdaptedSession(ServedBase(opened, providers, session_options, options), adapters)


def _check_onnxruntime() -> None:
    try:
        import onnxruntime
    except ImportError as error:
        raise refuse("LF811", "onnxruntime", "no such package", _describe_version(_LEAST_VERSION)) from error
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < _LEAST_VERSION:
        raise refuse("LF811", "onnxruntime", onnxruntime.__version__, _describe_version(_LEAST_VERSION))


def _describe_version(version: tuple[int, ...]) -> str:
    return f"{'.'.join(map(str, version))} or later"
