"""The checksums of a zip archive whose members changed after they were written."""

import struct
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from loraformat.errors import refuse
from loraformat.files import write_at
from loraformat.spans import Span
from loraformat.system import read_at

_CRC: Final = struct.Struct("<L")
_STEP_BYTES: Final = 1 << 20


def compute_crcs(descriptor: int, fields: Mapping[Span, Iterable[int]], jobs: int = 1) -> Mapping[int, bytes]:
    """Return the CRC-32 of the present content of each span, as the archive states it, by the offsets where it does.

    For a copy of the archive in which spans were rewritten in place: nothing but these four bytes depends on the
    content. torch (2.13) does not look at them, numpy and every unzip do.

    Args:
        descriptor: the copy, open for reading.
        fields: content of a member to the offsets of its CRC, for those members that changed.
        jobs: threads; each takes one member at a time.
    """
    with ThreadPoolExecutor(jobs, thread_name_prefix="loraformat-crc") as pool:
        crcs = list(pool.map(lambda span: _compute_crc(descriptor, span), fields))
    return {offset: crc for crc, offsets in zip(crcs, fields.values(), strict=True) for offset in offsets}


def _compute_crc(descriptor: int, span: Span) -> bytes:
    crc, position = 0, span.offset
    while position < span.end:
        data = read_at(descriptor, min(_STEP_BYTES, span.end - position), position)
        if not data:
            raise refuse("LF906", span.path, f"the copy ends at byte {position}", "the size it had")
        crc, position = zlib.crc32(data, crc), position + len(data)
    return _CRC.pack(crc)


def mend_crcs(descriptor: int, fields: Mapping[Span, Iterable[int]]) -> None:
    """Write what `compute_crcs` returns; the copy must be open for writing too."""
    for offset, crc in compute_crcs(descriptor, fields).items():
        write_at(descriptor, crc, offset)
