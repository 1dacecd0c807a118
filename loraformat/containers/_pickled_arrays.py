"""Arrays of numpy as a pickle has them, and the machine that reads one without holding their numbers.

An array is a call of `_reconstruct` and a state: version, shape, number form, order, bytes. The bytes stay in the file;
what stands on the stack is where they lie. Source: numpy 2.4, `_core/src/multiarray/methods.c` (`array_reduce`) and
`descriptor.c` (`arraydescr_reduce`); protocols 3 and 4 of pickle.
"""

import struct
from dataclasses import dataclass
from typing import Final

from loraformat.containers._inert_pickle import ACTIONS
from loraformat.containers._inert_values import Global, UnfitArgumentsError, Value, call, find_global
from loraformat.containers._pickle_machine import Actions, Machine
from loraformat.errors import refuse
from loraformat.spans import InputFile

_PAGE_BYTES: Final = 1 << 16
_RECONSTRUCT: Final = "numpy._core.multiarray._reconstruct"
_NDARRAY: Final = "numpy.ndarray"
_DTYPE: Final = "numpy.dtype"
_NAMES: Final = {
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,  # Before numpy 2.
    **{name: name for name in (_RECONSTRUCT, _NDARRAY, _DTYPE)},
}
_U8, _U32, _U64 = (struct.Struct(f"<{letter}") for letter in "BIQ")


@dataclass(frozen=True, slots=True, eq=False)
class Bytes:
    """A string of bytes that stays in the file: where it begins, and how long it is."""

    offset: int
    length: int


@dataclass(slots=True, eq=False)
class Form:
    """A number form: numpy's letter and size, such as `f4`, and the order of its bytes."""

    code: str
    order: Value = ""


@dataclass(slots=True, eq=False)
class Array:
    """An array; its state is None until the pickle gives it one."""

    shape: tuple[int, ...] | None = None
    form: Form | None = None
    in_fortran_order: bool = False
    data: Bytes | None = None


class Pages:
    """A file as the machine looks at it, of which one page is held."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._start = 0
        self._page = b""

    def __len__(self) -> int:
        return self._file.size_bytes

    def __getitem__(self, place: int | slice) -> Value:
        if isinstance(place, int):
            return self._look(place, 1)[0]
        start, stop, _ = place.indices(len(self))
        return self._look(start, max(stop - start, 0))

    def find(self, sought: bytes, start: int, end: int) -> int:
        """Return where `sought` begins between two places, -1 for nowhere."""
        found = self[start:end].find(sought)
        return found if found < 0 else start + int(found)

    def _look(self, start: int, length: int) -> bytes:
        if not self._start <= start <= start + length <= self._start + len(self._page):
            wanted = min(max(length, _PAGE_BYTES), len(self) - start)
            self._start, self._page = start, self._file.read(start, wanted)
        return self._page[start - self._start : start - self._start + length]


class ArrayMachine(Machine):
    """The machine of `_inert_pickle`, for dictionaries of arrays."""

    def __init__(self, file: InputFile) -> None:
        super().__init__(Pages(file), str(file.path))  # type: ignore[arg-type]  # all that it asks of bytes

    def take_number(self, form: struct.Struct) -> Value:
        """Return the number that stands next."""
        return form.unpack(self._take(form.size))[0]

    def push_span(self, form: struct.Struct) -> None:
        """Step over a string of bytes."""
        length = self.take_number(form)
        if length > len(self._data) - self._place:
            self._fail(f"a string of {length} bytes", "one inside the file")
        self._stack.append(Bytes(self._place, length))
        self._place += length

    def find_name(self, module: str, name: str) -> Global | None:
        """Return the record of a name of numpy's, or of those that every pickle of tensors may have."""
        own = _NAMES.get(f"{module}.{name}")
        return Global(own) if own else find_global(module, name)

    def call(self, function: Value, arguments: Value) -> Value:
        """Return the record of an array or of a number form; raises UnfitArgumentsError."""
        name = function.name if isinstance(function, Global) else ""
        match (name, arguments):
            case ("numpy._core.multiarray._reconstruct", (Global(name="numpy.ndarray"), (0,), Bytes())):
                return Array()
            case ("numpy.dtype", (str(code), False, True)):
                return Form(code)
        if name in (_RECONSTRUCT, _DTYPE):
            raise UnfitArgumentsError
        return call(function, arguments)

    def build(self) -> None:
        """Give the array or number form below it its state, which is made of plain values."""
        top = self._stack[-2] if len(self._stack) > 1 else None
        if not isinstance(top, Array | Form):
            super().build()
            return
        state, _ = self._pop(1)[0], self._top()
        match top, state:
            case Array(shape=None), (1, tuple(shape), Form() as form, bool(fortran), Bytes() as data) if all(
                type(size) is int for size in shape
            ):
                top.shape, top.form, top.in_fortran_order, top.data = shape, form, fortran, data
            case Form(order=""), (int(), str(order), None, None, None, -1, -1, int()):
                top.order = order
            case _:
                found = f"a state that is no {'array' if isinstance(top, Array) else 'number form'}'s"
                raise refuse("LF901", self._where, found, "what numpy writes of arrays of numbers")


def read_arrays(file: InputFile) -> Value:
    """Return what the pickle in a file builds, its arrays as `Array`s; raises as `read_pickle` does."""
    return ArrayMachine(file).run(_ACTIONS)


_ACTIONS: Final[Actions] = {
    **ACTIONS,
    0x95: (ArrayMachine.take_number, (_U64,)),
    ord("C"): (ArrayMachine.push_span, (_U8,)),
    ord("B"): (ArrayMachine.push_span, (_U32,)),
    0x8E: (ArrayMachine.push_span, (_U64,)),
    ord("b"): (ArrayMachine.build, ()),
}
