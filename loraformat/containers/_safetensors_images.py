"""safetensors files that do not exist yet: a copy with another header, or a file written anew tensor by tensor."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from loraformat.containers import TensorFile
from loraformat.containers.safetensors import METADATA_FIELD, check_tensor_name, find_data_start, frame_header
from loraformat.errors import refuse
from loraformat.images import Blank, Copy, FileImage, Literal, OutputTensor, Piece, join_copies
from loraformat.limits import MAX_METADATA_BYTES
from loraformat.spans import StoredTensor
from loraformat.strict_json import write_canonical


def escape_for_header(text: str) -> bytes:
    """Return the bytes that stand for `text` in the blank that `describe_images` leaves.

    The blank lies inside a JSON string: the caller pads these bytes with spaces to the blank's length, so a reader gets
    `text` followed by spaces.
    """
    return write_canonical(text)[1:-1]


def describe_images(file: TensorFile, output: Path, metadata_key: str, blank_bytes: int) -> list[FileImage]:
    """Return the image of the same file with the metadata entry `metadata_key`, whose value is a blank for now.

    The blank is to be filled with `escape_for_header(text)`; one of 0 bytes stands for no entry. Tensors keep their
    order and offsets; an older entry of that key gives way.

    Raises:
        RefusedError: LF110 a blank or header that readers would refuse.
    """
    start = find_data_start(file.file)
    entries = [_write_stored(tensor, start) for tensor in file.tensors.values()]
    header = _describe_header(output, entries, file.metadata, metadata_key, blank_bytes)
    return [FileImage(output, [*header, Copy(file.file, start, file.file.size_bytes - start)])]


def describe_rewritten(
    output: Path,
    tensors: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    metadata_key: str | None = None,
    blank_bytes: int = 0,
) -> FileImage:
    """Return the image of a new file: a `Copy` for each tensor whose bytes a source has, a `Fresh` for each other.

    Args:
        output: where it will stand.
        tensors: what it holds. Wide number forms come first, so that all are aligned; else the order is kept.
        metadata: its text annotations; an entry `metadata_key` gives way.
        metadata_key: the entry whose value is a blank, to be filled with `escape_for_header(text)`.
        blank_bytes: its length; 0 for no such entry.

    Raises:
        InputError: LF105 a name given twice, LF301 an unfit name.
        RefusedError: LF110 a header that readers would refuse, LF610 a number form that safetensors lacks.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.bits)
    names: set[str] = set()
    entries: list[bytes] = []
    end = 0
    for tensor in ordered:
        check_tensor_name(output, tensor.name)
        if tensor.name in names:
            raise refuse("LF105", output, f"two tensors {tensor.name!r}", "each name once")
        if tensor.dtype.safetensors is None:
            found = f"{tensor.dtype.name} numbers in {tensor.name!r}"
            raise refuse("LF610", output, found, "number forms that safetensors has")
        names.add(tensor.name)
        begin, end = end, end + tensor.nbytes
        entries.append(_write_entry(tensor, begin, end))
    header = _describe_header(output, entries, metadata, metadata_key, blank_bytes)
    return FileImage(output, [*header, *join_copies(tensor.as_piece() for tensor in ordered)])


def _describe_header(
    output: Path, entries: Sequence[bytes], metadata: Mapping[str, str], key: str | None, blank_bytes: int
) -> list[Piece]:
    if blank_bytes > MAX_METADATA_BYTES:
        raise refuse("LF110", output, f"a metadata value of {blank_bytes} bytes", f"at most {MAX_METADATA_BYTES}")
    noted = [_write_member(name, write_canonical(text)) for name, text in sorted(metadata.items()) if name != key]
    blank = [Blank(blank_bytes)] if blank_bytes else []
    if key is not None and blank:  # The blank is the last value: its closing quotation mark stands behind it.
        noted.append(write_canonical(key) + b':"')
    before, after = b"{", b",".join(entries) + b"}"
    if noted:
        before += b'"%b":{%b' % (METADATA_FIELD.encode(), b",".join(noted))
        after = (b'"}' if blank else b"}") + (b"," if entries else b"") + after
    text_bytes = len(before) + sum(piece.length for piece in blank) + len(after)
    padding = b" " * (-text_bytes % 8)
    return [Literal(frame_header(text_bytes) + before), *blank, Literal(after + padding)]


def _write_stored(tensor: StoredTensor, start: int) -> bytes:
    return _write_entry(tensor, tensor.span.offset - start, tensor.span.end - start)


def _write_entry(tensor: StoredTensor | OutputTensor, begin: int, end: int) -> bytes:
    entry = {"dtype": tensor.dtype.safetensors, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    return _write_member(tensor.name, write_canonical(entry))


def _write_member(name: str, value: bytes) -> bytes:
    return write_canonical(name) + b":" + value
