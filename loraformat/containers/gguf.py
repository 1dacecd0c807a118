"""GGUF: magic, key-values, tensor descriptions, then the tensors in their order, each at a multiple of the alignment.

Versions 2 and 3, little-endian. Source: `docs/gguf.md` of ggml and gguf.cpp (2025), which also wants no holes between
the tensors. Dimensions stand innermost first in the file and outermost first here, as numpy has them. Quantised tensors
are indexed (`BlockDtype`); their numbers are not read by this container.
"""

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from loraformat.containers import TensorFile, open_indexed
from loraformat.containers._gguf_values import Cursor, read_value, write_value
from loraformat.containers._new_tensors import NewTensor, check_new, payload_bytes
from loraformat.containers._strided import check_name, check_shape
from loraformat.dtypes import BY_GGML, BlockDtype, Dtype
from loraformat.errors import refuse
from loraformat.images import Copy, Fresh, Literal, Piece
from loraformat.limits import MAX_DIMS, MAX_KEY_VALUES, MAX_TENSORS
from loraformat.signatures import HEAD_BYTES, describe_head
from loraformat.spans import InputFile, Span, StoredTensor
from loraformat.strict_json import JsonValue

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_LEAST_KEY_VALUE_BYTES: Final = 8 + 4 + 1
_LEAST_TENSOR_BYTES: Final = 8 + 4 + 4 + 8
_ALIGNMENT_KEY: Final = "general.alignment"
_ALIGNMENT: Final = 32
_GGML_MAX_NAME_BYTES: Final = 63
_GGML_MAX_DIMS: Final = 4
_NUMBER_OF: Final = {dtype: number for number, dtype in BY_GGML.items()}


@dataclass(frozen=True, slots=True)
class Gguf:
    """The container of ggml and llama.cpp."""

    name: str = "gguf"
    suffixes: tuple[str, ...] = (".gguf",)
    has_magic: bool = True

    def sniff(self, head: bytes, size_bytes: int) -> bool:
        """Say whether the file begins with the magic."""
        return head.startswith(_MAGIC) and size_bytes >= len(_MAGIC)

    def open(self, path: Path | InputFile) -> TensorFile:
        """Check the whole head, and return the tensors in the order of the file.

        The metadata are the key-values, each as JSON text (`_gguf_values`).

        Raises:
            InputError: LF101, LF103, LF105, LF106, LF107, LF108, LF109, LF111, LF112, LF121, LF131, LF301.
            RefusedError: LF110.
        """
        return open_indexed(path, _index)

    def write(self, sink: int | BinaryIO, tensors: Sequence[NewTensor], metadata: Mapping[str, JsonValue]) -> None:
        """Write a new file; see `write_gguf`."""
        write_gguf(sink, tensors, metadata)


CONTAINER: Final = Gguf()


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor description; `offset` counts from the start of the data."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def length(self) -> int:
        return self.dtype.count_bytes(math.prod(self.shape))


@dataclass(frozen=True, slots=True)
class _Head:
    """What stands before the data.

    Attributes:
        metadata: the key-values.
        entries: the tensor descriptions.
        entries_at: where these begin.
        start: where the data begin.
        alignment: of the data, in bytes.
    """

    metadata: Mapping[str, str]
    entries: Sequence[_Entry]
    entries_at: int
    start: int
    alignment: int


def _read_head(file: InputFile) -> _Head:
    _check_magic(file)
    cursor = Cursor(file)
    cursor.skip(len(_MAGIC))
    _check_version(file, cursor.number("<I"))
    tensor_count, key_count = cursor.number("<Q"), cursor.number("<Q")
    _check_count(file, "tensors", tensor_count, MAX_TENSORS, _LEAST_TENSOR_BYTES)
    _check_count(file, "key-values", key_count, MAX_KEY_VALUES, _LEAST_KEY_VALUE_BYTES)
    metadata = _read_key_values(cursor, key_count)
    entries_at = cursor.position
    entries = _read_entries(cursor, tensor_count)
    alignment = _find_alignment(file, metadata)
    start = _align(cursor.position, alignment)
    _check_tiling(file, entries, start, alignment)
    return _Head(metadata, entries, entries_at, start, alignment)


