"""The bytes that a merge overwrites, kept in a file, so that it can be undone to the last bit.

The file is a safetensors file of byte arrays, one for each rewritten span, called `<file>@<offset>` after the place in
the merged model that it belongs to.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loraformat.bases import BaseModel
from loraformat.containers.safetensors import CONTAINER, frame_header
from loraformat.engine import index_tensors, locate_weight
from loraformat.errors import refuse
from loraformat.files import resolve_inside
from loraformat.images import Copy, FileImage, Literal, Piece
from loraformat.plan import Plan
from loraformat.spans import InputFile, StoredTensor
from loraformat.strict_json import JsonValue, parse_json_object, write_canonical

UNDO_KEY: Final = "loraformat.undo"
FOLDER_UNDO: Final = "merge.undo"
_SUFFIX: Final = ".undo"
_JOURNAL: Final = ".loraformat-journal"


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


@dataclass(frozen=True, slots=True)
class Undo:
    """An opened undo file.

    Attributes:
        file: the open file.
        spans: what it keeps.
        record: what it says of the merge: digest of the plan, files and their sizes.
    """

    file: InputFile
    spans: tuple[KeptSpan, ...]
    record: Mapping[str, Any]


def name_undo(model: Path) -> Path:
    """Return where the undo file of a merged model stands: inside a folder, beside a file."""
    return model / FOLDER_UNDO if model.is_dir() else model.with_name(model.name + _SUFFIX)


def name_journal(model: Path) -> Path:
    """Return where the undo file of a merge in place stands as long as that merge is not complete."""
    return model / _JOURNAL if model.is_dir() else model.with_name(f".{model.name}{_JOURNAL}")


def describe_undo(path: Path, root: Path, images: Sequence[FileImage], plan: Plan, base: BaseModel) -> FileImage:
    """Return the undo file of a plan.

    Args:
        path: where it will stand.
        root: the folder that files are named from.
        images: the files of the plan's output.
        plan: what overwrites the bytes; none of its weights has a new form.
        base: the opened base.
    """
    tensors = index_tensors(base)
    entries: dict[str, JsonValue] = {}
    pieces: list[Piece] = []
    end = 0
    for weight in plan.weights:
        tensor = tensors[weight.key]
        image, offset = locate_weight(images, weight, tensor)
        begin, end = end, end + tensor.span.length
        name = f"{os.path.relpath(images[image].path, root)}@{offset}"
        entries[name] = {"dtype": "U8", "shape": [tensor.span.length], "data_offsets": [begin, end]}
        pieces.append(Copy(tensor.file, tensor.span.offset, tensor.span.length))
    files: dict[str, JsonValue] = {os.path.relpath(image.path, root): image.size_bytes for image in images}
    record: dict[str, JsonValue] = {"version": "1.0", "plan_sha256": plan.sha256, "files": files}
    header = entries | {"__metadata__": {UNDO_KEY: write_canonical(record).decode()}}
    text = write_canonical(header)
    return FileImage(path, [Literal(frame_header(len(text)) + text + b" " * (-len(text) % 8)), *pieces], is_kept=True)


def open_undo(path: Path) -> Undo:
    """Open an undo file.

    Raises:
        InputError: not a sound file of this kind.
    """
    opened = CONTAINER.open(path)
    if UNDO_KEY not in opened.metadata:
        raise refuse("LF121", path, "a safetensors file without a record of a merge", "what --keep-undo has kept")
    record = parse_json_object(opened.metadata[UNDO_KEY].encode(), f"{path}: {UNDO_KEY}")
    spans = tuple(_read_span(path, name, tensor) for name, tensor in opened.tensors.items())
    return Undo(opened.file, spans, record)


def _read_span(path: Path, name: str, tensor: StoredTensor) -> KeptSpan:
    file, _, offset = name.rpartition("@")
    if not file or not offset.isascii() or not offset.isdigit() or len(offset) > 18:
        raise refuse("LF109", path, f"an entry called {name!r:.100}", "<file>@<offset>")
    resolve_inside(path, file)
    return KeptSpan(file, int(offset), tensor)


def restore_pieces(image: FileImage, name: str, undo: Undo) -> FileImage:
    """Return an image of a merged file with the kept bytes in place of the merged ones.

    Args:
        image: the file as it will be written.
        name: how the undo file calls the merged file that it is a copy of.
        undo: what was kept.
    """
    spans = sorted((kept for kept in undo.spans if kept.file == name), key=lambda kept: kept.offset)
    pieces: list[Piece] = []
    for piece in image.pieces:
        if not isinstance(piece, Copy):
            pieces.append(piece)
            continue
        position, stop = piece.offset, piece.offset + piece.length
        for kept in spans:
            if position <= kept.offset and kept.offset + kept.kept.span.length <= stop:
                span = kept.kept.span
                pieces += [
                    Copy(piece.file, position, kept.offset - position),
                    Copy(undo.file, span.offset, span.length),
                ]
                position = kept.offset + span.length
        pieces.append(Copy(piece.file, position, stop - position))
    return FileImage(image.path, pieces)
