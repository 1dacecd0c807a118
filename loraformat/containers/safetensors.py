"""safetensors: eight bytes of header length, a JSON header, then the tensors without holes.

The reader is our own and stricter than the library's: duplicate keys, unknown fields and names that could drive a
terminal are refused, and nothing is allocated from a number of the header before it is compared with the file's size.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final, TypeGuard

from loraformat.containers import TensorFile, open_indexed
from loraformat.containers._new_tensors import NewTensor, payload_bytes
from loraformat.dtypes import BY_SAFETENSORS, Dtype
from loraformat.errors import refuse
from loraformat.limits import (
    MAX_DIMS,
    MAX_METADATA_BYTES,
    MAX_NAME_BYTES,
    MAX_SAFETENSORS_HEADER_BYTES,
    MAX_TENSORS,
)
from loraformat.signatures import describe_text
from loraformat.spans import InputFile, Span, StoredTensor
from loraformat.strict_json import JsonValue, parse_json_object, write_canonical

_LENGTH_BYTES: Final = 8
METADATA_FIELD: Final = "__metadata__"
_FIELDS: Final = {"dtype", "shape", "data_offsets"}
_COUNTS: Final = {int}
_KEY: Final = re.compile(rb'"\s*+:')
_MAX_KEYS: Final = 4
_MAX_COMMAS: Final = 16
"""In a header for each tensor: its name and three fields, with commas between them and between eight sizes."""
_MAX_KEYS_BESIDE: Final = 10_000
_MAX_COMMAS_BESIDE: Final = 1_000_000
"""In the metadata, which hold JSON texts of their own."""
_MAX_ARRAY_BYTES: Final = 2**63 - 1

# Not str.isprintable: its answer changes with Python's Unicode tables, and a file must mean the same everywhere.
_UNFIT_IN_NAMES: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

_IMPOSTORS: Final = (
    (rb"version https://git-lfs", "a git-LFS pointer, not the file itself", "git lfs pull"),
    (rb"(?i)\s*<(!doctype|html|\?xml|head|!--)", "an HTML or XML page", "Fetch the file itself, not a page."),
    (rb"PK\x03\x04", "a zip archive", "Unpack it; if torch.save wrote it, name it .pt."),
    (rb"GGUF", "a GGUF file", "Give it its real name, .gguf."),
    (rb"\x1f\x8b", "a gzip archive", "Unpack it."),
    (rb"\x80[\x02-\x05][\x8a\x95\]})(cNKX]", "a Python pickle", "It could run code: convert it where it was made."),
    (rb"(\xef\xbb\xbf)?\s*[{\[]", "plain JSON", "Fetch the file itself; the index of a sharded model is another file."),
)


@dataclass(frozen=True, slots=True)
class Safetensors:
    """The safetensors container."""

    name: str = "safetensors"
    suffixes: tuple[str, ...] = (".safetensors",)
    has_magic: bool = True

    def sniff(self, head: bytes, size_bytes: int) -> bool:
        """Say whether `head` has a header length that the file can hold, followed by `{`."""
        length = int.from_bytes(head[:_LENGTH_BYTES], "little")
        plausible = 2 <= length <= min(size_bytes - _LENGTH_BYTES, MAX_SAFETENSORS_HEADER_BYTES)
        return plausible and head[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"

    def open(self, path: Path | InputFile) -> TensorFile:
        """Check the header and return the tensors in the order of their offsets.

        Raises:
            InputError: LF101, LF102, LF103, LF104, LF105, LF106, LF107, LF108, LF109, LF111, LF301.
            RefusedError: LF110.
        """
        return open_indexed(path, _index)

    def write(self, sink: int | BinaryIO, tensors: Sequence[NewTensor], metadata: Mapping[str, JsonValue]) -> None:
        """Write a new file; see `write_safetensors`. LF130 for metadata that are no text."""
        texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
        if len(texts) < len(metadata):
            key = min(set(metadata) - set(texts))
            raise refuse("LF130", f"new file, {key}", f"{metadata[key]!r:.80}", "text")
        write_safetensors(sink, tensors, texts)


CONTAINER: Final = Safetensors()


def find_data_start(file: InputFile) -> int:
    """Return the offset of the first tensor byte; the file must have been opened by `CONTAINER`."""
    return _LENGTH_BYTES + int.from_bytes(file.read(0, _LENGTH_BYTES), "little")


def _index(file: InputFile) -> TensorFile:
    header = _read_header(file)
    _check_counts(file, header)
    entries = dict(parse_json_object(header, f"{file.path}, header"))
    metadata = _check_metadata(entries.pop(METADATA_FIELD, None), file.path)
    if len(entries) > MAX_TENSORS:
        raise refuse("LF110", file.path, f"{len(entries)} tensors", f"at most {MAX_TENSORS}")
    start = _LENGTH_BYTES + len(header)
    tensors = sorted(
        (_check_entry(file, name, entry, start) for name, entry in entries.items()),
        key=lambda tensor: (tensor.span.offset, tensor.span.length, tensor.name),
    )
    _check_tiling(file, tensors, start)
    return TensorFile(file, {tensor.name: tensor for tensor in tensors}, metadata)


def _check_counts(file: InputFile, header: bytes) -> None:
    """Refuse a header of far too many values before it is parsed, which takes ten times its bytes."""
    most = MAX_TENSORS * _MAX_KEYS + _MAX_KEYS_BESIDE
    keys = sum(1 for _ in islice(_KEY.finditer(header), most + 1))
    if keys > most:
        raise refuse("LF110", file.path, f"a header of more than {most} members", f"at most {MAX_TENSORS} tensors")
    commas = header.count(b",")
    if commas > MAX_TENSORS * _MAX_COMMAS + _MAX_COMMAS_BESIDE:
        raise refuse("LF110", file.path, f"a header with {commas} commas", f"at most {MAX_TENSORS} tensors")


def _read_header(file: InputFile) -> bytes:
    head = file.read(0, min(file.size_bytes, 64))
    if not CONTAINER.sniff(head, file.size_bytes):
        _refuse_impostor(file.path, head)
    if len(head) < _LENGTH_BYTES:
        raise refuse("LF101", file.path, f"{len(head)} bytes", f"at least {_LENGTH_BYTES}")
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    room = file.size_bytes - _LENGTH_BYTES
    if length > room:
        raise refuse(
            "LF102", file.path, f"a header of {length} bytes", f"at most the {room} bytes that the file has left"
        )
    if not 2 <= length <= MAX_SAFETENSORS_HEADER_BYTES:
        expected = f"between 2 and {MAX_SAFETENSORS_HEADER_BYTES} bytes"
        raise refuse("LF102", file.path, f"a header of {length} bytes", expected)
    first = head[_LENGTH_BYTES : _LENGTH_BYTES + 1]
    if first != b"{":
        raise refuse("LF103", file.path, f"byte {_LENGTH_BYTES} is {first!r}", "`{`, without a byte order mark")
    return file.read(_LENGTH_BYTES, length)


def _refuse_impostor(path: Path, head: bytes) -> None:
    for pattern, found, mend in _IMPOSTORS:
        if re.match(pattern, head):
            raise refuse("LF111", path, found, "a safetensors file", mend)
    text = describe_text(head)
    if text is not None:
        raise refuse("LF111", path, text.what, "a safetensors file", text.mend)


def _check_metadata(value: JsonValue, path: Path) -> Mapping[str, str]:
    where = f"{path}, {METADATA_FIELD}"
    if value is None:  # mlx writes null for an empty one.
        return {}
    if not isinstance(value, Mapping):
        raise refuse("LF109", where, f"{value!r:.100}", "an object of strings")
    metadata: dict[str, str] = {}
    for key, text in value.items():
        if not isinstance(text, str):
            raise refuse("LF109", where, f"{key!r:.100} is {text!r:.100}", "a string")
        _check_metadata_size(where, key, text)
        metadata[key] = text
    return metadata


def _check_metadata_size(where: str, key: str, text: str) -> None:
    size = len(text.encode())
    if size > MAX_METADATA_BYTES:
        raise refuse("LF110", where, f"{key!r:.100} of {size} bytes", f"at most {MAX_METADATA_BYTES}")


def _check_entry(file: InputFile, name: str, entry: JsonValue, start: int) -> StoredTensor:
    check_tensor_name(file.path, name)
    where = f"{file.path}, tensor {name!r}"
    if not isinstance(entry, Mapping) or set(entry) != _FIELDS:
        found = sorted(entry) if isinstance(entry, Mapping) else entry
        raise refuse("LF109", where, f"{found!r:.200}", "an object with exactly dtype, shape and data_offsets")
    dtype = BY_SAFETENSORS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise refuse("LF106", where, f"dtype {entry['dtype']!r:.100}", f"one of {', '.join(BY_SAFETENSORS)}")
    shape = _check_shape(where, entry["shape"], dtype)
    begin, end = _check_offsets(where, entry["data_offsets"], file.size_bytes - start)
    bits = math.prod(shape) * dtype.bits
    if bits % 8 or end - begin != bits // 8:
        found = f"{end - begin} bytes (data_offsets [{begin}, {end}])"
        raise refuse("LF108", where, found, f"{bits / 8:g} bytes for {dtype.safetensors} {list(shape)}")
    return StoredTensor(name, dtype, shape, Span(file.path, start + begin, end - begin), file)


def check_tensor_name(path: object, name: str) -> None:
    """Refuse a name that could drive a terminal (LF301) or that is too long (LF110)."""
    if not name or name == METADATA_FIELD or _UNFIT_IN_NAMES.search(name):
        raise refuse(
            "LF301", path, f"the tensor name {name!a:.200}", "a name without control characters and bidi marks"
        )
    size = len(name.encode())
    if size > MAX_NAME_BYTES:
        raise refuse("LF110", path, f"a tensor name of {size} bytes, {name[:60]!r}...", f"at most {MAX_NAME_BYTES}")


def _are_counts(values: JsonValue) -> TypeGuard[Sequence[int]]:
    """Say whether `values` is a list of non-negative integers; in Python a bool is an int, here it is not."""
    return isinstance(values, list) and {*map(type, values)} <= _COUNTS and min(values, default=0) >= 0


def _check_shape(where: str, shape: JsonValue, dtype: Dtype) -> tuple[int, ...]:
    if not _are_counts(shape):
        raise refuse("LF109", where, f"shape {shape!r:.100}", "a list of non-negative integers")
    if len(shape) > MAX_DIMS:
        raise refuse("LF110", where, f"{len(shape)} dimensions", f"at most {MAX_DIMS}")
    # A zero elsewhere in the shape does not save an array library from the overflow.
    if math.prod(size or 1 for size in shape) * dtype.bits > 8 * _MAX_ARRAY_BYTES:
        raise refuse("LF108", where, f"shape {list(shape)!r:.200}", "fewer than 2^63 bytes")
    return tuple(shape)


def _check_offsets(where: str, offsets: JsonValue, data_bytes: int) -> tuple[int, int]:
    if not _are_counts(offsets) or len(offsets) != 2:
        raise refuse("LF109", where, f"data_offsets {offsets!r:.100}", "two non-negative integers")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        expected = f"begin <= end <= {data_bytes}, the size of the data"
        raise refuse("LF107", where, f"data_offsets [{begin}, {end}]", expected)
    return begin, end


def _check_tiling(file: InputFile, tensors: Sequence[StoredTensor], start: int) -> None:
    """Require that the tensors cover the data area, each byte once: a hole could hide anything."""
    position = start
    for tensor in tensors:
        if tensor.span.offset != position:
            what = "a hole before it" if tensor.span.offset > position else "an overlap with another tensor"
            found = f"it begins at {tensor.span.offset - start}: {what}"
            raise refuse("LF107", f"{file.path}, tensor {tensor.name!r}", found, f"{position - start}")
        position = tensor.span.end
    if position != file.size_bytes:
        last = f"tensor {tensors[-1].name!r}" if tensors else "no tensor"
        found = f"the last tensor ends at {position - start}"
        raise refuse("LF107", f"{file.path}, {last}", found, f"{file.size_bytes - start}, the end of the data")


def write_safetensors(sink: int | BinaryIO, tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> None:
    """Write a file at the sink's position: the same tensors and metadata give the same bytes on any machine.

    One tensor is held at a time. Arrays may have any strides and byte order.

    Args:
        sink: a descriptor or binary file, open for writing.
        tensors: what to write, in any order: wide number forms come first, so that all are aligned, then by name.
        metadata: text annotations; when empty the header has none.

    Raises:
        InputError: LF105 a name given twice, LF301 an unfit name.
        RefusedError: LF110 a name or metadata value too long.
        ValueError: an array that is not of the stated number form and shape.
    """
    ordered = sorted(tensors, key=lambda tensor: (-tensor[1].bits, tensor[0]))
    header = _write_header(ordered, metadata)
    # `closefd` is legal only for a descriptor, so a file object is passed through as it is.
    with open(sink, "wb", closefd=False) if isinstance(sink, int) else nullcontext(sink) as stream:
        stream.write(header)
        for tensor in ordered:
            stream.write(payload_bytes(tensor))


def _write_header(ordered: Sequence[NewTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, JsonValue] = {}
    end = 0
    for name, dtype, shape, _ in ordered:
        check_tensor_name("new file", name)
        if name in entries:
            raise refuse("LF105", "new file", f"tensor {name!r} stands twice", "each name once")
        if dtype.safetensors is None or math.prod(shape) * dtype.bits % 8:
            raise ValueError(f"tensor {name!r}: safetensors cannot hold {dtype.name} {list(shape)}")
        begin, end = end, end + dtype.count_bytes(math.prod(shape))
        entries[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [begin, end]}
    for key, value in metadata.items():
        _check_metadata_size("new file", key, value)
    text = write_canonical(entries | {METADATA_FIELD: dict(metadata)} if metadata else entries)
    return frame_header(len(text)) + text + b" " * (-len(text) % 8)


def frame_header(text_bytes: int) -> bytes:
    """Return the length field for a header text that is padded to a multiple of eight."""
    length = text_bytes + -text_bytes % 8
    if length > MAX_SAFETENSORS_HEADER_BYTES:
        raise refuse("LF110", "new file", f"a header of {length} bytes", f"at most {MAX_SAFETENSORS_HEADER_BYTES}")
    return length.to_bytes(_LENGTH_BYTES, "little")