def _index(file: InputFile) -> TensorFile:
    head = _read_head(file)
    tensors = {
        entry.name: StoredTensor(
            entry.name, entry.dtype, entry.shape, Span(file.path, head.start + entry.offset, entry.length), file
        )
        for entry in head.entries
    }
    return TensorFile(file, tensors, head.metadata)


def describe_retyped(file: InputFile, forms: Mapping[str, Dtype]) -> Iterator[Piece]:
    """Yield the pieces of a file in which some tensors have another number form; `Fresh` has the room for these.

    Key-values stay as they are, and tensors where they were in the order. Descriptions keep their sizes.

    Args:
        file: the file.
        forms: the new number forms, by the names of tensors.
    """
    head = _read_head(file)
    formed = [(each.name, forms.get(each.name, each.dtype), each.shape) for each in head.entries]
    yield Copy(file, 0, head.entries_at)
    described = b"".join(_describe_tensors(formed, head.alignment))
    yield Literal(described + bytes(head.start - head.entries_at - len(described)))
    for entry, (name, form, shape) in zip(head.entries, formed, strict=True):
        length = form.count_bytes(math.prod(shape))
        is_same = name not in forms
        yield Copy(file, head.start + entry.offset, length) if is_same else Fresh(name, length)
        yield Literal(bytes(-length % head.alignment))


def _check_magic(file: InputFile) -> None:
    head = file.read(0, min(HEAD_BYTES, file.size_bytes))
    if CONTAINER.sniff(head, file.size_bytes):
        return
    described = describe_head(head)
    if described is not None:
        raise refuse("LF111", file.path, described.what, "a GGUF file", described.mend)
    code, found = ("LF121", "a file of no known format") if head else ("LF101", "an empty file")
    raise refuse(code, file.path, found, "a GGUF file")


def _check_version(file: InputFile, version: int) -> None:
    if version and not version & 0xFFFF:
        raise refuse("LF112", file.path, "a big-endian GGUF file", "a little-endian one")
    if version not in _VERSIONS:
        raise refuse("LF131", file.path, f"GGUF version {version}", f"version {' or '.join(map(str, _VERSIONS))}")


def _check_count(file: InputFile, what: str, count: int, most: int, least_bytes: int) -> None:
    if count > most:
        raise refuse("LF110", file.path, f"{count} {what}", f"at most {most}")
    if count * least_bytes > file.size_bytes:
        raise refuse("LF101", file.path, f"{count} {what} in {file.size_bytes} bytes", f"at least {least_bytes} each")


def _read_key_values(cursor: Cursor, count: int) -> Mapping[str, str]:
    metadata: dict[str, str] = {}
    for _ in range(count):
        key = cursor.text("a key")
        check_name(cursor.file.path, key, "key")
        if key in metadata:
            raise refuse("LF105", cursor.file.path, f"the key {key!r} stands twice", "each key once")
        metadata[key] = read_value(cursor, key)
    return metadata


def _read_entries(cursor: Cursor, count: int) -> Sequence[_Entry]:
    entries: dict[str, _Entry] = {}
    for _ in range(count):
        entry = _read_entry(cursor)
        if entry.name in entries:
            raise refuse("LF105", cursor.file.path, f"tensor {entry.name!r} stands twice", "each name once")
        entries[entry.name] = entry
    return tuple(entries.values())


def _read_entry(cursor: Cursor) -> _Entry:
    name = cursor.text("a tensor name")
    check_name(cursor.file.path, name)
    where = f"{cursor.file.path}, tensor {name!r}"
    axes = cursor.number("<I")
    if axes > MAX_DIMS:
        raise refuse("LF110", where, f"{axes} dimensions", f"at most {MAX_DIMS}")
    shape = tuple(reversed([cursor.number("<Q") for _ in range(axes)]))
    number = cursor.number("<I")
    dtype = BY_GGML.get(number)
    if dtype is None:
        known = ", ".join(dtype.name for dtype in BY_GGML.values())
        raise refuse("LF106", where, f"ggml type {number}", f"one of {known}")
    check_shape(where, shape, dtype, "LF108")
    if isinstance(dtype, BlockDtype) and (not shape or shape[-1] % dtype.block_elements):
        raise refuse("LF108", where, f"shape {list(shape)}", f"rows of whole blocks of {dtype.block_elements}")
    return _Entry(name, dtype, shape, cursor.number("<Q"))


