"""The skeleton of an ONNX model: the same file with the large payloads of its tensors cut out.

It is made by the splicing that edits models, so nothing but the payloads and the lengths around them changes. Each
tensor whose numbers are one run of bytes says where in its `segment` field, which nobody else uses.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from loraformat.containers._protobuf import (
    LENGTH,
    VARINT,
    Field,
    Frame,
    Leaf,
    encode_bytes,
    encode_tag,
    encode_varint,
    splice,
)
from loraformat.errors import refuse
from loraformat.images import Copy, Edit, Literal, Piece, edit_file
from loraformat.limits import KEEP_CODES_BYTES, KEEP_INLINE_BYTES, MAX_SKELETON_BYTES
from loraformat.spans import InputFile

if TYPE_CHECKING:
    import onnx

SEGMENT: Final = 3
RAW_DATA: Final = 9
PAYLOAD_FIELDS: Final = frozenset({4, 5, 6, 7, RAW_DATA, 10, 11})
"""Fields of TensorProto that hold numbers."""

_PACKED_AS_RAW: Final = {4: frozenset({1, 14}), 10: frozenset({11, 15})}
"""Packed fields whose bytes are those of raw_data, and the data types that are kept in them."""

_BYTE_KINDS: Final = frozenset({2, 3})
"""uint8 and int8: quantisers write zero points of a weight's channels one by one, as `int32_data`."""


def build_skeleton(file: InputFile, cuts: Iterable[Leaf], receipts: Iterable[Field]) -> tuple["onnx.ModelProto", str]:
    """Return the skeleton, our own receipts moved to its end, and the SHA-256 of what stands before them.

    Args:
        file: the model.
        cuts: what to change, from `Payload.cuts`.
        receipts: our own entries of metadata_props.

    Raises:
        RefusedError: LF110 the skeleton is too large.
        InputError: LF118 the protobuf library refuses it.
    """
    moved = [Copy(file, field.start, field.end - field.start) for field in receipts]
    removed = [Leaf(Edit(piece.offset, piece.length, ()), None) for piece in moved]
    data = _join(file, edit_file(file, splice([*cuts, *removed]), moved))
    bare = len(data) - sum(piece.length for piece in moved)
    return _parse_model(data, file), hashlib.sha256(data[:bare]).hexdigest()


def _join(file: InputFile, pieces: Sequence[Piece]) -> memoryview:
    size = sum(piece.length for piece in pieces)
    if size > MAX_SKELETON_BYTES:
        raise refuse("LF110", file.path, f"{size} bytes without the weights", f"at most {MAX_SKELETON_BYTES}")
    data, position = memoryview(bytearray(size)), 0
    for piece in pieces:
        target = data[position : position + piece.length]
        if isinstance(piece, Copy):
            file.read_into(target, piece.offset)
        elif isinstance(piece, Literal):
            target[:] = piece.data
        position += piece.length
    return data


def _parse_model(data: memoryview, file: InputFile) -> "onnx.ModelProto":
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise refuse("LF118", file.path, str(error).split("\n", 1)[0], "a model that protobuf can parse") from error
    return model


class Payload:
    """The fields that hold one tensor's numbers; neighbours are merged, so that unpacked ones take no memory."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int]] = []
        self._only: Field | None = None
        self._bytes = 0

    def add(self, item: Field) -> None:
        """Add a field."""
        self._only = None if self._runs else item
        self._bytes += item.end - item.begin
        if self._runs and self._runs[-1][1] == item.start:
            self._runs[-1] = (self._runs[-1][0], item.end)
        else:
            self._runs.append((item.start, item.end))

    def cuts(self, frame: Frame, kind: int) -> Iterator[Leaf]:
        """Yield what to change of the tensor in the skeleton: cut large payloads, say where the numbers are."""
        segment = self._segment(kind)
        keep = self._bytes <= (KEEP_CODES_BYTES if kind in _BYTE_KINDS and not segment else KEEP_INLINE_BYTES)
        if keep and segment:
            yield Leaf(Edit(self._runs[-1][1], 0, segment), frame)
        elif not keep:
            for start, end in self._runs:
                yield Leaf(Edit(start, end - start, segment), frame)

    def find_run(self, kind: int) -> Field | None:
        """Return the field with the numbers, when they are one large run in raw form."""
        return self._only if self._bytes > KEEP_INLINE_BYTES and self._segment(kind) else None

    def _segment(self, kind: int) -> tuple[Literal, ...]:
        """Return the field that says where the numbers are, when they are one run in raw form."""
        item = self._only
        if item is None or item.wire != LENGTH:
            return ()
        if item.number != RAW_DATA and kind not in _PACKED_AS_RAW.get(item.number, ()):
            return ()
        begin = encode_tag(1, VARINT) + encode_varint(item.begin)
        end = encode_tag(2, VARINT) + encode_varint(item.end)
        return (Literal(encode_bytes(SEGMENT, begin + end)),)
