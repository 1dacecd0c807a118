"""`.onnx_adapter`: the adapters that ONNX Runtime loads beside a model, a flatbuffer of named tensors.

Source: `onnxruntime/lora/adapter_format/adapter_schema.fbs` of onnxruntime 1.21: a root table of three versions and the
parameters; a parameter has name, dimensions, data type (ONNX's numbers) and raw bytes, in that order.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Final

from loraformat.containers import TensorFile, open_indexed
from loraformat.containers._flatbuffer import Buffer, Table
from loraformat.containers._new_tensors import NewTensor, check_new, payload_bytes
from loraformat.containers._strided import check_name, check_shape
from loraformat.dtypes import BY_ONNX
from loraformat.errors import refuse
from loraformat.limits import MAX_FLATBUFFER_BYTES, MAX_TENSORS
from loraformat.signatures import HEAD_BYTES, describe_head
from loraformat.spans import InputFile, StoredTensor
from loraformat.strict_json import JsonValue

_IDENTIFIER: Final = b"TORT"
_VERSIONS: Final = ("format_version", "adapter_version", "model_version")
"""The first fields of the root table; the next is the vector of parameters."""

_FORMAT_VERSION: Final = 1
_PARAMETERS: Final = len(_VERSIONS)
_NAME, _DIMS, _DATA_TYPE, _RAW_DATA = range(4)

_HELD: Final = frozenset(
    dtype
    for dtype in BY_ONNX.values()
    if dtype.bits >= 8 and dtype.family in {"float", "int", "uint"} and dtype.name != "float8_e8m0fnu"
)
"""The forms that onnxruntime loads (`IsSupportedLoraParameterType`)."""

_VTABLE: Final = struct.pack("<6H", 12, 20, 4, 8, 12, 16)
"""Both tables have four fields of four bytes, so one vtable serves them."""

_VTABLE_AT: Final = 8
_ROOT_AT: Final = _VTABLE_AT + len(_VTABLE)
_VECTOR_AT: Final = _ROOT_AT + 20


@dataclass(frozen=True, slots=True)
class OnnxAdapter:
    """The container of ONNX Runtime's adapters."""

    name: str = "onnx_adapter"
    suffixes: tuple[str, ...] = (".onnx_adapter",)
    has_magic: bool = True

    def sniff(self, head: bytes, size_bytes: int) -> bool:
        """Look for the identifier that follows the root's offset."""
        return size_bytes > _VTABLE_AT and head[4:8] == _IDENTIFIER

    def open(self, path: Path | InputFile) -> TensorFile:
        """Check every table, and return the parameters in the order of the file; the metadata are the versions.

        Raises:
            InputError: LF101, LF103, LF105, LF106, LF107, LF108, LF111, LF121, LF131, LF133, LF301.
            RefusedError: LF110.
        """
        return open_indexed(path, _index)

    def write(self, sink: int | BinaryIO, tensors: Sequence[NewTensor], metadata: Mapping[str, JsonValue]) -> None:
        """Write a new file; see `write_onnx_adapter`."""
        write_onnx_adapter(sink, tensors, metadata)


CONTAINER: Final = OnnxAdapter()


def _index(file: InputFile) -> TensorFile:
    _check_head(file)
    buffer = Buffer(file)
    root = Table(buffer, buffer.follow(0))
    metadata = {name: str(root.number(field)) for field, name in enumerate(_VERSIONS)}
    if root.number(0) != _FORMAT_VERSION:
        found = f"format version {root.number(0)}"
        raise refuse("LF131", file.path, found, f"version {_FORMAT_VERSION}")
    tensors: dict[str, StoredTensor] = {}
    for table in root.tables(_PARAMETERS, MAX_TENSORS):
        tensor = _read_parameter(table)
        if tensor.name in tensors:
            raise refuse("LF105", file.path, f"tensor {tensor.name!r} stands twice", "each name once")
        tensors[tensor.name] = tensor
    _check_overlaps(file, tensors)
    return TensorFile(file, tensors, metadata)


def _check_head(file: InputFile) -> None:
    head = file.read(0, min(HEAD_BYTES, file.size_bytes))
    if not CONTAINER.sniff(head, file.size_bytes):
        described = describe_head(head)
        if described is not None:
            raise refuse("LF111", file.path, described.what, "an ONNX Runtime adapter", described.mend)
        code, found = ("LF121", "a file of no known format") if head else ("LF101", "an empty file")
        raise refuse(code, file.path, found, "an ONNX Runtime adapter")
    if file.size_bytes > MAX_FLATBUFFER_BYTES:
        raise refuse("LF110", file.path, f"{file.size_bytes} bytes", f"at most {MAX_FLATBUFFER_BYTES}")


def _read_parameter(table: Table) -> StoredTensor:
    file, name = table.buffer.file, table.text(_NAME)
    check_name(file.path, name)
    where = f"{file.path}, tensor {name!r}"
    number = table.number(_DATA_TYPE)
    dtype = BY_ONNX.get(number)
    if dtype is None or not dtype.bits:
        raise refuse("LF106", where, f"data type {number}", "a form of ONNX's TensorProto.DataType that holds numbers")
    shape, span = table.sizes(_DIMS), table.span(_RAW_DATA)
    check_shape(where, shape, dtype, "LF108")
    if span.length != dtype.count_bytes(math.prod(shape)):
        expected = f"{dtype.count_bytes(math.prod(shape))} for {dtype.name} {list(shape)}"
        raise refuse("LF108", where, f"{span.length} bytes", expected)
    return StoredTensor(name, dtype, shape, span, file)


