"""Writing output files from their images, as slowly and simply as can be: what the engine does, without it."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from loraformat.bases import BaseModel
from loraformat.images import Blank, Copy, FileImage, Fresh, Literal
from loraformat.spans import StoredTensor


def write_images(images: Iterable[FileImage], receipt: bytes = b"{}", fresh: Mapping[str, bytes] = {}) -> list[Path]:
    """Write every file: blanks hold `receipt`, rooms for computed tensors hold their bytes in `fresh`."""
    written = []
    for image in images:
        image.path.parent.mkdir(parents=True, exist_ok=True)
        image.path.write_bytes(b"".join(_content(piece, receipt, fresh) for _, piece in image.placed()))
        assert image.path.stat().st_size == image.size_bytes
        written.append(image.path)
    return written


def _content(piece: Copy | Literal | Blank | Fresh, receipt: bytes, fresh: Mapping[str, bytes]) -> bytes:
    match piece:
        case Copy(file, offset, length):
            return file.read(offset, length)
        case Literal():
            return piece.data
        case Blank(length):
            return receipt.ljust(length)
        case Fresh(key, length):
            assert len(fresh[key]) == length, key
            return fresh[key]


def rewrite_spans(base: BaseModel, images: Sequence[FileImage], changes: Mapping[str, bytes]) -> None:
    """Write the new bytes of some tensors into the output files, and have the base finish each file."""
    tensors: dict[str, StoredTensor] = {tensor.name: tensor for tensor in base.list_tensors()}
    for name, data in changes.items():
        places = [(image, place) for image in images if (place := image.locate(tensors[name].span)) is not None]
        assert len(places) == 1, name
        assert len(data) == tensors[name].span.length
        ((image, place),) = places
        with image.path.open("r+b") as stream:
            stream.seek(place)
            stream.write(data)
    touched = [tensors[name].span for name in changes]
    for image in images:
        descriptor = os.open(image.path, os.O_RDWR)
        try:
            base.finish_output(image, descriptor, touched)
            checksums = base.compute_checksums(image, descriptor, touched)
            assert all(os.pread(descriptor, len(data), at) == data for at, data in checksums.items())
        finally:
            os.close(descriptor)
