"""Mending the checksums of a zip archive whose members were rewritten in place."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from loraformat.containers._zip_directory import mend_crcs
from loraformat.images import FileImage
from loraformat.spans import Span


def mend_checksums(
    fields: Mapping[Span, Sequence[int]], image: FileImage, descriptor: int, touched: Sequence[Span]
) -> None:
    """Write the CRC-32 of every member that holds a touched span to where the output states it.

    Args:
        fields: content of each member of the input, and the offsets of its CRC-32 there.
        image: the output file. One that is no copy of the archive has no such places, and nothing is written.
        descriptor: it, open for reading and writing.
        touched: the spans of the input whose numbers were written anew.
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
        places = [image.locate(Span(member.path, offset, 4)) for offset in fields[member]]
        if place is not None:
            changed[Span(image.path, place, member.length)] = [at for at in places if at is not None]
    mend_crcs(descriptor, changed)
