"""The members of a zip archive as byte ranges of the file, without anything that could be read in two ways.

The standard library's `zipfile` is lenient where it matters here: it takes data before and after the archive, members
of one name, members that overlap, and local headers that say other sizes. It also does not say where the checksums
stand, which a writer of byte ranges has to mend. Source: APPNOTE.TXT 6.3.10, sections 4.3 to 4.5.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Final

from loraformat.errors import LoraformatError, refuse
from loraformat.limits import MAX_NAME_BYTES, MAX_ZIP_DIRECTORY_BYTES
from loraformat.signatures import ZIP_MAGIC
from loraformat.spans import InputFile, Span

LOCAL_HEADER: Final = struct.Struct("<4s5H3L2H")

_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_CENTRAL_MAGIC: Final = b"PK\x01\x02"
_END: Final = struct.Struct("<4s4H2LH")
_END_MAGIC: Final = b"PK\x05\x06"
_LOCATOR: Final = struct.Struct("<4sLQL")
_LOCATOR_MAGIC: Final = b"PK\x06\x07"
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_END64_MAGIC: Final = b"PK\x06\x06"
_DESCRIPTORS: Final = (struct.Struct("<4s3L"), struct.Struct("<4sL2Q"))
_DESCRIPTOR_MAGIC: Final = b"PK\x07\x08"
_FULL16: Final = 0xFFFF
_FULL32: Final = 0xFFFFFFFF
_MAX_COMMENT_BYTES: Final = 0xFFFF

_STREAMED: Final = 1 << 3
_UTF8: Final = 1 << 11
_KNOWN_FLAGS: Final = _STREAMED | _UTF8 | 0b110
_STORED: Final = 0
_METHODS: Final = {8: "deflate", 9: "deflate64", 12: "bzip2", 14: "LZMA", 93: "zstd"}
_ZIP64: Final = 1
_BAD_NAME: Final = re.compile(r"[\x00-\x1f\x7f\\]|^/|^[A-Za-z]:")


@dataclass(frozen=True, slots=True)
class Member:
    """One member.

    Attributes:
        name: its name.
        span: its content, as it stands in the file.
        compression: how it is compressed; empty for a stored one.
        crc_offsets: where in the file the CRC-32 of its content stands: in the directory, and in the local header or
            in the descriptor behind the content.
    """

    name: str
    span: Span
    compression: str
    crc_offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the directory says of a member."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header_offset: int
    crc_offset: int


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Where the directory stands, and how many entries it has."""

    start: int
    end: int
    count: int


def read_directory(file: InputFile) -> Mapping[str, Member]:
    """Return all members by name, in the order of the directory; checked against the file and against each other.

    Raises:
        InputError: LF101 no end of archive.
        RefusedError: LF902 encrypted, ambiguous or contradictory; LF110 too long a directory.
    """
    bounds = _find_directory(file)
    entries = list(_read_entries(file, bounds))
    members: dict[str, Member] = {}
    extents: list[tuple[int, int, str]] = []
    for entry in entries:
        if entry.name in members:
            raise _refuse(file, f"two members {entry.name!r}", "each name once")
        member, end = _locate(file, entry, bounds.start)
        members[entry.name] = member
        extents.append((entry.header_offset, end, entry.name))
    edges = [(0, 0, "the beginning"), *sorted(extents), (bounds.start, bounds.start, "the directory")]
    for (_, end, name), (start, _, following) in pairwise(edges):
        if start != end:
            found = f"{name!r:.100} ends at byte {end}, {following!r:.100} begins at byte {start}"
            raise _refuse(file, found, "members one after another, without overlap or hole")
    return members


def require_stored(file: InputFile, members: Mapping[str, Member], mend: str = "") -> None:
    """Refuse compressed members (LF902): their numbers are no byte ranges, and a small file may hold a huge one."""
    for name, member in members.items():
        if member.compression:
            found = f"member {name!r} is compressed ({member.compression})"
            raise _refuse(file, found, "members stored as they are", mend)


def _refuse(file: InputFile, found: str, expected: str, mend: str = "") -> LoraformatError:
    return refuse("LF902", file.path, found, expected, mend)