def _find_alignment(file: InputFile, metadata: Mapping[str, str]) -> int:
    text = metadata.get(_ALIGNMENT_KEY, str(_ALIGNMENT))
    alignment = int(text) if text.isdecimal() and len(text) < 10 else 0
    if not _is_alignment(alignment):
        raise refuse("LF109", f"{file.path}, key {_ALIGNMENT_KEY!r}", f"{text:.40}", "a power of two from 8, uint32")
    return alignment


def _is_alignment(number: int) -> bool:
    return number >= 8 and not number & (number - 1)


def _align(position: int, alignment: int) -> int:
    return position + -position % alignment


def _check_tiling(file: InputFile, entries: Sequence[_Entry], start: int, alignment: int) -> None:
    """Require that the tensors follow one another, with nothing between or behind them but padding."""
    due, end = 0, 0
    for entry in entries:
        if entry.offset != due:
            what = "a hole before it" if entry.offset > due else "an overlap with another tensor"
            found = f"it begins at {entry.offset}: {what}"
            raise refuse("LF107", f"{file.path}, tensor {entry.name!r}", found, f"{due}")
        end = due + entry.length
        due = _align(end, alignment)
    if entries and start + end > file.size_bytes:
        found = f"the last tensor ends at byte {start + end}"
        raise refuse("LF107", file.path, found, f"at most {file.size_bytes}, the size of the file")
    if file.size_bytes > start + due:
        found = f"{file.size_bytes - start - due} bytes behind the last tensor"
        raise refuse("LF107", file.path, found, "nothing but padding")


def write_gguf(sink: int | BinaryIO, tensors: Sequence[NewTensor], metadata: Mapping[str, JsonValue]) -> None:
    """Write a file of version 3 at the sink's position, tensors and key-values in the order given.

    One tensor is held at a time. The same tensors and metadata give the same bytes.

    Args:
        sink: a descriptor or binary file, open for writing.
        tensors: what to write.
        metadata: key to value; of what `CONTAINER.open` returns, each text parsed (`_gguf_values`).

    Raises:
        InputError: LF105 a name given twice, LF130 a value that is none, LF132 a tensor that ggml cannot hold, LF301 an
            unfit name.
        ValueError: an array that is not of the stated number form and shape.
    """
    check_new(tensors)
    alignment = metadata.get(_ALIGNMENT_KEY, _ALIGNMENT)
    if not isinstance(alignment, int) or not _is_alignment(alignment):
        raise refuse("LF130", f"new file, {_ALIGNMENT_KEY}", f"{alignment!r:.40}", "a power of two from 8")
    values = [write_value(key, value) for key, value in metadata.items()]
    head = struct.pack("<4sIQQ", _MAGIC, _VERSIONS[-1], len(tensors), len(values))
    head += b"".join(values) + b"".join(_describe_tensors((each[:3] for each in tensors), alignment))
    with open(sink, "wb", closefd=False) if isinstance(sink, int) else nullcontext(sink) as stream:
        stream.write(head + bytes(-len(head) % alignment))
        for tensor in tensors:
            data = payload_bytes(tensor)
            stream.write(data)
            stream.write(bytes(-len(data) % alignment))


def _describe_tensors(tensors: Iterable[tuple[str, Dtype, Sequence[int]]], alignment: int) -> Iterator[bytes]:
    offset = 0
    for name, dtype, shape in tensors:
        _check_ggml_holds(name, dtype, shape)
        raw = name.encode()
        yield struct.pack("<Q", len(raw)) + raw
        yield struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), _NUMBER_OF[dtype], offset)
        offset = _align(offset + dtype.count_bytes(math.prod(shape)), alignment)


def _check_ggml_holds(name: str, dtype: Dtype, shape: Sequence[int]) -> None:
    faults = (
        (dtype not in _NUMBER_OF, f"{dtype.name}", f"one of {', '.join(known.name for known in _NUMBER_OF)}"),
        (len(shape) > _GGML_MAX_DIMS, f"{len(shape)} dimensions", f"at most {_GGML_MAX_DIMS}"),
        (len(name.encode()) > _GGML_MAX_NAME_BYTES, "a longer name", f"at most {_GGML_MAX_NAME_BYTES} bytes"),
    )
    for is_so, found, expected in faults:
        if is_so:
            raise refuse("LF132", f"tensor {name!r}", found, expected)
