"""Which of the values in a torch checkpoint are its named tensors, and what else lies beside them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraformat.containers._inert_values import Elements, Entries, Global, TensorRecord, Value
from loraformat.containers._strided import check_name
from loraformat.errors import refuse
from loraformat.limits import MAX_LISTED_VALUES, MAX_TENSORS, MAX_VALUE_CHARACTERS

WRAPPERS: Final = ("state_dict", "model", "model_state_dict", "module")
"""Keys under which trainers keep the state dict beside their own state."""

WRAPPER_KEY: Final = "torch.wrapper"
VALUE_KEY: Final = "torch.value."
UNLISTED_KEY: Final = "torch.values_unlisted"

_SHORT: Final = 8
_SCALARS: Final = (type(None), bool, int, float, str, bytes)


@dataclass(frozen=True, slots=True)
class Named:
    """The content of a checkpoint.

    Attributes:
        tensors: name to view, in the order of the file.
        metadata: the wrapper's key as `torch.wrapper`, and what is no tensor as `torch.value.<name>`, shortened.
    """

    tensors: Mapping[str, TensorRecord]
    metadata: Mapping[str, str]


def name_tensors(value: Value, path: Path) -> Named:
    """Return the tensors of a dictionary, a list or a wrapped dictionary.

    A list's tensors are named by their position. Of nested dictionaries only one is opened, one level deep: that under
    one of `WRAPPERS`, and its names stay as they are inside it.

    Raises:
        InputError: LF111 no collection of tensors, LF105 two names or two wrappers, LF109 a name that is no text,
            LF301 an unfit name.
        RefusedError: LF110 beyond a limit.
    """
    pairs = _list_pairs(value)
    if pairs is None:
        found = f"{_show(value)} instead of named tensors"
        mend = "Save a state dict: torch.save(module.state_dict(), path)."
        raise refuse("LF111", path, found, "a dictionary or list of tensors", mend)
    wrapper = _find_wrapper(pairs, path)
    if wrapper is None:
        return Named(_collect(pairs, path), _list_values(pairs))
    key, inner = wrapper
    outer = [pair for pair in pairs if pair[1] is not inner]
    shown = _list_values([*((name, _Shown(item)) for name, item in outer), *inner.items])
    return Named(_collect(inner.items, path), {WRAPPER_KEY: key, **shown})


@dataclass(frozen=True, slots=True, eq=False)
class _Shown:
    """A value beside the wrapper: listed even when it is a tensor."""

    value: Value


def _list_pairs(value: Value) -> list[tuple[Value, Value]] | None:
    if isinstance(value, Entries):
        return value.items
    return list(enumerate(value)) if isinstance(value, list | tuple) else None


def _holds_tensors(value: Value) -> bool:
    return isinstance(value, Entries) and any(isinstance(item, TensorRecord) for _, item in value.items)


def _find_wrapper(pairs: list[tuple[Value, Value]], path: Path) -> tuple[str, Entries] | None:
    """Return the one wrapper; single numbers beside it are a trainer's state, larger tensors are an ambiguity."""
    nested = [(key, value) for key, value in pairs if _holds_tensors(value)]
    wrappers = [(key, value) for key, value in nested if type(key) is str and key in WRAPPERS]
    beside = [key for key, value in pairs if isinstance(value, TensorRecord) and (math.prod(value.shape[:64]) > 1)]
    if len(wrappers) > 1 or (wrappers and beside):
        names = ", ".join(_show(key) for key in [*[key for key, _ in wrappers], *beside][:4])
        raise refuse("LF105", path, f"tensors under {names}", "one dictionary of tensors", "Save the inner one alone.")
    direct = any(isinstance(value, TensorRecord) for _, value in pairs)
    if nested and not wrappers and not direct:
        names = ", ".join(_show(key) for key, _ in nested[:4])
        expected = f"tensors at the top, or under {', '.join(WRAPPERS)}"
        raise refuse("LF111", path, f"tensors only under {names}", expected, "Save the inner dictionary alone.")
    return wrappers[0] if wrappers else None


def _collect(pairs: list[tuple[Value, Value]], path: Path) -> dict[str, TensorRecord]:
    tensors: dict[str, TensorRecord] = {}
    for key, value in pairs:
        if not isinstance(value, TensorRecord):
            continue
        if type(key) not in (str, int):
            raise refuse("LF109", path, f"a tensor under {_show(key)}", "a text as name")
        name = str(key)
        check_name(path, name)
        if name in tensors:
            raise refuse("LF105", path, f"two tensors {name!r}", "each name once")
        tensors[name] = value
    if len(tensors) > MAX_TENSORS:
        raise refuse("LF110", path, f"{len(tensors)} tensors", f"at most {MAX_TENSORS}")
    return tensors


def _list_values(pairs: list[tuple[Value, Value]]) -> dict[str, str]:
    others = [(key, value) for key, value in pairs if not isinstance(value, TensorRecord)]
    listed = {}
    for key, value in others[:MAX_LISTED_VALUES]:
        shown = repr(key[:MAX_VALUE_CHARACTERS])[1:-1] if isinstance(key, str) else _show(key)
        listed[VALUE_KEY + shown] = _show(value.value if isinstance(value, _Shown) else value)
    if len(others) > MAX_LISTED_VALUES:
        listed[UNLISTED_KEY] = str(len(others) - MAX_LISTED_VALUES)
    return listed


def _show(value: Value) -> str:
    """Return a short text for any value, without going deeper than one level."""
    return "".join(_pieces(value))[:MAX_VALUE_CHARACTERS]


def _pieces(value: Value) -> Iterator[str]:
    if isinstance(value, str | bytes):
        yield repr(value[:MAX_VALUE_CHARACTERS])
    elif isinstance(value, _SCALARS):
        yield repr(value)
    elif isinstance(value, Global):
        yield value.name
    elif isinstance(value, TensorRecord):
        yield f"a tensor {list(value.shape)} of {value.dtype}"
    elif isinstance(value, list | tuple) and len(value) <= _SHORT and all(isinstance(each, _SCALARS) for each in value):
        yield f"[{', '.join(map(_show, value))}]"
    else:
        yield _count(value)


def _count(value: Value) -> str:
    items = value.items if isinstance(value, Entries | Elements) else value
    kind = {Entries: "dict", Elements: "set"}.get(type(value), type(value).__name__)
    tensors = ", with tensors" if _holds_tensors(value) else ""
    return f"a {kind} of {len(items)}{tensors}" if isinstance(items, list | tuple) else f"a {kind}"
