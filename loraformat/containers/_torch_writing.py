"""New torch checkpoints: the pickle of a dictionary of tensors, put together without torch.

Each tensor has a storage of its own. Source: `torch/serialization.py` and `torch/_utils.py` of torch 2.13.
"""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import BinaryIO, Final

from loraformat.containers._new_tensors import NewTensor, check_new, payload_bytes
from loraformat.containers._torch_names import WRAPPER_KEY, WRAPPERS
from loraformat.containers._zip_writing import new_archive
from loraformat.errors import refuse
from loraformat.strict_json import JsonValue

_ROOT: Final = "archive"
_ALIGNMENT: Final = 64
_STORAGES: Final = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
}
"""Forms that have a storage type of their own name; the others cannot be read by every torch of the last years."""


def write_torch_zip(sink: int | BinaryIO, tensors: Sequence[NewTensor], metadata: Mapping[str, JsonValue]) -> None:
    """Write a checkpoint at the sink's position, tensors in the order given.

    One tensor is held at a time. The same tensors and metadata give the same bytes.

    Args:
        sink: a descriptor or binary file, open for writing, seekable.
        tensors: what to write.
        metadata: nothing, or under `torch.wrapper` the key of an outer dictionary.

    Raises:
        InputError: LF105 a name given twice, LF130 other metadata, LF132 a number form that torch's format lacks,
            LF301 an unfit name.
        ValueError: an array that is not of the stated number form and shape.
    """
    check_new(tensors)
    body = _group_items((tensor[0], _tensor(key, tensor)) for key, tensor in enumerate(tensors))
    wrapper = _check_metadata(metadata)
    if wrapper:
        body = _group_items([(wrapper, body)])
    with new_archive(sink) as archive:
        archive.add(f"{_ROOT}/data.pkl", b"\x80\x02" + body + b".")
        archive.add(f"{_ROOT}/byteorder", b"little")
        for key, tensor in enumerate(tensors):
            archive.add(f"{_ROOT}/data/{key}", payload_bytes(tensor), alignment=_ALIGNMENT)
        archive.add(f"{_ROOT}/version", b"3\n")


def _check_metadata(metadata: Mapping[str, JsonValue]) -> str:
    """Return the wrapper's key, empty without one."""
    strange = sorted(set(metadata) - {WRAPPER_KEY})
    if strange:
        raise refuse("LF130", "new file", f"the key {strange[0]!r}", f"no other than {WRAPPER_KEY!r}")
    wrapper = metadata.get(WRAPPER_KEY, "")
    if wrapper not in ("", *WRAPPERS) or not isinstance(wrapper, str):
        raise refuse("LF130", f"new file, {WRAPPER_KEY}", f"{wrapper!r:.80}", f"one of {', '.join(WRAPPERS)}")
    return wrapper


def _tensor(key: int, tensor: NewTensor) -> bytes:
    name, dtype, shape, _ = tensor
    if dtype.name not in _STORAGES:
        raise refuse("LF132", f"tensor {name!r}", dtype.name, f"one of {', '.join(_STORAGES)}")
    kind = b"ctorch\n%bStorage\n" % _STORAGES[dtype.name].encode()
    held = b"(" + _text("storage") + kind + _text(str(key)) + _text("cpu") + _number(math.prod(shape)) + b"tQ"
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    rest = _number(0) + _numbers(shape) + _numbers(strides) + b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + held + rest + b"tR"


def _group_items(items: Iterable[tuple[str, bytes]]) -> bytes:
    return b"}(" + b"".join(_text(key) + value for key, value in items) + b"u"


def _numbers(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def _number(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return b"X" + struct.pack("<I", len(raw)) + raw
