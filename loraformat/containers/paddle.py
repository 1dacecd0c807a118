"""Paddle's `.pdparams`: a pickle of one dictionary from names to numpy arrays, as `paddle.save` writes it.

Nothing is executed, and the numbers stay where they are in the file (`_pickled_arrays`). Paddle has bfloat16 as numpy's
uint16. Source: PaddlePaddle 3.3, python/paddle/framework/io.py.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraformat.containers import TensorFile, open_indexed
from loraformat.containers._inert_values import Entries, Value
from loraformat.containers._pickled_arrays import Array, read_arrays
from loraformat.containers._strided import StridedTensor, check_name, check_shape, is_c_order
from loraformat.dtypes import BY_NAME, Dtype
from loraformat.errors import refuse
from loraformat.limits import MAX_TENSORS
from loraformat.signatures import HEAD_BYTES, describe_head
from loraformat.spans import InputFile, Span, StoredTensor

_BEGINNING: Final = re.compile(rb"\x80[\x03\x04](?:\x95.{8})?\}(?:\x94|q.)\(?[\x8cX]", re.DOTALL)
"""A pickle whose first value is a dictionary with a text as its first key."""
_PARAMETERS: Final = "StructuredToParameterName@@"
"""A dictionary beside the arrays: what Paddle called them while it ran."""
_DTYPES: Final[Mapping[str, Dtype]] = {
    code: BY_NAME[name]
    for code, name in (
        *(("f8", "float64"), ("f4", "float32"), ("f2", "float16"), ("u2", "bfloat16"), ("i8", "int64")),
        *(("i4", "int32"), ("i2", "int16"), ("i1", "int8"), ("u1", "uint8"), ("b1", "bool")),
    )
}


@dataclass(frozen=True, slots=True)
class Paddle:
    """The container of paddle.save."""

    name: str = "paddle"
    suffixes: tuple[str, ...] = (".pdparams",)
    has_magic: bool = True

    def sniff(self, head: bytes, size_bytes: int) -> bool:
        """Say whether the file begins as a pickled dictionary does."""
        return _BEGINNING.match(head) is not None

    def open(self, path: Path | InputFile) -> TensorFile:
        """Read the pickle without executing it, and return the arrays in the order of the dictionary.

        Raises:
            InputError: LF101, LF105, LF106, LF109, LF111, LF112, LF114, LF121, LF123, LF301.
            RefusedError: LF110, LF901.
        """
        return open_indexed(path, _index)


CONTAINER: Final = Paddle()


def _index(file: InputFile) -> TensorFile:
    if not file.size_bytes:
        raise refuse("LF101", file.path, "an empty file", "what paddle.save writes")
    head = file.read(0, min(HEAD_BYTES, file.size_bytes))
    if not CONTAINER.sniff(head, file.size_bytes):
        described = describe_head(head)
        found, mend = (described.what, described.mend) if described else ("a file of no known format", "")
        raise refuse("LF111" if described else "LF121", file.path, found, "what paddle.save writes", mend)
    value = read_arrays(file)
    pairs = value.items if isinstance(value, Entries) else []
    if len(pairs) > MAX_TENSORS:
        raise refuse("LF110", file.path, f"{len(pairs)} values", f"at most {MAX_TENSORS}")
    tensors: dict[str, StoredTensor] = {}
    for key, each in pairs:
        if key == _PARAMETERS and isinstance(each, Entries):
            continue
        tensor = _place(file, key, each)
        if tensor.name in tensors:
            raise refuse("LF105", file.path, f"two arrays {tensor.name!r}", "each name once")
        tensors[tensor.name] = tensor
    return TensorFile(file, tensors, {})


def _place(file: InputFile, key: Value, value: Value) -> StoredTensor:
    """Return the tensor of an array, after comparing its shape with its bytes."""
    if not isinstance(key, str) or not isinstance(value, Array) or value.form is None or value.shape is None:
        found = f"a value that is no array of numbers, under {key!r:.80}"
        raise refuse("LF111", file.path, found, "a dictionary of arrays", "Save the parameters alone.")
    check_name(file.path, key)
    where, shape, data = f"{file.path}, array {key!r}", value.shape, value.data
    assert data is not None, "an array has all of its state or none"
    if value.form.order == ">":
        raise refuse("LF112", where, "numbers in big-endian order", "little")
    dtype = _DTYPES.get(value.form.code)
    if dtype is None or value.form.order not in ("<", "|"):
        found = f"dtype {value.form.order!r:.10}{value.form.code!r:.40}"
        raise refuse("LF106", where, found, f"one of {', '.join(_DTYPES)}")
    check_shape(where, shape, dtype, "LF114")
    if data.length != dtype.count_bytes(math.prod(shape)):
        found = f"{data.length} bytes for {dtype.name} {list(shape)}"
        raise refuse("LF114", where, found, f"{dtype.count_bytes(math.prod(shape))}")
    span = Span(file.path, data.offset, data.length)
    strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
    if value.in_fortran_order and span.length and not is_c_order(shape, strides):
        return StridedTensor(key, dtype, shape, strides, span, file)
    return StoredTensor(key, dtype, shape, span, file)
