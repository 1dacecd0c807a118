"""The bytes that a merge overwrites, kept in a file, so that it can be undone to the last bit.

The file is a safetensors file of byte arrays, one for each rewritten span, called `<file>@<offset>` after the place in
the merged model that it belongs to.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from loraformat.bases import BaseModel
from loraformat.containers.safetensors import CONTAINER, frame_header
from loraformat.errors import refuse
from loraformat.files import is_location, name_from, resolve_inside
from loraformat.images import Copy, FileImage, Literal, Piece
from loraformat.output_forms import list_touched
from loraformat.outputs import FOLDER_UNDO, JOURNAL
from loraformat.plan import Plan
from loraformat.spans import InputFile, Span, StoredTensor
from loraformat.strict_json import JsonValue, parse_json_object, write_canonical

UNDO_KEY: Final = "loraformat.undo"
_SUFFIX: Final = ".undo"
_RECEIPT: Final = "receipt_before"
_NONE: Final[Mapping[str, Any]] = {}


@dataclass(frozen=True, slots=True)
class KeptSpan:
    """Bytes that stood in a model before a merge.

    Attributes:
        file: the model's file, relative to `root`.
        offset: where in it they stood.
        kept: where they are kept.
    """

    file: str
    offset: int
    kept: StoredTensor

    @property
    def length(self) -> int:
        """Bytes."""
        return self.kept.span.length


@dataclass(frozen=True, slots=True)
class Undo:
    """An opened undo file.

    Attributes:
        file: the open file.
        spans: what it keeps.
        plan_sha256: digest of the plan that has overwritten it.
        is_in_place: whether that was a merge into the model's own files.
        receipt: for a merge in place, what stood in the file of its receipt; None for nothing.
    """

    file: InputFile
    spans: tuple[KeptSpan, ...]
    plan_sha256: str
    is_in_place: bool
    receipt: bytes | None

    @property
    def kept_bytes(self) -> int:
        """How many bytes it keeps."""
        return sum(kept.length for kept in self.spans)


def name_undo(model: Path) -> Path:
    """Return where the undo file of a merged model stands: inside a folder, beside a file."""
    return model / FOLDER_UNDO if model.is_dir() else model.with_name(model.name + _SUFFIX)


def name_journal(model: Path) -> Path:
    """Return where the undo file of a merge in place stands as long as that merge is not complete."""
    return model / JOURNAL if model.is_dir() else model.with_name(f".{model.name}{JOURNAL}")


def describe_undo(
    path: Path, root: Path, images: Sequence[FileImage], plan: Plan, base: BaseModel, record: Mapping[str, Any] = _NONE
) -> FileImage:
    """Return the undo file of a plan.

    Args:
        path: where it will stand.
        root: the folder that files are named from.
        images: the files of the plan's output.
        plan: what overwrites the bytes; none of its weights has a new form.
        base: the opened base.
        record: what it says beside the plan's digest, as `record_in_place` makes it.

    Raises:
        RefusedError: LF608 a file whose name an undo file cannot hold.
    """
    entries: dict[str, JsonValue] = {}
    pieces: list[Piece] = []
    end = 0
    for file, span in _list_overwritten(plan, base):
        name, offset = next(
            (name_from(image.path, root), offset) for image in images if (offset := image.locate(span)) is not None
        )
        if not is_location(name):
            raise refuse(
                "LF608", root / name, f"bytes to keep of {name!r}", "a name of UTF-8 without backslash and drive"
            )
        begin, end = end, end + span.length
        entries[f"{name}@{offset}"] = {"dtype": "U8", "shape": [span.length], "data_offsets": [begin, end]}
        pieces.append(Copy(file, span.offset, span.length))
    stated: dict[str, JsonValue] = {"version": "1.0", "plan_sha256": plan.sha256, **record}
    header = entries | {"__metadata__": {UNDO_KEY: write_canonical(stated).decode()}}
    text = write_canonical(header)
    text += b" " * (-len(text) % 8)
    return FileImage(path, [Literal(frame_header(len(text)) + text), *pieces], is_kept=True)


def record_in_place(receipt: bytes | None) -> Mapping[str, Any]:
    """Return what the undo file of a merge in place says: what stood in the file of its receipt, if it was there."""
    return {_RECEIPT: receipt.decode("latin-1") if receipt is not None else None}


def _list_overwritten(plan: Plan, base: BaseModel) -> Iterator[tuple[InputFile, Span]]:
    """Yield the byte ranges that a plan overwrites: its weights, and the checksums that follow from them.

    Checksums are kept as they are, for a base may have wrong ones.
    """
    touched = list_touched(plan, base)
    files = {file.path: file for file in base.files}
    yield from ((files[span.path], span) for span in touched)
    for file in base.files:
        image = FileImage(file.path, [Copy(file, 0, file.size_bytes)])
        for offset, checksum in base.compute_checksums(image, file.descriptor, touched).items():
            yield file, Span(file.path, offset, len(checksum))


def open_undo(path: Path) -> Undo:
    """Open an undo file.

    Raises:
        InputError: not a sound file of this kind.
        FindingError: LF803 fields of another type, bytes that overlap.
    """
    opened = CONTAINER.open(path)
    if UNDO_KEY not in opened.metadata:
        raise refuse("LF121", path, "a safetensors file without a record of a merge", "what --keep-undo has kept")
    record = parse_json_object(opened.metadata[UNDO_KEY].encode(), f"{path}: {UNDO_KEY}")
    plan_sha256, receipt = record.get("plan_sha256"), record.get(_RECEIPT)
    if not isinstance(plan_sha256, str) or not isinstance(receipt, str | None):
        raise refuse("LF803", path, f"plan {plan_sha256!r:.80}", "a digest, and the text of a receipt or null")
    spans = tuple(_read_span(path, name, tensor) for name, tensor in opened.tensors.items())
    ordered = sorted(spans, key=lambda kept: (kept.file, kept.offset))
    for one, other in pairwise(ordered):
        if one.file == other.file and one.offset + one.length > other.offset:
            raise refuse("LF803", path, f"bytes of {one.file!r} at {other.offset} twice", "each byte once")
    before = receipt.encode("latin-1", "replace") if receipt is not None else None
    return Undo(opened.file, spans, plan_sha256, _RECEIPT in record, before)


def check_undo(undo: Undo, files: Mapping[str, InputFile]) -> None:
    """Refuse an undo file (LF803) that keeps what a model does not have.

    Args:
        undo: the undo file.
        files: the model's files, as the undo file calls them.
    """
    for kept in undo.spans:
        if kept.file not in files or kept.offset + kept.length > files[kept.file].size_bytes:
            found = f"{kept.length} bytes of {kept.file!r} at {kept.offset}"
            raise refuse("LF803", undo.file.path, found, "a range of a file of the model")


def _read_span(path: Path, name: str, tensor: StoredTensor) -> KeptSpan:
    file, _, offset = name.rpartition("@")
    if not file or not offset.isascii() or not offset.isdigit() or len(offset) > 18:
        raise refuse("LF109", path, f"an entry called {name!r:.100}", "<file>@<offset>")
    resolve_inside(path, file)
    return KeptSpan(file, int(offset), tensor)


def restore_pieces(image: FileImage, names: Mapping[Path, str], undo: Undo) -> FileImage:
    """Return an image of a merged model's copy with the kept bytes in place of the merged ones.

    Args:
        image: a file as it will be written.
        names: how the undo file calls each of the merged model's files.
        undo: what was kept.
    """
    ordered = sorted(undo.spans, key=lambda kept: kept.offset)
    pieces: list[Piece] = []
    for piece in image.pieces:
        if not isinstance(piece, Copy):
            pieces.append(piece)
            continue
        position, stop = piece.offset, piece.offset + piece.length
        for kept in ordered:
            if kept.file == names.get(piece.file.path) and position <= kept.offset <= stop - kept.length:
                pieces += [
                    Copy(piece.file, position, kept.offset - position),
                    Copy(undo.file, kept.kept.span.offset, kept.length),
                ]
                position = kept.offset + kept.length
        pieces.append(Copy(piece.file, position, stop - position))
    return FileImage(image.path, pieces)
