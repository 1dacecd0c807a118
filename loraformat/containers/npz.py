"""numpy archives (`.npz`): a zip of `.npy` files, each a text header and the numbers.

Read without numpy's own reader, which would need to be told not to unpickle and not to unpack. Source: `numpy/lib/
format.py` (versions 1.0 to 3.0 of the format) of numpy 2.4.

Rewriting: numpy checks the CRC-32 of each member when it reads it, so after spans of a copy were rewritten in place,
those of the changed members must be mended (`list_crc_fields`, `mend_crcs`), or numpy.load refuses the copy.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from loraformat.containers import TensorFile, open_indexed
from loraformat.containers._new_tensors import NewTensor, check_new, payload_bytes
from loraformat.containers._strided import StridedTensor, check_name, check_shape, is_c_order
from loraformat.containers._zip_checksums import mend_crcs
from loraformat.containers._zip_directory import (
    LOCAL_HEADER,
    Member,
    read_directory,
    require_stored,
)
from loraformat.containers._zip_writing import new_archive
from loraformat.dtypes import BY_NAME, Dtype
from loraformat.errors import refuse
from loraformat.images import Copy, FileImage
from loraformat.limits import MAX_NPY_HEADER_BYTES, MAX_TENSORS
from loraformat.signatures import HEAD_BYTES, ZIP_MAGIC, describe_head
from loraformat.spans import InputFile, Span, StoredTensor
from loraformat.strict_json import JsonValue

__all__ = ["CONTAINER", "Npz", "describe_images", "list_crc_fields", "mend_crcs"]

_SUFFIX: Final = ".npy"
_FLAGS_AT: Final = 6
_STREAMED: Final = 8
_MAGIC: Final = b"\x93NUMPY"
_LENGTH_BYTES: Final = {1: 2, 2: 4, 3: 4}
"""Major version of a `.npy` header to the bytes of its length field."""

# Possessive throughout: thousands of spaces must not be tried in every division.
_ENTRY: Final = r"'(?:descr|fortran_order|shape)'\s*+:\s*+(?:'[^']*+'|True|False|\([0-9,\s]*+\))"
_HEADER: Final = re.compile(rf"\s*+\{{\s*+{_ENTRY}(?:\s*+,\s*+{_ENTRY}){{2}}\s*+,?+\s*+\}}\s*+")
_DESCR: Final = re.compile(r"'descr'\s*+:\s*+'([^']*+)'")
_ORDER: Final = re.compile(r"'fortran_order'\s*+:\s*+(True|False)")
_SIZE: Final = r"(?:0|[1-9][0-9]{0,18})\s*+"
_SHAPE: Final = re.compile(rf"'shape'\s*+:\s*+\(\s*+((?:{_SIZE},\s*+)+(?:{_SIZE})?|)\)")

_LETTERS: Final = {"float": "f", "int": "i", "uint": "u", "complex": "c", "bool": "b"}
_DTYPES: Final[Mapping[str, Dtype]] = {
    f"{'|' if dtype.bits == 8 else '<'}{_LETTERS[dtype.family]}{dtype.bits // 8}": dtype
    for dtype in (
        BY_NAME[name]
        for name in (
            *("float64", "float32", "float16", "int64", "int32", "int16", "int8"),
            *("uint64", "uint32", "uint16", "uint8", "bool", "complex64", "complex128"),
        )
    )
}

_REFUSED_FORMS: Final = (
    (r"\|?O.*", "LF901", "an object array, which is a pickle", "Save arrays of numbers."),
    (r">.*", "LF112", "numbers in big-endian order", "Save array.astype(array.dtype.newbyteorder('<'))."),
    (
        r"[|<]V[12]",
        "LF106",
        "bytes without a number form",
        "numpy forgets bfloat16 and float8, which are not its own: save the array as float32, or all as safetensors.",
    ),
)
"""Pattern of `descr`, and what to say of it."""

_REPACK: Final = (
    "Save it again with numpy.savez: "
    'python -c "import sys, numpy; numpy.savez(sys.argv[2], **numpy.load(sys.argv[1]))" OLD NEW'
)


@dataclass(frozen=True, slots=True)
class Npz:
    """The container of numpy.savez."""

    name: str = "npz"
    suffixes: tuple[str, ...] = (".npz",)
    has_magic: bool = True

    def sniff(self, head: bytes, size_bytes: int) -> bool:
        """Say whether the first member of a zip is a `.npy` file.

        A name that is longer than `head` does not show its end: then it is numpy's unless the member is streamed, as
        torch writes all of them.
        """
        if not head.startswith(ZIP_MAGIC) or min(len(head), size_bytes) < LOCAL_HEADER.size:
            return False
        *_, name_bytes, _ = LOCAL_HEADER.unpack_from(head)
        name = head[LOCAL_HEADER.size :][:name_bytes]
        return name.endswith(_SUFFIX.encode()) if len(name) == name_bytes else not head[_FLAGS_AT] & _STREAMED

    def open(self, path: Path | InputFile) -> TensorFile:
        """Check archive and headers, and return the tensors in the order of the archive.

        Arrays in Fortran order are `StridedTensor`s: readable, without a span.

        Raises:
            InputError: LF101, LF106, LF108, LF109, LF111, LF112, LF121, LF301.
            RefusedError: LF110, LF901, LF902.
        """
        return open_indexed(path, _index)

    def write(self, sink: int | BinaryIO, tensors: Sequence[NewTensor], metadata: Mapping[str, JsonValue]) -> None:
        """Write a new archive at the sink's position, arrays in the order given, one held at a time.

        Raises:
            InputError: LF105 a name given twice, LF130 any metadata, LF132 a number form that numpy lacks, LF301 an
                unfit name.
            ValueError: an array that is not of the stated number form and shape.
        """
        check_new(tensors)
        if metadata:
            raise refuse("LF130", "new file", f"the key {min(metadata)!r}", "no metadata, for which npz has no place")
        with new_archive(sink) as archive:
            for tensor in tensors:
                header = _write_header(tensor)
                archive.add(f"{tensor[0]}{_SUFFIX}", header, payload_bytes(tensor))


CONTAINER: Final = Npz()


def describe_images(file: TensorFile, output: Path) -> list[FileImage]:
    """Return the one output file: a copy, in which spans can be rewritten; see above for the CRCs."""
    return [FileImage(output, [Copy(file.file, 0, file.file.size_bytes)])]


def list_crc_fields(file: TensorFile) -> Mapping[Span, tuple[int, ...]]:
    """Return the bytes of each member, and the offsets at which the file states their CRC-32 (4 bytes, little-endian).

    A member is a header and one array: when a span was rewritten, the CRC of the member that contains it is to be
    mended.
    """
    return {member.span: member.crc_offsets for member in read_directory(file.file).values()}


def _index(file: InputFile) -> TensorFile:
    head = file.read(0, min(HEAD_BYTES, file.size_bytes))
    if not head.startswith(ZIP_MAGIC):
        described = describe_head(head)
        if described is not None:
            raise refuse("LF111", file.path, described.what, "a numpy archive", described.mend)
        code, found = ("LF121", "a file of no known format") if head else ("LF101", "an empty file")
        raise refuse(code, file.path, found, "a numpy archive")
    members = read_directory(file)
    require_stored(file, members, _REPACK)
    if len(members) > MAX_TENSORS:
        raise refuse("LF110", file.path, f"{len(members)} arrays", f"at most {MAX_TENSORS}")
    tensors = {}
    for member in members.values():
        tensor = _read_array(file, member)
        tensors[tensor.name] = tensor
    return TensorFile(file, tensors, {})


def _read_array(file: InputFile, member: Member) -> StoredTensor:
    where = f"{file.path}, member {member.name!r}"
    if not member.name.endswith(_SUFFIX):
        raise refuse("LF111", where, "a member that is no .npy file", "arrays only", "Remove it from the archive.")
    name = member.name.removesuffix(_SUFFIX)
    check_name(file.path, name)
    text, start = _read_header(file, member, where)
    descr, order, shape_text = _parse_header(text, where)
    dtype = _find_dtype(descr, where)
    shape = tuple(int(number) for number in re.findall(r"[0-9]+", shape_text))
    check_shape(where, shape, dtype, "LF108")
    span = Span(file.path, start, member.span.end - start)
    if span.length != dtype.count_bytes(math.prod(shape)):
        found, expected = f"{span.length} bytes", f"{dtype.count_bytes(math.prod(shape))}"
        raise refuse("LF108", where, found, f"{expected} for {dtype.name} {list(shape)}")
    strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
    if order == "True" and span.length and not is_c_order(shape, strides):
        return StridedTensor(name, dtype, shape, strides, span, file)
    return StoredTensor(name, dtype, shape, span, file)


def _read_header(file: InputFile, member: Member, where: str) -> tuple[str, int]:
    """Return the text of the header, and where the numbers begin."""
    span = member.span
    head = file.read(span.offset, min(span.length, 12))
    width = _LENGTH_BYTES.get(head[6]) if head.startswith(_MAGIC) and len(head) == 12 else None
    if width is None or head[7]:
        raise refuse("LF109", where, f"the beginning {head[:8]!r}", "a .npy header of version 1.0, 2.0 or 3.0")
    length = int.from_bytes(head[8 : 8 + width], "little")
    start = 8 + width + length
    if length > MAX_NPY_HEADER_BYTES or start > span.length:
        most = min(MAX_NPY_HEADER_BYTES, span.length - 8 - width)
        raise refuse("LF102", where, f"a header of {length} bytes", f"at most {most}", "The file is damaged.")
    raw = file.read(span.offset + 8 + width, length)
    return raw.decode("latin-1"), span.offset + start


def _write_header(tensor: NewTensor) -> bytes:
    """Return a header of version 1.0, padded so that the numbers begin at a multiple of 64."""
    name, dtype, shape, _ = tensor
    descr = next((descr for descr, known in _DTYPES.items() if known == dtype), None)
    if descr is None:
        raise refuse("LF132", f"tensor {name!r}", dtype.name, f"one of {', '.join(_DTYPES)}")
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    padding = -(len(_MAGIC) + 4 + len(text) + 1) % 64
    raw = f"{text}{' ' * padding}\n".encode("latin-1")
    return _MAGIC + b"\x01\x00" + len(raw).to_bytes(2, "little") + raw


def _parse_header(text: str, where: str) -> tuple[str, str, str]:
    """Return `descr`, `fortran_order` and the inside of `shape` as text.

    numpy evaluates the header as a Python literal; what writers put there is so regular that a pattern does.
    """
    found = [re.findall(pattern, text) for pattern in (_DESCR, _ORDER, _SHAPE)]
    if not _HEADER.fullmatch(text) or any(len(values) != 1 for values in found):
        raise refuse(
            "LF109", where, f"the header {text.strip()!r:.200}", "descr of one number form, fortran_order, shape"
        )
    return found[0][0], found[1][0], found[2][0]


def _find_dtype(descr: str, where: str) -> Dtype:
    dtype = _DTYPES.get(descr)
    if dtype is not None:
        return dtype
    for pattern, code, found, mend in _REFUSED_FORMS:
        if re.fullmatch(pattern, descr):
            raise refuse(code, where, f"{found} ({descr!r:.40})", f"one of {', '.join(_DTYPES)}", mend)
    raise refuse("LF106", where, f"dtype {descr!r:.100}", f"one of {', '.join(_DTYPES)}")
