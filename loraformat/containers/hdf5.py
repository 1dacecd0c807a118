"""HDF5 (`.h5`), as Keras writes weights: groups in groups, and arrays in them, called by their path.

The library h5py reads what the file says of itself, through a file of ours, so that it opens no other; the numbers are
read by us where it says that they lie. Links are not followed but the plain ones of the file itself, and arrays in
chunks, in other files or in other forms than numbers are refused. Keras has bfloat16 as numbers of 16 bits with an
attribute that says so. Source: HDF5 1.14, and keras 3.15, src/saving/saving_lib.py (`H5IOStore`).
"""

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loraformat.containers import TensorFile, open_indexed
from loraformat.containers._strided import check_name, check_shape
from loraformat.dtypes import BY_NAME, Dtype
from loraformat.errors import LoraformatError, refuse
from loraformat.limits import MAX_TENSORS
from loraformat.signatures import HEAD_BYTES, describe_head
from loraformat.spans import InputFile, Span, StoredTensor

_MAGIC: Final = b"\x89HDF\r\n\x1a\n"
_MOST_DEEP: Final = 32
_BFLOAT16: Final = BY_NAME["bfloat16"]
_DTYPES: Final[Mapping[str, Dtype]] = {
    f"{'|' if BY_NAME[name].bits == 8 else '<'}{letter}{BY_NAME[name].bits // 8}": BY_NAME[name]
    for letter, names in (
        ("f", ("float64", "float32", "float16")),
        ("i", ("int64", "int32", "int16", "int8")),
        ("u", ("uint64", "uint32", "uint16", "uint8")),
    )
    for name in names
}
_REPACK: Final = "Write it again without chunks or compression, each array with one create_dataset(name, data=array)."


@dataclass(frozen=True, slots=True)
class Hdf5:
    """The container of HDF5."""

    name: str = "hdf5"
    suffixes: tuple[str, ...] = (".h5", ".hdf5")
    has_magic: bool = True

    def sniff(self, head: bytes, size_bytes: int) -> bool:
        """Say whether the file begins as those of HDF5 do."""
        return head.startswith(_MAGIC)

    def open(self, path: Path | InputFile) -> TensorFile:
        """Return the arrays by their paths, in the order in which the library lists them.

        Raises:
            InputError: LF101, LF106, LF109, LF111, LF112, LF114, LF121, LF301, LF333 h5py is not installed.
            RefusedError: LF110, LF334 a link or an array that lies elsewhere, or in pieces.
        """
        return open_indexed(path, _index)


CONTAINER: Final = Hdf5()


class _Reader(io.RawIOBase):
    """An input file as the library wants one."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size_bytes}[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self._file.size_bytes - self._place), 0)
        self._file.read_into(view[:count], self._place)
        self._place += count
        return count


def _index(file: InputFile) -> TensorFile:
    if not file.size_bytes:
        raise refuse("LF101", file.path, "an empty file", "a file of HDF5")
    head = file.read(0, min(HEAD_BYTES, file.size_bytes))
    if not CONTAINER.sniff(head, file.size_bytes):
        described = describe_head(head)
        found, mend = (described.what, described.mend) if described else ("a file of no known format", "")
        raise refuse("LF111" if described else "LF121", file.path, found, "a file of HDF5", mend)
    try:
        import h5py
    except ImportError as error:
        raise refuse("LF333", file.path, "no h5py", "it installed: pip install loraformat[keras]") from error
    try:
        with h5py.File(_Reader(file), "r") as opened:
            tensors = {tensor.name: tensor for tensor in _walk(h5py, file, opened, "", 0)}
    except LoraformatError:
        raise
    except Exception as error:  # The library has no class of its own for what is wrong with a file.
        raise refuse("LF109", file.path, f"what h5py cannot read: {error!s:.200}", "a sound file of HDF5") from error
    return TensorFile(file, tensors, {})


def _walk(h5py: Any, file: InputFile, group: Any, above: str, depth: int) -> Iterator[StoredTensor]:
    """Yield the arrays below a group; raises LF110 for groups without end, LF334 for links."""
    if depth > _MOST_DEEP or len(group) > MAX_TENSORS:
        raise refuse("LF110", file.path, "too many groups and arrays", f"at most {MAX_TENSORS}, {_MOST_DEEP} deep")
    for key in group:
        path = f"{above}/{key}" if above else str(key)
        check_name(file.path, path)
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise refuse("LF334", f"{file.path}, {path}", "a link to another place", "what it leads to, in this file")
        found = group[key]
        if isinstance(found, h5py.Group):
            yield from _walk(h5py, file, found, path, depth + 1)
        elif isinstance(found, h5py.Dataset):
            yield _place(file, path, found)


def _place(file: InputFile, name: str, array: Any) -> StoredTensor:
    """Return the tensor of an array, after comparing what is said of it with the file."""
    where = f"{file.path}, array {name!r}"
    form, shape = array.dtype.str, array.shape
    if form.startswith(">"):
        raise refuse("LF112", where, "numbers in big-endian order", "little")
    dtype = _DTYPES.get(form)
    if dtype is None or shape is None:
        raise refuse("LF106", where, f"dtype {form!r:.60}", f"one of {', '.join(_DTYPES)}")
    if dtype.bits == _BFLOAT16.bits and array.attrs.get("dtype") == "bfloat16":
        dtype = _BFLOAT16
    check_shape(where, shape, dtype, "LF114")
    length = dtype.count_bytes(math.prod(shape))
    if array.external or array.is_virtual or array.chunks or array.compression:
        raise refuse("LF334", where, "an array in pieces, or in another file", "one run of bytes", _REPACK)
    offset = array.id.get_offset() if length else 0
    if offset is None or offset < 0 or offset + length > file.size_bytes:
        found = "an array without a place in the file" if offset is None else f"{length} bytes at {offset}"
        raise refuse("LF114", where, found, f"a range inside the {file.size_bytes} bytes of the file", _REPACK)
    return StoredTensor(name, dtype, tuple(int(size) for size in shape), Span(file.path, offset, length), file)
