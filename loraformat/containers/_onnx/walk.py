"""A walk over the wire format of an ONNX model, which finds its tensors wherever they are.

Only what could be read in two ways is refused here; whether the graph makes sense is not this module's business.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from loraformat.containers._onnx.skeleton import PAYLOAD_FIELDS, RAW_DATA, SEGMENT, Payload
from loraformat.containers._protobuf import (
    LENGTH,
    VARINT,
    Field,
    Frame,
    Leaf,
    Reader,
)
from loraformat.errors import refuse
from loraformat.limits import MAX_NAME_BYTES, MAX_PROTO_DEPTH, MAX_TENSORS
from loraformat.receipt import RECEIPT_KEY
from loraformat.spans import InputFile


@dataclass(frozen=True, slots=True)
class _Message:
    """What to look at in one kind of message.

    Attributes:
        inside: field number to the name of the message that it holds.
        once: fields of which a second one would make it ambiguous which counts.
        text: strings that others will read.
    """

    inside: Mapping[int, str] = field(default_factory=dict)
    once: frozenset[int] = frozenset()
    text: frozenset[int] = frozenset()


_MESSAGES: Final = {
    "Model": _Message(
        {7: "Graph", 8: "OperatorSet", 14: "ModelEntry", 20: "Training", 25: "Function"},
        frozenset({7}),
        frozenset({2, 3, 4}),
    ),
    "Graph": _Message(
        {1: "Node", 5: "Tensor", 11: "ValueInfo", 12: "ValueInfo", 13: "ValueInfo", 15: "SparseTensor", 16: "Entry"},
        frozenset({2}),
        frozenset({2}),
    ),
    "Node": _Message({5: "Attribute", 9: "Entry"}, frozenset({3, 4, 7, 8}), frozenset({1, 2, 3, 4, 7, 8})),
    "Attribute": _Message(
        {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"}
        | {14: "Type", 15: "Type"},
        frozenset({1, 2, 3, 4, 5, 6, 20, 21, 22}),
        frozenset({1, 21}),
    ),
    "SparseTensor": _Message({1: "Tensor", 2: "Tensor"}, frozenset({1, 2})),
    "Training": _Message({1: "Graph", 2: "Graph"}, frozenset({1, 2})),
    "Function": _Message(
        {7: "Node", 9: "OperatorSet", 11: "Attribute", 12: "ValueInfo", 14: "Entry"},
        frozenset({1, 10, 13}),
        frozenset({1, 4, 5, 6, 10, 13}),
    ),
    "OperatorSet": _Message(text=frozenset({1})),
    "ValueInfo": _Message({2: "Type", 4: "Entry"}, text=frozenset({1})),
    "Type": _Message(
        {1: "TensorType", 4: "Type", 5: "MapType", 7: "Entry", 8: "TensorType", 9: "Type"}, text=frozenset({6})
    ),
    "TensorType": _Message({2: "Shape"}),
    "MapType": _Message({2: "Type"}),
    "Shape": _Message({1: "Dimension"}),
    "Dimension": _Message(text=frozenset({2, 3})),
    "Entry": _Message(text=frozenset({1, 2})),
}
"""By name; the numbers are those of onnx.proto. Strings that nothing here reads (doc_string) are not checked."""


_TEXT_ONLY: Final = frozenset({"ValueInfo", "Entry", "Dimension"})
_GRAPH: Final = 7
_DATA_TYPE: Final = 2
_NAME: Final = 8
_EXTERNAL_DATA: Final = 13
_DATA_LOCATION: Final = 14
_TENSOR_ENTRIES: Final = frozenset({_EXTERNAL_DATA, 16})
_TENSOR_ONCE: Final = frozenset({_DATA_TYPE, _NAME, RAW_DATA, _DATA_LOCATION})
_IS_EXTERNAL: Final = 1
_INT32: Final = 0xFFFFFFFF
"""protobuf cuts a longer number down to these bits."""
_MAX_KEY_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class ExternalSite:
    """The place in the model's file that names an external data file.

    Attributes:
        location: what stands there.
        value: the string itself.
        entries: the key-value pairs of the same tensor, by key.
    """

    location: str
    value: Frame
    entries: Mapping[str, Frame]


@dataclass(frozen=True, slots=True)
class InlineSite:
    """A large initializer whose numbers stand in the model's file in one run.

    Attributes:
        tensor: the tensor.
        numbers: the field that holds them.
    """

    tensor: Frame
    numbers: Field


@dataclass(slots=True)
class Walk:
    """What a walk over a model's file found.

    Attributes:
        file: the model's file.
        graph: the main graph.
        externals: the tensors with external data, in the order of the file.
        inlines: large initializers with their numbers in the file.
        receipts: our own entries of metadata_props.
        cuts: what the skeleton lacks, and the segments that it has more.
        tensors: the number of tensors.
    """

    file: InputFile
    graph: Frame | None = None
    externals: list[ExternalSite] = field(default_factory=list)
    inlines: list[InlineSite] = field(default_factory=list)
    receipts: list[Frame] = field(default_factory=list)
    cuts: list[Leaf] = field(default_factory=list)
    tensors: int = 0


def walk_model(file: InputFile) -> Walk:
    """Walk over the whole model; raises LF118 where it is not well formed or could be read in two ways."""
    walker = _Walker(file)
    walker.run()
    if walker.found.graph is None:
        raise refuse("LF118", file.path, "no graph", "an ONNX model")
    return walker.found


@dataclass(slots=True)
class _Level:
    """A message whose fields are being read."""

    message: _Message
    frame: Frame | None
    fields: Iterator[Field]
    seen: set[int] = field(default_factory=set)


class _Walker:
    """The walk itself: depth first, with a stack of its own, because nesting is the file's choice."""

    def __init__(self, file: InputFile) -> None:
        self.reader = Reader(file)
        self.found = Walk(file)
        self._stack: list[_Level] = []
        self._leaves = {"Tensor": self._note_tensor, "ModelEntry": self._note_entry}

    def run(self) -> None:
        """Walk from the top level to the end of the file."""
        top = self.reader.fields(0, self.found.file.size_bytes)
        self._stack.append(_Level(_MESSAGES["Model"], None, top))
        while self._stack:
            if not self._descend(self._stack[-1]):
                self._stack.pop()

    def _descend(self, level: _Level) -> bool:
        """Read on in `level` until a message opens in it; False at its end."""
        inside, once, text = level.message.inside, level.message.once, level.message.text
        for item in level.fields:
            number = item.number
            if number in once:
                self._check_once(level.seen, item)
            if item.wire != LENGTH:
                continue
            if number in text:
                self.reader.check_text(item)
            elif number in inside:
                name = inside[number]
                if name in _TEXT_ONLY and self.reader.is_ascii(item):
                    continue
                frame = Frame(item) if level.frame is None else level.frame.enter(item)
                if name not in self._leaves:
                    self._push(name, frame)
                    return True
                self._leaves[name](frame)
        return False

    def _push(self, name: str, frame: Frame) -> None:
        if len(self._stack) >= MAX_PROTO_DEPTH:
            raise self.reader.refuse(frame.field.start, f"messages nested deeper than {MAX_PROTO_DEPTH}")
        if frame.parent is None and frame.field.number == _GRAPH:
            self.found.graph = frame
        fields = self.reader.fields(frame.field.begin, frame.field.end)
        self._stack.append(_Level(_MESSAGES[name], frame, fields))

    def _check_once(self, seen: set[int], item: Field) -> None:
        if item.number in seen:
            raise self.reader.refuse(item.start, f"a second field {item.number}, of which a message has one")
        seen.add(item.number)

    def _note_entry(self, frame: Frame) -> str:
        """Check a key-value pair of the model and note it when it is our receipt."""
        key = self._read_entry(frame)[0]
        if key == RECEIPT_KEY:
            self.found.receipts.append(frame)
        return key

    def _read_entry(self, frame: Frame) -> tuple[str, Field | None]:
        """Return the key of a key-value pair (empty when longer than any that we know) and where its value is."""
        key, value = "", None
        seen: set[int] = set()
        for item in self.reader.fields(frame.field.begin, frame.field.end):
            if item.wire != LENGTH or item.number not in (1, 2):
                continue
            self._check_once(seen, item)
            self.reader.check_text(item)
            if item.number == 2:
                value = item
            elif item.end - item.begin <= _MAX_KEY_BYTES:
                key = self.reader.read(item).decode()
        return key, value

    def _note_tensor(self, frame: Frame) -> None:
        """Read a tensor's fields, cut its payload out of the skeleton and note its external data."""
        self.found.tensors += 1
        if self.found.tensors > MAX_TENSORS:
            raise refuse("LF110", self.found.file.path, f"more than {MAX_TENSORS} tensors")
        payload, entries = Payload(), []
        seen: set[int] = set()
        kind = place = 0
        for item in self.reader.fields(frame.field.begin, frame.field.end):
            number = item.number
            if number in _TENSOR_ONCE:
                self._check_once(seen, item)
            if number in PAYLOAD_FIELDS:
                payload.add(item)
            elif number == SEGMENT:
                raise self.reader.refuse(item.start, "a tensor with a segment, which no reader supports")
            elif number == _DATA_TYPE and item.wire == VARINT:
                kind = self.reader.varint(item) & _INT32
            elif number == _DATA_LOCATION and item.wire == VARINT:
                place = self.reader.varint(item) & _INT32
            elif number in _TENSOR_ENTRIES and item.wire == LENGTH:
                entries.append(frame.enter(item))
            elif number == _NAME:
                self.reader.check_text(item)
        self.found.cuts.extend(payload.cuts(frame, kind))
        self._note_inline(frame, payload.find_run(kind), stated=_DATA_LOCATION in seen)
        self._note_external(frame, entries, place)

    def _note_inline(self, frame: Frame, numbers: Field | None, *, stated: bool) -> None:
        """Note an initializer whose numbers are a large run in the file, unless it states that they are there."""
        if numbers is not None and not stated and self._stack[-1].message is _MESSAGES["Graph"]:
            self.found.inlines.append(InlineSite(frame, numbers))

    def _note_external(self, frame: Frame, entries: list[Frame], place: int) -> None:
        """Note where the data file of an external tensor is named; for others only check the text."""
        by_key: dict[str, Frame] = {}
        location: Frame | None = None
        for entry in entries:
            key, value = self._read_entry(entry)
            if entry.field.number != _EXTERNAL_DATA or place != _IS_EXTERNAL:
                continue
            if key == "location" and key in by_key:
                found = f"the tensor at byte {frame.field.start} names two data files"
                raise refuse("LF903", self.found.file.path, found, "one location")
            by_key[key] = entry
            if key == "location" and value is not None:
                location = entry.enter(value)
        if location is not None:
            size = location.field.end - location.field.begin
            if size > MAX_NAME_BYTES:
                raise refuse("LF110", self.found.file.path, f"a location of {size} bytes", f"at most {MAX_NAME_BYTES}")
            text = self.reader.read(location.field).decode()
            self.found.externals.append(ExternalSite(text, location, by_key))
