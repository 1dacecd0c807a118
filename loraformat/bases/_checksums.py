"""The checksums of a zip archive in which spans were rewritten in place."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Final

from loraformat.containers._zip_checksums import compute_crcs
from loraformat.images import FileImage
from loraformat.spans import Span

_CRC_BYTES: Final = 4


def compute_checksums(
    fields: Mapping[Span, Sequence[int]], image: FileImage, descriptor: int, touched: Sequence[Span], jobs: int
) -> Mapping[int, bytes]:
    """Return the CRC-32 of every member that holds a touched span, by the offsets where the output states it.

    Args:
        fields: content of each member of the input, and the offsets of its CRC-32 there.
        image: the output file. One that is no copy of the archive has no such places.
        descriptor: it, open for reading.
        touched: the spans of the input whose numbers were written anew.
        jobs: threads.
    """
    members = sorted(fields, key=lambda member: member.offset)
    starts = [member.offset for member in members]
    changed: dict[Span, list[int]] = {}
    for span in touched:
        index = bisect_right(starts, span.offset) - 1
        if index < 0 or members[index].path != span.path or span.end > members[index].end:
            continue
        member = members[index]
        place = image.locate(member)
        places = [image.locate(Span(member.path, offset, _CRC_BYTES)) for offset in fields[member]]
        if place is not None:
            changed[Span(image.path, place, member.length)] = [at for at in places if at is not None]
    return compute_crcs(descriptor, {member: places for member, places in changed.items() if places}, jobs)