def _find_directory(file: InputFile) -> _Bounds:
    place = file.size_bytes - _END.size
    tail = file.read(max(place, 0), min(_END.size, file.size_bytes))
    if not tail.startswith(_END_MAGIC):
        _refuse_tail(file)
    _, disk, first_disk, here, count, size, start, comment = _END.unpack(tail)
    if comment or disk or first_disk or here != count:
        raise _refuse(file, "a comment or several disks", "one archive that ends with its end record")
    end = place
    if place >= _LOCATOR.size and file.read(place - _LOCATOR.size, 4) == _LOCATOR_MAGIC:
        end, *wide = _read_end64(file, place)
        for narrow, full, real in zip((count, size, start), (_FULL16, _FULL32, _FULL32), wide, strict=True):
            if narrow not in (full, real):
                raise _refuse(file, f"end records that say {narrow} and {real}", "one number")
        count, size, start = wide
    if start + size != end or count * _CENTRAL.size > size:
        found = f"a directory of {count} entries at byte {start}, {size} bytes long"
        raise _refuse(file, found, f"one that ends at byte {end}, where the end record stands")
    if size > MAX_ZIP_DIRECTORY_BYTES:
        raise refuse("LF110", file.path, f"a zip directory of {size} bytes", f"at most {MAX_ZIP_DIRECTORY_BYTES}")
    return _Bounds(start, end, count)


def _refuse_tail(file: InputFile) -> None:
    length = min(file.size_bytes, _END.size + _MAX_COMMENT_BYTES)
    if 0 <= file.read(file.size_bytes - length, length).find(_END_MAGIC) <= length - _END.size:
        raise _refuse(file, "bytes after the end record", "an archive that ends with its end record")
    mend = "The file is cut off: fetch or write it again."
    raise refuse("LF101", file.path, "a zip archive without its end record", "a whole archive", mend)


def _read_end64(file: InputFile, place: int) -> tuple[int, int, int, int]:
    """Return where the zip64 end record stands, then the count, size and offset that it states."""
    _, disk, offset, disks = _LOCATOR.unpack(file.read(place - _LOCATOR.size, _LOCATOR.size))
    expected = place - _LOCATOR.size - _END64.size
    if offset != expected or expected < 0 or disk or disks > 1:
        raise _refuse(file, f"a zip64 end record at byte {offset}", f"one at byte {expected}")
    magic, length, _, _, disk, first_disk, here, count, size, start = _END64.unpack(file.read(offset, _END64.size))
    if magic != _END64_MAGIC or length != _END64.size - 12 or disk or first_disk or here != count:
        raise _refuse(file, "a zip64 end record that contradicts itself", "one without extensions, for one disk")
    return offset, count, size, start


def _read_entries(file: InputFile, bounds: _Bounds) -> Iterator[_Entry]:
    data, place = file.read(bounds.start, bounds.end - bounds.start), 0
    for _ in range(bounds.count):
        if place + _CENTRAL.size > len(data) or not data.startswith(_CENTRAL_MAGIC, place):
            raise _refuse(file, f"no directory entry at byte {bounds.start + place}", f"{bounds.count} entries")
        fields = _CENTRAL.unpack_from(data, place)
        flags, method, (crc, packed, size), disk, at = fields[3], fields[4], fields[7:10], fields[13], fields[16]
        name_bytes, extra_bytes, comment_bytes = fields[10:13]
        after_name = place + _CENTRAL.size + name_bytes
        after_extra = after_name + extra_bytes
        raw = data[place + _CENTRAL.size : after_name]
        name = _read_name(file, raw, flags)
        if after_extra + comment_bytes > len(data):
            raise _refuse(file, f"a directory entry for {name!r} that is cut off", "whole entries")
        if flags & ~_KNOWN_FLAGS or disk:
            raise _refuse(file, f"member {name!r} is encrypted, patched or on another disk", "a plain member")
        numbers = _widen(file, name, (size, packed, at), data[after_name:after_extra])
        if method == _STORED and numbers[0] != numbers[1]:
            raise _refuse(file, f"member {name!r} has {numbers[1]} bytes of {numbers[0]}", "the same for a stored one")
        yield _Entry(name, raw, flags, method, crc, numbers[1], numbers[0], numbers[2], bounds.start + place + 16)
        place = after_extra + comment_bytes
    if place != len(data):
        raise _refuse(file, f"{len(data) - place} bytes after the last directory entry", "none")


def _read_name(file: InputFile, raw: bytes, flags: int) -> str:
    if not 0 < len(raw) <= MAX_NAME_BYTES:
        raise _refuse(file, f"a member name of {len(raw)} bytes", f"between 1 and {MAX_NAME_BYTES}")
    try:
        name = raw.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError as error:
        raise _refuse(file, f"the member name {raw[:100]!r}", "UTF-8, as its flag says") from error
    if _BAD_NAME.search(name) or ".." in PurePosixPath(name).parts:
        raise _refuse(file, f"the member name {name[:100]!r}", "a relative path without `..`")
    return name


