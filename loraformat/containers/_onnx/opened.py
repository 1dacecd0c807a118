"""An opened ONNX model: its structure, where its numbers are, and the files that a copy of it would have."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from loraformat.containers._onnx.copies import TensorCopy
from loraformat.containers._onnx.external import read_external
from loraformat.containers._onnx.floats import GraphChange
from loraformat.containers._onnx.images import ModelParts, Wanted, describe_copy, describe_extended, describe_sharing
from loraformat.containers._onnx.skeleton import build_skeleton
from loraformat.containers._onnx.tensors import SharedBytes, iterate_tensors
from loraformat.containers._onnx.walk import walk_model
from loraformat.containers._protobuf import Leaf
from loraformat.dtypes import BY_NAME, BY_ONNX, Dtype
from loraformat.errors import LoraformatError, refuse
from loraformat.files import resolve_inside
from loraformat.images import FileImage, NewOutput
from loraformat.limits import MAX_DIMS
from loraformat.problems import Problem
from loraformat.receipt import RECEIPT_KEY
from loraformat.spans import HeldTensor, InputFile, Span, StoredTensor, open_input
from loraformat.strict_json import JsonValue, parse_json_object

if TYPE_CHECKING:
    import onnx

_NO_CHANGE: Final = GraphChange()
_EXTERNAL: Final = 1
_LFS: Final = b"version https://git-lfs"
_TYPED_FIELDS: Final = {7: "int64_data", 8: "string_data", 12: "uint64_data", 13: "uint64_data"}
_FLOAT_FIELDS: Final = {1: "float_data", 14: "float_data", 11: "double_data", 15: "double_data"}

_REWRITE: Final = (
    "Write its numbers as raw_data first: m = onnx.load(P); [t.CopyFrom(numpy_helper.from_array("
    "numpy_helper.to_array(t), t.name)) for t in m.graph.initializer]; onnx.save(m, P2), with onnx.numpy_helper. "
    "The numbers stay what they are."
)


class OnnxFile:
    """An opened ONNX model.

    Attributes:
        path: the model's file, absolute, symlinks kept.
        file: the same, open.
        model: the skeleton: the model without large payloads. A tensor whose numbers are one run of bytes of this file
            has a `segment` (begin and end); because of it onnx.numpy_helper refuses the tensor: use `stored_tensor`.
        structure_sha256: digest of the skeleton's bytes without our own receipt.
        receipt: what an earlier merge left in the model, or None.
        problems: warnings and notes met so far.

    Raises:
        InputError: LF100 no such file, LF111 a git-LFS pointer, LF118 not a well-formed model.
        RefusedError: LF903 a tensor with two locations, LF110 beyond a limit, LF905 not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str] | InputFile) -> None:
        self.file = open_input(path)
        self.path = self.file.path
        self.problems: list[Problem] = []
        self._data: dict[Path, InputFile] = {}
        self._places: dict[str, InputFile] = {}
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        if self.file.read(0, min(len(_LFS), self.file.size_bytes)) == _LFS:
            raise refuse("LF111", self.path, "a git-LFS pointer, not the model itself", "an ONNX model", "git lfs pull")
        walk = walk_model(self.file)
        assert walk.graph is not None, "`walk_model` sees to it"
        self._graph, self._externals = walk.graph, walk.externals
        self._inlines = walk.inlines if self._stays(self.path) else []
        self._receipts = [frame.field for frame in walk.receipts]
        self.model, self.structure_sha256 = build_skeleton(self.file, walk.cuts, self._receipts)
        self.receipt = self._read_receipt()

    def close(self) -> None:
        """Close all files; without it they are closed when nobody refers to them any more."""
        for file in self.files:
            file.close()

    @property
    def files(self) -> list[InputFile]:
        """The files opened so far: the model's own, then its data files."""
        return [self.file, *self._data.values()]

    def tensors(self) -> "Iterator[tuple[str, onnx.TensorProto]]":
        """Yield every tensor of the model, wherever it stands, with a text that says where."""
        return iterate_tensors(self.model)

    def stored_tensor(self, proto: "onnx.TensorProto") -> StoredTensor | Problem:
        """Return where a tensor's numbers are, checked against its shape and the file.

        Args:
            proto: a tensor of `model`.

        Returns:
            The tensor unread; or the problem when it is sound, but not a run of bytes in a form that we know (LF403,
            LF106).

        Raises:
            InputError: LF116 the tensor contradicts itself or its file, LF100 its data file is missing.
            RefusedError: LF903 its data file lies elsewhere, LF905 is not a regular file.
        """
        where = f"{self.path}: tensor {proto.name!r}"
        dtype = BY_ONNX.get(proto.data_type)
        if dtype is None or dtype.family == "string":
            found = f"data type {proto.data_type}" if dtype is None else "strings"
            return Problem("LF106", where, found, "numbers of a known form")
        shape = tuple(proto.dims)
        if len(shape) > MAX_DIMS or any(size < 0 for size in shape):
            raise refuse(
                "LF116", where, f"shape {list(shape[: MAX_DIMS + 1])}", f"at most {MAX_DIMS} sizes, none negative"
            )
        needed = dtype.count_bytes(math.prod(shape))
        if proto.data_location != _EXTERNAL:
            return self._inline(proto, dtype, shape, needed, where)
        if proto.HasField("segment"):
            return Problem("LF403", where, "numbers both in the model and in a data file", "one of the two")
        file, span = self._external(proto, needed, where)
        return StoredTensor(proto.name, dtype, shape, span, file)

    def held_tensor(self, proto: "onnx.TensorProto") -> HeldTensor | None:
        """Return a tensor whose numbers stand in the graph one by one, such as zero points; None for any other."""
        from onnx import numpy_helper

        dtype = BY_ONNX.get(proto.data_type)
        typed = proto.data_location != _EXTERNAL and not proto.HasField("segment") and proto.int32_data
        if dtype is None or not typed:
            return None
        per = max(8 // dtype.bits, 1)  # Several lie in one of the numbers, as in a byte.
        if len(proto.int32_data) != -(-math.prod(proto.dims) // per):
            where = f"{self.path}: tensor {proto.name!r}"
            raise refuse("LF116", where, f"{len(proto.int32_data)} numbers", f"those of {list(proto.dims)[:MAX_DIMS]}")
        if per > 1:
            return HeldTensor(proto.name, BY_NAME["uint8"], np.array(proto.int32_data).astype(np.uint8))
        return HeldTensor(proto.name, dtype, numpy_helper.to_array(proto))

    def _inline(
        self, proto: "onnx.TensorProto", dtype: Dtype, shape: tuple[int, ...], needed: int, where: str
    ) -> StoredTensor | Problem:
        if not proto.HasField("segment"):
            form = _FLOAT_FIELDS.get(proto.data_type, _TYPED_FIELDS.get(proto.data_type, "int32_data"))
            return Problem(
                "LF403", where, f"stored as {form}, or in several runs", "raw_data or external data", _REWRITE
            )
        span = Span(self.path, proto.segment.begin, proto.segment.end - proto.segment.begin)
        if span.length != needed or not 0 <= span.offset <= span.end <= self.file.size_bytes:
            raise refuse("LF116", where, f"{span.length} bytes", f"{needed} bytes of {dtype.name} {list(shape)}")
        return StoredTensor(proto.name, dtype, shape, span, self.file)

    def _external(self, proto: "onnx.TensorProto", needed: int, where: str) -> tuple[InputFile, Span]:
        data = read_external(proto, where)
        if data.length not in (None, needed):
            raise refuse("LF116", where, f"{data.length} bytes of external data", f"{needed} bytes for its shape")
        file = self._open_data(data.location)
        if data.offset + needed > file.size_bytes:
            found = f"bytes {data.offset} to {data.offset + needed} of {data.location}"
            raise refuse("LF116", where, found, f"at most {file.size_bytes}, where the file ends")
        return file, Span(file.path, data.offset, needed)

    def _open_data(self, location: str) -> InputFile:
        """Return the open data file, opening it once however many tensors name it, and in however many ways."""
        if location not in self._places:
            path = resolve_inside(self.path, location)
            if path not in self._data:
                self._data[path] = self._first_open(path, location)
            self._places[location] = self._data[path]
        return self._places[location]

    def _first_open(self, path: Path, location: str) -> InputFile:
        if not os.path.lexists(path):
            mend = f"It was looked for at {path}. Fetch the data files together with the model."
            raise refuse("LF100", self.path, f"no data file {location!r}", "the file beside the model", mend)
        file = InputFile(path)
        if file.identity == self.file.identity:
            raise refuse("LF116", self.path, f"external data in {location!r}, the model itself", "a file of its own")
        links = os.fstat(file.descriptor).st_nlink
        if links > 1:
            self.problems.append(Problem("LF904", str(path), f"{links} hard links", "one", severity="warning"))
        return file

    @cached_property
    def _shared(self) -> SharedBytes:
        stored = ((scope, proto, self.stored_tensor(proto)) for scope, proto in self.tensors())
        return SharedBytes((proto.name or scope, it) for scope, proto, it in stored if isinstance(it, StoredTensor))

    def overlaps(self, tensor: StoredTensor) -> list[str]:
        """Return the names of the other tensors that share bytes with `tensor`; raises as `stored_tensor` does."""
        return self._shared.find(tensor)

    def _read_receipt(self) -> Mapping[str, JsonValue] | None:
        values = [entry.value for entry in self.model.metadata_props if entry.key == RECEIPT_KEY]
        if not values:
            return None
        try:
            return parse_json_object(values[-1].encode(), self.path)
        except LoraformatError as error:
            found = f"a receipt that cannot be read: {error.problems[0].found}"
            self.problems.append(Problem("LF104", str(self.path), found, severity="note"))
            return None

    def images(
        self, output: NewOutput, copies: Sequence[TensorCopy] = (), change: GraphChange = _NO_CHANGE
    ) -> list[FileImage]:
        """Return the files of a copy of the model: data files first, the model last.

        The copy differs in its receipt, which is the last entry of the file, in the names of its data files, and in
        what `copies` add.

        Args:
            output: the copy.
            copies: tensors of their own for some readers of others.
            change: what else changes in the graph.
        """
        return describe_copy(self.parts(), Wanted(output, copies, change))

    def extended_images(self, output: NewOutput, edits: Sequence[Leaf], *, share: bool) -> list[FileImage]:
        """Return the files of a model with more in its graph, without a receipt: data files first, the model last.

        Args:
            output: the model; in the folder of this one if it shares the data files.
            edits: what is new in the model's file.
            share: whether it refers to the data files of this one rather than to copies.
        """
        return describe_extended(self.parts(), Wanted(output), edits, share=share)

    def sharing_images(
        self,
        output: NewOutput,
        touched: Sequence[Span],
        copies: Sequence[TensorCopy] = (),
        change: GraphChange = _NO_CHANGE,
    ) -> list[FileImage]:
        """Return the files of a model that shares the data files of this one: a data file of its own, the model last.

        Args:
            output: the model, in the folder of this one.
            touched: the bytes that differ, those of whole tensors.
            copies: as in `images`.
            change: as in `images`.
        """
        return describe_sharing(self.parts(), Wanted(output, copies, change), touched)

    def parts(self) -> ModelParts:
        """Return what outputs are made of."""
        return ModelParts(self.file, self._graph, self._externals, self._inlines, self._receipts, self.data_files())

    def data_files(self) -> Mapping[str, InputFile]:
        """Return the open data files by their locations."""
        return {site.location: self._open_data(site.location) for site in self._externals}

    def shared_files(self) -> Mapping[str, InputFile]:
        """Return the files that a model beside this one may refer to, by their paths from its folder.

        There are none where some are symbolic links that leave the folder, as in a cache of the hub: onnxruntime
        follows those of a model that is such a link itself, not those of a new one beside it.
        """
        data = self.data_files()
        if not all(self._stays(file.path) for file in data.values()):
            return {}
        return {**data, **({self.path.name: self.file} if self._inlines else {})}

    def _stays(self, path: Path) -> bool:
        """Say whether a file in the model's folder is there in truth."""
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.path.parent))

    @staticmethod
    def stale_data(output: Path) -> list[Path]:
        """Return the data files of a model about to be replaced that are its own by name; none when unreadable."""
        # A model may have its numbers in another one's file, which is nobody's but that one's.
        own = (path for path in list_data(output) if path.name.startswith(output.stem) and path.suffix != output.suffix)
        return sorted(path for path in own if path.is_file())


def list_data(path: Path) -> set[Path]:
    """Return the data files that a model names; none for one that cannot be read."""
    try:
        file = InputFile(path)
        try:
            return {resolve_inside(path, site.location) for site in walk_model(file).externals}
        finally:
            file.close()
    except LoraformatError:
        return set()


def open_onnx(path: str | os.PathLike[str] | InputFile) -> OnnxFile:
    """Open an ONNX model; raises as `OnnxFile` does."""
    return OnnxFile(path)
