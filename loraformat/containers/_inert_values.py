"""What a pickle of torch.save may name, and the inert records that stand for it; nothing here is torch, nothing runs.

The names are a fixed list. What is callable in a pickle is a function below that checks the types of its arguments and
returns a record. Source: `torch/_utils.py`, `torch/_tensor.py` and `torch/storage.py` of torch 2.13, and its own list
in `torch/_weights_only_unpickler.py`, of which this is the part that state dicts need.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeGuard

Value: TypeAlias = Any
"""None, bool, int, float, str, bytes, a list or tuple of values, or one of the records below.

Nobody may recurse over them: a pickle can nest them as deep as it likes, and make rings.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A name that the pickle refers to: a function, a class or a dtype of torch."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A member of the archive that holds numbers.

    Attributes:
        dtype: number form that `elements` are counted in; `uint8` for an untyped one.
        key: the member's name below `data/`.
        elements: how many there are.
        typed: whether the tensors in it must be of this form.
    """

    dtype: str
    key: str
    elements: int
    typed: bool


@dataclass(frozen=True, slots=True, eq=False)
class TensorRecord:
    """A view of a storage, unchecked against it.

    Attributes:
        storage: where its numbers are.
        dtype: torch's name of the number form.
        offset: elements of this form before the first one.
        shape: its dimensions.
        strides: elements between neighbours, for each dimension.
        marks: `conj` and `neg`, when the numbers are to be conjugated or negated.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    marks: "Entries | None"


@dataclass(slots=True, eq=False)
class Entries:
    """A dictionary as the pickle builds it: pairs in order, unhashed, so that keys can neither collide nor run code."""

    items: list[tuple[Value, Value]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Elements:
    """A set, likewise unhashed."""

    items: list[Value] = field(default_factory=list)


_MOST_DIMS: Final = 64
"""torch's own limit."""


class UnfitArgumentsError(Exception):
    """A permitted function is called with arguments of other types than its own."""


STORAGES: Final[Mapping[str, str]] = {
    f"torch.{name}Storage": dtype
    for name, dtype in (
        ("Double", "float64"),
        ("Float", "float32"),
        ("Half", "float16"),
        ("BFloat16", "bfloat16"),
        ("Long", "int64"),
        ("Int", "int32"),
        ("Short", "int16"),
        ("Char", "int8"),
        ("Byte", "uint8"),
        ("Bool", "bool"),
        ("ComplexFloat", "complex64"),
        ("ComplexDouble", "complex128"),
    )
} | {"torch.storage.UntypedStorage": "", "torch.UntypedStorage": ""}
"""Class of storage to number form; empty for bytes."""

_DTYPES: Final = frozenset(
    f"torch.{name}"
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
        *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2", "qint8", "qint32", "quint8", "quint4x2", "quint2x4"),
    )
)
_TENSOR_CLASSES: Final = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"})


def make_storage(pid: Value) -> Storage:
    """Return the storage that a persistent id names: `("storage", class, key, location, elements)`."""
    match pid:
        case ("storage", Global(name=form), str(key), str(), elements) if _is_count(elements) and form in STORAGES:
            return Storage(STORAGES[form] or "uint8", key, elements, bool(STORAGES[form]))
    raise UnfitArgumentsError


def _is_count(value: Value) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _are_integers(value: Value) -> TypeGuard[tuple[int, ...]]:
    # The length comes first: one long tuple could be looked through for every tensor.
    return type(value) is tuple and len(value) <= _MOST_DIMS and all(type(number) is int for number in value)


def _view(storage: Value, dtype: str, offset: Value, shape: Value, strides: Value, marks: Value) -> TensorRecord:
    sound = isinstance(storage, Storage) and type(offset) is int and _are_integers(shape) and _are_integers(strides)
    if not sound or len(shape) != len(strides) or not (marks is None or isinstance(marks, Entries)):
        raise UnfitArgumentsError
    return TensorRecord(storage, dtype, offset, shape, strides, marks)


def _rebuild_tensor(storage: Value, offset: Value, shape: Value, strides: Value) -> TensorRecord:
    return _rebuild_tensor_v2(storage, offset, shape, strides, False, Entries())