def _check_overlaps(file: InputFile, tensors: Mapping[str, StoredTensor]) -> None:
    filled = sorted((tensor for tensor in tensors.values() if tensor.span.length), key=lambda each: each.span.offset)
    for one, other in pairwise(filled):
        if other.span.offset < one.span.end:
            found = f"it lies over {one.name!r}"
            raise refuse("LF107", f"{file.path}, tensor {other.name!r}", found, "bytes of its own")


def write_onnx_adapter(sink: int | BinaryIO, tensors: Sequence[NewTensor], metadata: Mapping[str, JsonValue]) -> None:
    """Write a file at the sink's position, tensors in the order given, each at a multiple of eight bytes.

    One tensor is held at a time. The same tensors and metadata give the same bytes.

    Args:
        sink: a descriptor or binary file, open for writing.
        tensors: what to write; float16 and bfloat16 as they are.
        metadata: `adapter_version`, `model_version`: whole numbers as text; 1 when left out.

    Raises:
        InputError: LF105 a name given twice, LF130 another version of the format or another key, LF132 a tensor that
            ONNX cannot hold, LF301 an unfit name.
        RefusedError: LF110 more than 2 GiB.
        ValueError: an array that is not of the stated number form and shape.
    """
    check_new(tensors)
    versions = _parse_versions(metadata)
    layouts = _lay_out(tensors)
    vector = struct.pack(
        f"<I{len(layouts)}I",
        len(layouts),
        *(layout.table - (_VECTOR_AT + 4 + 4 * index) for index, layout in enumerate(layouts)),
    )
    head = struct.pack("<I", _ROOT_AT) + _IDENTIFIER + _VTABLE
    root = struct.pack("<iiiiI", _ROOT_AT - _VTABLE_AT, *versions, _VECTOR_AT - (_ROOT_AT + 16))
    with open(sink, "wb", closefd=False) if isinstance(sink, int) else nullcontext(sink) as stream:
        stream.write(head + root + vector)
        position = _VECTOR_AT + len(vector)
        for layout, tensor in zip(layouts, tensors, strict=True):
            described = _describe(layout, tensor, position)
            data = payload_bytes(tensor)
            stream.write(described)
            stream.write(data)
            position += len(described) + len(data)
        stream.write(bytes(-position % 4))


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the parts of one parameter stand; vectors and strings by their lengths' places."""

    table: int
    name: int
    dims: int
    data: int
    end: int


def _lay_out(tensors: Sequence[NewTensor]) -> Sequence[_Layout]:
    layouts: list[_Layout] = []
    position = _VECTOR_AT + 4 + 4 * len(tensors)
    for name, dtype, shape, _ in tensors:
        if dtype not in _HELD:
            raise refuse("LF132", f"tensor {name!r}", dtype.name, "a number form that onnxruntime loads")
        if not shape:
            raise refuse("LF132", f"tensor {name!r}", "a scalar", "one dimension or more, which onnxruntime asks for")
        table = position + -position % 4
        text = table + 20
        dims = _before_eight(text + 4 + len(name.encode()) + 1)
        data = _before_eight(dims + 4 + 8 * len(shape))
        position = data + 4 + dtype.count_bytes(math.prod(shape))
        layouts.append(_Layout(table, text, dims, data, position))
    if position > MAX_FLATBUFFER_BYTES:
        raise refuse("LF110", "new file", f"{position} bytes", f"at most {MAX_FLATBUFFER_BYTES}")
    return layouts


def _before_eight(position: int) -> int:
    """Return the first place from `position` on whose successor, four bytes on, is a multiple of eight."""
    return position + -(position + 4) % 8


def _describe(layout: _Layout, tensor: NewTensor, position: int) -> bytes:
    """Return everything of a parameter but its numbers, from `position` up to them."""
    name, dtype, shape, _ = tensor
    raw = name.encode()
    fields = (layout.name - (layout.table + 4), layout.dims - (layout.table + 8), dtype.onnx)
    data = layout.data - (layout.table + 16)
    parts = (
        (layout.table, struct.pack("<iIIiI", layout.table - _VTABLE_AT, *fields, data)),
        (layout.name, struct.pack("<I", len(raw)) + raw + b"\0"),
        (layout.dims, struct.pack(f"<I{len(shape)}q", len(shape), *shape)),
        (layout.data, struct.pack("<I", dtype.count_bytes(math.prod(shape)))),
    )
    written = b""
    for place, part in parts:
        written += bytes(place - position - len(written)) + part
    return written


def _parse_versions(metadata: Mapping[str, JsonValue]) -> tuple[int, ...]:
    known = dict[str, JsonValue](dict.fromkeys(_VERSIONS, "1")) | dict(metadata)
    strange = sorted(set(known) - set(_VERSIONS))
    if strange:
        raise refuse("LF130", "new file", f"the key {strange[0]!r}", f"no other than {', '.join(_VERSIONS)}")
    if known[_VERSIONS[0]] != str(_FORMAT_VERSION):
        raise refuse("LF130", f"new file, {_VERSIONS[0]}", f"{known[_VERSIONS[0]]!r:.40}", f"{_FORMAT_VERSION}")
    return tuple(_parse_version(name, known[name]) for name in _VERSIONS)


def _parse_version(name: str, value: JsonValue) -> int:
    if not isinstance(value, str) or not value.isdecimal() or len(value) > 10 or int(value) >= 2**31:
        raise refuse("LF130", f"new file, {name}", f"{value!r:.40}", "a whole number below 2^31, as text")
    return int(value)
