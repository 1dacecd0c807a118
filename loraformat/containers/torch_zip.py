"""torch checkpoints (`.pt`, `.bin`, `.pth`, `.ckpt`): a zip of a pickle with names and shapes, and of the numbers.

    <root>/data.pkl     the pickle: a dictionary of tensors, each a view (offset, size, stride) of a storage
    <root>/byteorder    `little` or `big`; missing in files of torch before 2.1
    <root>/data/<key>   the bytes of one storage, stored as they are

Nothing is executed and torch is not needed: the pickle is read by `_inert_pickle`, the archive by `_zip_directory`.
Source: `torch/serialization.py` and `caffe2/serialize/inline_container.cc` of torch 2.13.

Tied weights: several names may lie over one storage, as torch.save writes tied and sliced tensors. Two tensors share
numbers exactly when their spans overlap; whoever rewrites spans must look for equal and overlapping spans first
(`span.offset`, `span.end`), there is no other mark.

Rewriting: a copy of the file with spans rewritten in place is the same archive, except that the CRC-32 of each changed
storage is no longer true. torch.load (2.13) checks none of them, its zip reader is built without; `unzip -t`, Python's
zipfile and everything built on it do. `list_crc_fields` says where they stand, `mend_crcs` corrects them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

from loraformat.containers import TensorFile, open_indexed
from loraformat.containers._inert_pickle import read_pickle
from loraformat.containers._inert_values import TensorRecord
from loraformat.containers._new_tensors import NewTensor
from loraformat.containers._strided import StridedTensor, check_shape, is_c_order
from loraformat.containers._torch_names import name_tensors
from loraformat.containers._torch_writing import write_torch_zip
from loraformat.containers._zip_checksums import mend_crcs
from loraformat.containers._zip_directory import (
    LOCAL_HEADER,
    Member,
    read_directory,
    require_stored,
)
from loraformat.dtypes import BY_NAME, Dtype
from loraformat.errors import refuse
from loraformat.images import Copy, FileImage
from loraformat.limits import MAX_PICKLE_BYTES
from loraformat.signatures import HEAD_BYTES, ZIP_MAGIC, describe_head
from loraformat.spans import InputFile, Span, StoredTensor
from loraformat.strict_json import JsonValue

__all__ = ["CONTAINER", "TorchZip", "describe_images", "list_crc_fields", "mend_crcs"]

_PICKLE: Final = "/data.pkl"
_FLAGS_AT: Final = 6
_STREAMED: Final = 8
_TAR_MAGIC_AT: Final = 257
_TAR_MEND: Final = "It can run code. If you trust it: load it in torch with weights_only=False and save it again."
_DTYPES: Final[Mapping[str, Dtype]] = {
    f"torch.{name}": dtype for name, dtype in BY_NAME.items() if dtype.bits >= 8 and dtype.family != "string"
}


@dataclass(frozen=True, slots=True)
class TorchZip:
    """The container of torch.save."""

    name: str = "torch"
    suffixes: tuple[str, ...] = (".bin", ".pt", ".pth", ".ckpt")
    has_magic: bool = True

    def sniff(self, head: bytes, size_bytes: int) -> bool:
        """Say whether the first member of a zip is `<root>/data.pkl`.

        A name that is longer than `head` does not show its end: then it is torch's if the member is streamed, as torch
        always writes it and numpy never does.
        """
        if not head.startswith(ZIP_MAGIC) or min(len(head), size_bytes) < LOCAL_HEADER.size:
            return False
        *_, name_bytes, _ = LOCAL_HEADER.unpack_from(head)
        name = head[LOCAL_HEADER.size :][:name_bytes]
        return name.endswith(_PICKLE.encode()) if len(name) == name_bytes else bool(head[_FLAGS_AT] & _STREAMED)

    def open(self, path: Path | InputFile) -> TensorFile:
        """Check archive, pickle and every view, and return the tensors in the order of the dictionary.

        Tensors that are views without C order are `StridedTensor`s: readable, without a span.

        Raises:
            InputError: LF101, LF105, LF106, LF109, LF111, LF112, LF114, LF121, LF123, LF301.
            RefusedError: LF110, LF901, LF902.
        """
        return open_indexed(path, index_checkpoint)

    def write(self, sink: int | BinaryIO, tensors: Sequence[NewTensor], metadata: Mapping[str, JsonValue]) -> None:
        """Write a new checkpoint; see `write_torch_zip`."""
        write_torch_zip(sink, tensors, metadata)


CONTAINER: Final = TorchZip()


def describe_images(file: TensorFile, output: Path) -> list[FileImage]:
    """Return the one output file: a copy, in which spans can be rewritten; see above for the CRCs."""
    return [FileImage(output, [Copy(file.file, 0, file.file.size_bytes)])]


def list_crc_fields(file: TensorFile) -> Mapping[Span, tuple[int, ...]]:
    """Return the bytes of each storage, and the offsets at which the file states their CRC-32 (4 bytes, little-endian).

    A storage holds whole tensors: when a span was rewritten, the CRC of the storage that contains it is to be mended.
    """
    return {
        member.span: member.crc_offsets
        for name, member in read_directory(file.file).items()
        if name.partition("/")[2].startswith("data/")
    }


def index_checkpoint(file: InputFile) -> TensorFile:
    """Return the tensors of an open checkpoint; raises as `TorchZip.open` does."""
    if not file.size_bytes:
        raise refuse("LF101", file.path, "an empty file", "a torch checkpoint")
    head = file.read(0, min(HEAD_BYTES, file.size_bytes))
    if not head.startswith(ZIP_MAGIC):
        _refuse_stranger(file, head)
    members = read_directory(file)
    root = _find_root(members, file.path)
    require_stored(file, members, "Unpack it and zip it again without compression: zip -0.")
    _check_byte_order(members, root, file)
    pickle = members[root + _PICKLE]
    if pickle.span.length > MAX_PICKLE_BYTES:
        raise refuse("LF110", file.path, f"a pickle of {pickle.span.length} bytes", f"at most {MAX_PICKLE_BYTES}")
    value = read_pickle(file.read(pickle.span.offset, pickle.span.length), f"{file.path}, {pickle.name}")
    named = name_tensors(value, file.path)
    data = f"{root}/data/"
    storages = {name.removeprefix(data): member.span for name, member in members.items() if name.startswith(data)}
    tensors = {name: _place(file, name, record, storages) for name, record in named.tensors.items()}
    return TensorFile(file, tensors, named.metadata)


def _refuse_stranger(file: InputFile, head: bytes) -> NoReturn:
    expected = "a torch checkpoint in its zip format"
    described = describe_head(head)
    if described is not None:
        raise refuse("LF111", file.path, described.what, expected, described.mend)
    if file.size_bytes > _TAR_MAGIC_AT + 5 and file.read(_TAR_MAGIC_AT, 5) == b"ustar":
        raise refuse("LF111", file.path, "a tar archive, as the oldest torch wrote it", expected, _TAR_MEND)
    raise refuse("LF121", file.path, "a file of no known format", expected)


def _find_root(members: Mapping[str, Member], path: Path) -> str:
    roots = [name.removesuffix(_PICKLE) for name in members if name.endswith(_PICKLE) and name.count("/") == 1]
    if len(roots) > 1:
        raise refuse("LF902", path, f"{len(roots)} pickles", "one <root>/data.pkl")
    if not roots:
        found = f"a zip archive without <root>/data.pkl: {', '.join(list(members)[:3]) or 'empty'}"
        raise refuse("LF111", path, f"{found:.200}", "what torch.save writes", "Name the file with the tensors.")
    (root,) = roots
    if f"{root}/constants.pkl" in members or any(name.startswith(f"{root}/code/") for name in members):
        mend = "It holds a program: load it with torch.jit.load where it was made, and torch.save its state_dict()."
        raise refuse("LF111", path, "a TorchScript archive", "a state dict as torch.save writes it", mend)
    return root


def _check_byte_order(members: Mapping[str, Member], root: str, file: InputFile) -> None:
    member = members.get(f"{root}/byteorder")
    if member is None:
        return
    order = file.read(member.span.offset, min(member.span.length, 16))
    if order != b"little":
        raise refuse("LF112" if order == b"big" else "LF109", file.path, f"byte order {order!r}", "little")


def _place(file: InputFile, name: str, record: TensorRecord, storages: Mapping[str, Span]) -> StoredTensor:
    """Return the tensor of a view, after comparing it with its storage and the storage with its member."""
    where = f"{file.path}, tensor {name!r}"
    dtype = _DTYPES.get(record.dtype)
    if dtype is None:
        raise refuse("LF106", where, f"dtype {record.dtype}", f"one of {', '.join(_DTYPES)}")
    check_shape(where, record.shape, dtype, "LF114")
    if record.marks is not None and any(value is not False for _, value in record.marks.items):
        mend = "Save tensor.resolve_conj().resolve_neg() in its place."
        raise refuse("LF114", where, "a view that conjugates or negates its numbers", "the numbers themselves", mend)
    storage = _find_storage(where, record, storages)
    elements, item = math.prod(record.shape), dtype.bits // 8
    if not elements:  # torch.save writes views of nothing with any offset.
        return StoredTensor(name, dtype, record.shape, Span(file.path, storage.offset, 0), file)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(record.shape, record.strides, strict=True))
    if min(record.offset, *record.strides, 0) < 0 or (record.offset + extent) * item > storage.length:
        found = f"offset {record.offset}, shape {list(record.shape)}, strides {list(record.strides)}"
        raise refuse("LF114", where, f"{found!s:.200}", f"a view inside the {storage.length} bytes of its storage")
    span = Span(file.path, storage.offset + record.offset * item, extent * item)
    if is_c_order(record.shape, record.strides):
        return StoredTensor(name, dtype, record.shape, span, file)
    if elements * item > file.size_bytes:  # A stride of 0 makes any number of elements from one.
        raise refuse("LF114", where, f"an expanded view of {elements} elements", "no more bytes than the file has")
    return StridedTensor(name, dtype, record.shape, record.strides, span, file)


def _find_storage(where: str, record: TensorRecord, storages: Mapping[str, Span]) -> Span:
    stated = record.storage
    span = storages.get(stated.key)
    if span is None:
        raise refuse("LF114", where, f"storage {stated.key!r:.100}, which the archive lacks", "a member data/<key>")
    # The bytes of a storage need not be a multiple of its elements' size.
    if span.length // (BY_NAME[stated.dtype].bits // 8) != stated.elements:
        found = f"a storage of {stated.elements} elements of {stated.dtype} in {span.length} bytes"
        raise refuse("LF114", where, f"{found:.200}", "as many as its member holds")
    return span