def _rebuild_tensor_v2(
    storage: Value, offset: Value, shape: Value, strides: Value, grad: Value, hooks: Value, marks: Value = None
) -> TensorRecord:
    if not isinstance(storage, Storage) or not storage.typed:
        raise UnfitArgumentsError
    _check_hooks(grad, hooks)
    return _view(storage, f"torch.{storage.dtype}", offset, shape, strides, marks)


def _rebuild_tensor_v3(
    storage: Value, offset: Value, shape: Value, strides: Value, grad: Value, hooks: Value, dtype: Value, *marks: Value
) -> TensorRecord:
    _check_hooks(grad, hooks)
    untyped = isinstance(storage, Storage) and not storage.typed
    if not untyped or not isinstance(dtype, Global) or dtype.name not in _DTYPES or len(marks) > 1:
        raise UnfitArgumentsError
    return _view(storage, dtype.name, offset, shape, strides, *(marks or (None,)))


def _check_hooks(grad: Value, hooks: Value) -> None:
    if not isinstance(grad, bool) or not isinstance(hooks, Entries):
        raise UnfitArgumentsError


def _rebuild_parameter(tensor: Value, grad: Value, hooks: Value, state: Value = None) -> TensorRecord:
    """Return the tensor itself; `state` holds attributes that someone set on it."""
    _check_hooks(grad, hooks)
    return _parameter(tensor, grad)


def _parameter(tensor: Value, grad: Value = True) -> TensorRecord:
    if not isinstance(tensor, TensorRecord) or not isinstance(grad, bool):
        raise UnfitArgumentsError
    return tensor


def _rebuild_from_type_v2(function: Value, kind: Value, arguments: Value, state: Value) -> TensorRecord:
    """Return the tensor of `function(*arguments)`, for tensors with attributes; other subclasses are not known."""
    known = isinstance(kind, Global) and kind.name in _TENSOR_CLASSES
    if not known or not isinstance(function, Global) or function.name not in _REBUILDERS:
        raise UnfitArgumentsError
    tensor = call(function, arguments)
    assert isinstance(tensor, TensorRecord)
    return tensor


def _make_dict() -> Entries:
    return Entries()


def _make_set(items: Value) -> Elements:
    """Return the set of a list, which it shares: a copy for every call would let a small file ask for much memory."""
    if type(items) is not list:
        raise UnfitArgumentsError
    return Elements(items)


def _make_size(items: Value) -> tuple[int, ...]:
    if not _are_integers(items):
        raise UnfitArgumentsError
    return items


def _make_device(kind: Value, index: Value = 0) -> str:
    if type(kind) is not str or type(index) is not int:
        raise UnfitArgumentsError
    return kind


def _encode(text: Value, encoding: Value) -> str:
    """Return what protocol 2 writes for bytes, still as the text of their Latin-1 characters."""
    if type(text) is not str or encoding != "latin1":
        raise UnfitArgumentsError
    return text


_REBUILDERS: Final[Mapping[str, Callable[..., Value]]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch.nn.parameter.Parameter": _parameter,
}
_CALLABLE: Final[Mapping[str, Callable[..., Value]]] = {
    **_REBUILDERS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type_v2,
    "torch.Size": _make_size,
    "torch.device": _make_device,
    "collections.OrderedDict": _make_dict,
    "builtins.dict": _make_dict,
    "builtins.set": _make_set,
    "builtins.frozenset": _make_set,
    "_codecs.encode": _encode,
}
_GLOBALS: Final = frozenset(_CALLABLE) | STORAGES.keys() | _DTYPES | _TENSOR_CLASSES


def find_global(module: str, name: str) -> Global | None:
    """Return the record of a permitted name, else None; `__builtin__` is what protocol 2 calls `builtins`."""
    full = f"{'builtins' if module == '__builtin__' else module}.{name}"
    return Global(full) if full in _GLOBALS else None


def call(function: Value, arguments: Value) -> Value:
    """Return the record that stands for `function(*arguments)`.

    Raises:
        UnfitArgumentsError: `function` is not callable, or not with these.
    """
    target = _CALLABLE.get(function.name) if isinstance(function, Global) else None
    if target is None or type(arguments) is not tuple:
        raise UnfitArgumentsError
    try:
        return target(*arguments)
    except TypeError as error:  # Another number of arguments.
        raise UnfitArgumentsError from error
