"""Merges into ONNX models in memory: a `ModelProto` or its bytes in, a `ModelProto` out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from loraformat.apply.accounting import check_untouched, draft_receipt, finish_receipt
from loraformat.arguments import (
    AdapterArguments,
    ModelOptions,
    StrPath,
    check_options,
    read_effort,
    read_hints,
    require_adapters,
    weigh_adapters,
)
from loraformat.arrays import Bytes, HeldFile
from loraformat.bases.onnx_graph import OnnxGraph
from loraformat.containers._onnx.external import read_external
from loraformat.containers._onnx.tensors import iterate_tensors
from loraformat.containers.onnx_file import open_onnx
from loraformat.engine import carry_out
from loraformat.engine.jobs import Assignment
from loraformat.engine.sinks import MemorySink
from loraformat.errors import LoraformatError, refuse
from loraformat.files import resolve_inside
from loraformat.images import FileImage
from loraformat.limits import MAX_PROTOBUF_BYTES, RETAINED_REFUSE, RETAINED_WARN
from loraformat.output_forms import Order, describe_output
from loraformat.planning import build_plan
from loraformat.planning.wishes import SettledWishes
from loraformat.receipt import Receipt

if TYPE_CHECKING:
    import onnx

IN_MEMORY: Final = "model in memory"
"""What it is called in messages, for it has no path."""
_EXTERNAL: Final = 1


@dataclass(frozen=True, slots=True)
class MergedModel:
    """An ONNX model with adapters merged into it.

    Attributes:
        model: the model, all of its numbers in it, and the receipt among its metadata.
        receipt: what was done.
    """

    model: "onnx.ModelProto"
    receipt: Receipt

    def __repr__(self) -> str:
        """Say what it is in one line."""
        return f"<MergedModel: {len(self.model.graph.node)} nodes; {self.receipt!r}>"


def merge_model(
    model: "onnx.ModelProto | Bytes", adapters: AdapterArguments, **options: Unpack[ModelOptions]
) -> MergedModel:
    """Merge adapters into an ONNX model in memory; what is handed over is not changed, and no file is written.

    The merged model is that which `merge` writes of the same model in a file, but that external data are in it.

    Args:
        model: the model, or the bytes of its file. At most 2 GiB, external data included, which is all that protobuf
            can hold; `merge` takes larger ones.
        adapters: as in `merge`.
        options: `arguments.ModelOptions` says what there is.

    Raises:
        LoraformatError: what `merge` raises; LF452 a model too large, or external data without `base_dir`.
    """
    check_options("merge_model", options, ModelOptions)
    base = _open(model, options.get("base_dir"))
    weighted = weigh_adapters(adapters, options, base)
    require_adapters(weighted, base)
    hints = read_hints(options)
    wishes = {name: value for name, value in options.items() if name in SettledWishes.__annotations__}
    plan = build_plan(base, weighted, base.path, hints=hints, **cast(SettledWishes, wishes))
    check_untouched(plan, base)
    order = Order(plan, weighted, hints.checkpoint)
    room_bytes = draft_receipt(plan, base).room_bytes
    images = describe_output(order, base, room_bytes, is_taken=lambda path: False)
    rooms = _reserve(images)
    sinks = [MemorySink([room]) for room in rooms.values()]
    assignment = Assignment(plan, base, order.adapters, images, sinks, checkpoint=order.checkpoint)
    (sums,) = carry_out([assignment], read_effort(options))
    least = options.get("min_retained", RETAINED_REFUSE), options.get("warn_retained", RETAINED_WARN)
    receipt = finish_receipt(plan, base, sums, *least, room_bytes=room_bytes)
    offset, text = images[-1].fill_blank(base.encode_receipt(receipt.embedded_text()))
    rooms[images[-1].path][offset : offset + len(text)] = np.frombuffer(text, np.uint8)
    return MergedModel(_put_together(images[-1].path, rooms), receipt)


def _open(model: "onnx.ModelProto | Bytes", base_dir: StrPath | None) -> OnnxGraph:
    data = model if isinstance(model, Bytes) else _serialise(model)
    folder = Path(base_dir).absolute() if base_dir is not None else Path()
    file = HeldFile(folder / IN_MEMORY, data)
    if base_dir is None and any(proto.data_location == _EXTERNAL for _, proto in open_onnx(file).tensors()):
        mend = "Say where the data files are: base_dir='...'."
        raise refuse("LF452", IN_MEMORY, "external data", "all numbers in the model, or base_dir", mend)
    return OnnxGraph(file)


def _serialise(model: "onnx.ModelProto") -> bytes:
    from google.protobuf.message import EncodeError  # type: ignore[import-untyped, unused-ignore]

    try:
        data: bytes = model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise _refuse_size(str(error)) from error
    return data


def _refuse_size(found: str) -> LoraformatError:
    return refuse("LF452", IN_MEMORY, found, f"at most {MAX_PROTOBUF_BYTES} bytes with external data")


def _reserve(images: Sequence[FileImage]) -> dict[Path, NDArray[np.uint8]]:
    """Return room for every file of the output by its path, the model's last."""
    whole = sum(image.size_bytes for image in images)
    if whole > MAX_PROTOBUF_BYTES:
        raise _refuse_size(f"{whole} bytes")
    return {image.path: np.empty(image.size_bytes, np.uint8) for image in images}


def _put_together(path: Path, rooms: Mapping[Path, NDArray[Any]]) -> "onnx.ModelProto":
    """Return the model, what its data files would hold put into it."""
    import onnx

    model: onnx.ModelProto = onnx.ModelProto.FromString(rooms[path].data)
    for where, proto in iterate_tensors(model):
        if proto.data_location != _EXTERNAL:
            continue
        stated = read_external(proto, where)
        assert stated.length is not None, "a copy says where each tensor ends"
        room = rooms[resolve_inside(path, stated.location)]
        proto.raw_data = room[stated.offset : stated.offset + stated.length].tobytes()
        proto.data_location = onnx.TensorProto.DEFAULT
        del proto.external_data[:]
    return model