def _widen(file: InputFile, name: str, narrow: tuple[int, int, int], extra: bytes) -> list[int]:
    """Return size, packed size and offset, each from the zip64 field where the 32-bit one is full."""
    wide = _find_zip64(file, name, extra)
    full = sum(number == _FULL32 for number in narrow)
    if len(wide) != 8 * full:
        raise _refuse(file, f"member {name!r} has a zip64 field of {len(wide)} bytes", f"{8 * full} bytes")
    numbers = iter(struct.unpack(f"<{full}Q", wide))
    return [next(numbers) if number == _FULL32 else number for number in narrow]


def _find_zip64(file: InputFile, name: str, extra: bytes) -> bytes:
    found: list[bytes] = []
    place = 0
    while place + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, place)
        if tag == _ZIP64:
            found.append(extra[place + 4 : place + 4 + length])
        place += 4 + length
    if place > len(extra) or len(found) > 1:
        raise _refuse(file, f"member {name!r} has extra fields that contradict each other", "whole ones, each once")
    return found[0] if found else b""


def _locate(file: InputFile, entry: _Entry, limit: int) -> tuple[Member, int]:
    """Return the member and where it ends, after reading its local header; nothing may pass `limit`."""
    head_bytes = LOCAL_HEADER.size + len(entry.raw_name)
    if entry.header_offset + head_bytes > limit:
        raise _refuse(file, f"member {entry.name!r} at byte {entry.header_offset}", f"one before byte {limit}")
    head = file.read(entry.header_offset, head_bytes)
    magic, _, flags, method, _, _, crc, packed, size, name_bytes, extra_bytes = LOCAL_HEADER.unpack_from(head)
    start = entry.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
    if start + entry.packed > limit:
        raise _refuse(file, f"member {entry.name!r} of {entry.packed} bytes at byte {start}", f"an end by byte {limit}")
    same = (ZIP_MAGIC, entry.raw_name, entry.flags, entry.method) == (magic, head[LOCAL_HEADER.size :], flags, method)
    if not same or name_bytes != len(entry.raw_name):
        raise _refuse(file, f"member {entry.name!r} has a local header of its own mind", "what the directory says")
    end, places = start + entry.packed, [entry.crc_offset]
    streamed = bool(flags & _STREAMED)
    _check_local(file, entry, (crc, packed, size), file.read(start - extra_bytes, extra_bytes), streamed=streamed)
    if streamed:
        places.append(end + 4)
        end += _measure_descriptor(file, entry, end, limit)
    if crc == entry.crc and (crc or not streamed):
        places.append(entry.header_offset + 14)
    compression = "" if method == _STORED else _METHODS.get(method, f"method {method}")
    return Member(entry.name, Span(file.path, start, entry.packed), compression, tuple(sorted(places))), end


def _check_local(file: InputFile, entry: _Entry, found: tuple[int, int, int], extra: bytes, *, streamed: bool) -> None:
    """Compare the numbers of a local header with the directory's.

    A streamed member has zeros there. Its zip64 field means nothing: torch's holds an offset (2.13, above 4 GiB).
    """
    crc, *sizes = found
    wide = _find_zip64(file, entry.name, extra)
    spare = {0, _FULL32} if streamed else set()
    if wide == struct.pack("<2Q", entry.size, entry.packed):
        spare.add(_FULL32)
    real = zip(sizes, (entry.packed, entry.size), strict=True)
    if crc not in {entry.crc} | spare or any(size not in {stated} | spare for size, stated in real):
        raise _refuse(file, f"member {entry.name!r} has other sizes in its local header", "what the directory says")


def _measure_descriptor(file: InputFile, entry: _Entry, place: int, limit: int) -> int:
    """Return the length of the descriptor behind a streamed member, which must say what the directory says."""
    data = file.read(place, min(_DESCRIPTORS[-1].size, limit - place))
    for form in _DESCRIPTORS:
        expected = (_DESCRIPTOR_MAGIC, entry.crc, entry.packed, entry.size)
        if len(data) >= form.size and form.unpack_from(data) == expected:
            return form.size
    raise _refuse(file, f"member {entry.name!r} has another descriptor behind it", "what the directory says")
