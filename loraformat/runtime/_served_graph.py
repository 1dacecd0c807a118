"""The graph of an ONNX base as onnxruntime takes it from memory: its weights stay in the base's files.

onnxruntime maps external data into memory, so every large initializer is made external here: one of the model's own
file as well, whose bytes lie in that file as they would in a data file.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from numpy.typing import NDArray

from loraformat.containers._onnx.tensors import iterate_tensors
from loraformat.containers.onnx_file import GraphChange, OnnxFile, TensorCopy, TensorFloats
from loraformat.engine.held_weights import Place
from loraformat.errors import refuse
from loraformat.limits import KEEP_INLINE_BYTES, MAX_PROTOBUF_BYTES
from loraformat.runtime._graph_edits import edit_graph
from loraformat.spans import Span, StoredTensor

if TYPE_CHECKING:
    import onnx

_NO_CHANGE: Final = GraphChange()
_PAYLOADS: Final = ("raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


@dataclass(frozen=True, slots=True)
class TensorForm:
    """A tensor whose numbers are handed over apart from the graph.

    Attributes:
        place: whose numbers they are.
        data_type: number form, as ONNX numbers them.
        shape: dimensions.
    """

    place: Place
    data_type: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Filled:
    """A graph with new numbers.

    Attributes:
        model: its bytes, with the numbers that are part of them.
        replaced: the forms of the others, by the names of the initializers that they replace.
    """

    model: bytes
    replaced: Mapping[str, TensorForm]


class ServedGraph:
    """The graph of a base, ready to be filled with new numbers.

    Args:
        opened: the base; its data files are open.

    Attributes:
        folder: the folder that the locations in the graph start from: of the files themselves, links followed, since
            onnxruntime takes no link that leads out of it.
    """

    def __init__(self, opened: OnnxFile) -> None:
        import onnx

        real = {file.path: Path(os.path.realpath(file.path)) for file in opened.files}
        self.folder = Path(os.path.commonpath([path.parent for path in real.values()]))
        self._locations = {path: path_there.relative_to(self.folder).as_posix() for path, path_there in real.items()}
        self._opened = opened
        self._model = onnx.ModelProto()
        self._model.CopyFrom(opened.model)
        self._bytes: bytes | None = None
        self._inside: dict[Span, list[int]] = defaultdict(list)
        self._outside: dict[Span, dict[str, TensorForm]] = defaultdict(dict)
        self._restore_lost()
        self._hoisted = set(_list_constants(self._model.graph))
        self._place_tensors()

    def fill(
        self, merged: Mapping[Place, NDArray[Any]], copies: Sequence[TensorCopy] = (), change: GraphChange = _NO_CHANGE
    ) -> Filled:
        """Return the graph with new numbers; LF812 for one that is too large.

        Args:
            merged: bytes of whole tensors: of those of the base, and of the new ones.
            copies: tensors that some nodes read instead of another one.
            change: what else changes in the graph.
        """
        places = [place for place in merged if isinstance(place, Span)]
        inside = {index: place for place in places for index in self._inside.get(place, ())}
        replaced = {name: form for place in places for name, form in self._outside.get(place, {}).items()}
        new: list[TensorCopy | TensorFloats] = [*copies, *change.floats]
        added = {each.name: TensorForm(each.name, each.data_type, each.shape) for each in new}
        if not inside and not added:
            self._bytes = self._bytes or self._serialise(self._finish(self._model, {}))
            return Filled(self._bytes, replaced)
        model = type(self._model)()
        model.CopyFrom(self._model)
        for index, (_, proto) in enumerate(iterate_tensors(model)):
            if index in inside:
                _put_inside(proto, merged[inside[index]].tobytes())
        edit_graph(model.graph, copies, change)
        return Filled(self._serialise(self._finish(model, added)), replaced | added)

    def _finish(self, model: "onnx.ModelProto", added: Mapping[str, TensorForm]) -> "onnx.ModelProto":
        """Return the model with large Constant nodes as initializers, which onnxruntime makes of all, and new ones."""
        finished = type(model)()
        finished.CopyFrom(model)
        graph = finished.graph
        for index in reversed(range(len(graph.node) if self._hoisted else 0)):
            node = graph.node[index]
            if node.op_type == "Constant" and node.output[0] in self._hoisted:
                tensor = graph.initializer.add()
                tensor.CopyFrom(node.attribute[0].t)
                tensor.name = node.output[0]
                del graph.node[index]
        for name, form in added.items():
            tensor = graph.initializer.add(name=name, data_type=form.data_type, dims=form.shape)
            tensor.data_location = type(tensor).EXTERNAL
            tensor.external_data.add(key="location", value=self._locations[self._opened.path])
        return finished

    def _serialise(self, model: "onnx.ModelProto") -> bytes:
        size = model.ByteSize()
        if size > MAX_PROTOBUF_BYTES:
            found = f"{size} bytes of weights in Constant nodes, functions and subgraphs"
            raise refuse("LF812", self._opened.path, found, f"at most {MAX_PROTOBUF_BYTES}")
        data: bytes = model.SerializeToString()
        return data

    def _restore_lost(self) -> None:
        """Take tensors whose numbers are no run of bytes, and not in the skeleton, from the model itself."""
        import onnx

        if not any(_is_lost(proto) for _, proto in iterate_tensors(self._model)):
            return
        whole = onnx.load_model(str(self._opened.path), load_external_data=False)
        pairs = zip(iterate_tensors(self._model), iterate_tensors(whole), strict=True)
        for (_, proto), (_, source) in pairs:
            if _is_lost(proto):
                proto.CopyFrom(source)

    def _place_tensors(self) -> None:
        """Say of each tensor where its numbers are: in the graph, or in which file."""
        main = self._list_main()
        names = {id(proto): name for name, proto in main}  # Which lasts as long as `main` holds them.
        for index, (_, proto) in enumerate(iterate_tensors(self._model)):
            name = names.get(id(proto), "")
            tensor = self._opened.stored_tensor(proto)
            if not isinstance(tensor, StoredTensor):
                continue
            is_external = proto.data_location == type(proto).EXTERNAL
            is_outside = bool(name) and (is_external or tensor.span.length > KEEP_INLINE_BYTES)
            if is_outside or is_external:
                self._point_outside(proto, tensor)
            elif proto.HasField("segment"):
                _put_inside(proto, tensor.file.read(tensor.span.offset, tensor.span.length))
            if is_outside:
                self._outside[tensor.span][name] = TensorForm(tensor.span, proto.data_type, tensor.shape)
            else:
                self._inside[tensor.span].append(index)

    def _list_main(self) -> "list[tuple[str, onnx.TensorProto]]":
        """Return the tensors that are initializers of the main graph, or will be, by their names there."""
        graph = self._model.graph
        constants = (node for node in graph.node if node.op_type == "Constant" and node.output[0] in self._hoisted)
        hoisted = [(node.output[0], node.attribute[0].t) for node in constants]
        return [*((tensor.name, tensor) for tensor in graph.initializer), *hoisted]

    def _point_outside(self, proto: "onnx.TensorProto", tensor: StoredTensor) -> None:
        _clear(proto)
        proto.data_location = type(proto).EXTERNAL
        for key, value in self._list_entries(tensor):
            proto.external_data.add(key=key, value=value)

    def _list_entries(self, tensor: StoredTensor) -> Iterator[tuple[str, str]]:
        yield "location", self._locations[tensor.span.path]
        yield "offset", str(tensor.span.offset)
        yield "length", str(tensor.span.length)


def _list_constants(graph: "onnx.GraphProto") -> Iterator[str]:
    """Yield what large Constant nodes make that is not a result of the graph."""
    results = {entry.name for entry in graph.output}
    return (node.output[0] for node in graph.node if _is_large_constant(node) and node.output[0] not in results)


def _is_large_constant(node: "onnx.NodeProto") -> bool:
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or len(node.attribute) != 1:
        return False
    segment = node.attribute[0].t.segment
    return bool(segment.end - segment.begin > KEEP_INLINE_BYTES)


def _is_lost(proto: "onnx.TensorProto") -> bool:
    """Say whether a tensor's numbers were cut out of the skeleton and nothing says where they are."""
    here = proto.data_location == type(proto).EXTERNAL or proto.HasField("segment") or 0 in proto.dims
    return not here and not any(getattr(proto, name) for name in _PAYLOADS)


def _put_inside(proto: "onnx.TensorProto", data: bytes) -> None:
    _clear(proto)
    proto.raw_data = data


def _clear(proto: "onnx.TensorProto") -> None:
    for name in (*_PAYLOADS, "segment", "external_data", "data_location"):
        proto.ClearField(name)
