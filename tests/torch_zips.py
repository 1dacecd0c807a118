"""torch checkpoints put together opcode by opcode and field by field, without torch, so that every field can lie."""

import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraformat.containers.torch_zip import CONTAINER

# --- an assembler of pickles -----------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def named(name: str) -> bytes:
    module, _, short = name.rpartition(".")
    return f"c{module}\n{short}\n".encode()


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(name: str, *arguments: bytes) -> bytes:
    return named(name) + group(*arguments) + b"R"


def pairs(items: Iterable[tuple[str | bytes, bytes]]) -> bytes:
    written = b"".join((text(key) if isinstance(key, str) else key) + value for key, value in items)
    return b"}(" + written + b"u"


def finish(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


NO_HOOKS = call("collections.OrderedDict")


def storage(kind: str = "Float", key: str = "0", elements: int = 6) -> bytes:
    return group(text("storage"), named(f"torch.{kind}Storage"), text(key), text("cpu"), number(elements)) + b"Q"


def tensor(
    held: bytes | None = None, offset: int = 0, shape: Iterable[int] = (2, 3), strides: Iterable[int] | None = None
) -> bytes:
    shape = tuple(shape)
    if strides is None:
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    sizes, steps = (group(*map(number, values)) for values in (shape, strides))
    return call(
        "torch._utils._rebuild_tensor_v2",
        storage() if held is None else held,
        number(offset),
        sizes,
        steps,
        b"\x89",
        NO_HOOKS,
    )


# --- an assembler of archives ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A member, with every field of its two headers open to lies."""

    name: str
    data: bytes
    flags: int = 0x808
    method: int = 0
    crc: int | None = None
    local: tuple[int, int, int] | None = (0, 0, 0)
    central: tuple[int, int] | None = None
    local_name: str | None = None
    local_extra: bytes = b""
    central_extra: bytes = b""
    at: int | None = None
    descriptor: bytes | None = None
    streamed: bool = True


def build(parts: Iterable[Part], end: Callable[[int, int, int], bytes] | None = None, before: bytes = b"") -> bytes:
    out, directory, count = bytearray(before), bytearray(), 0
    for part in parts:
        count += 1
        start = len(out)
        crc = zlib.crc32(part.data) if part.crc is None else part.crc
        flags = part.flags if part.streamed else part.flags & ~8
        numbers = (crc, len(part.data), len(part.data)) if part.local is None or not part.streamed else part.local
        local_name = (part.name if part.local_name is None else part.local_name).encode()
        out += struct.pack(
            "<4s5H3L2H", b"PK\x03\x04", 0, flags, part.method, 0, 0, *numbers, len(local_name), len(part.local_extra)
        )
        out += local_name + part.local_extra + part.data
        if part.streamed:
            out += (
                struct.pack("<4s3L", b"PK\x07\x08", crc, len(part.data), len(part.data))
                if (part.descriptor is None)
                else part.descriptor
            )
        packed, size = part.central or (len(part.data), len(part.data))
        name = part.name.encode()
        directory += struct.pack(
            "<4s6H3L5H2L",
            *(b"PK\x01\x02", 0, 0, flags, part.method, 0, 0, crc, packed, size),
            *(len(name), len(part.central_extra), 0, 0, 0, 0, start if part.at is None else part.at),
        )
        directory += name + part.central_extra
    tail = plain_end if end is None else end
    return bytes(out + directory) + tail(count, len(directory), len(out))


def plain_end(count: int, size: int, start: int) -> bytes:
    return struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, size, start, 0)


def wide_end(count: int, size: int, start: int, full: bool = True, shift: int = 0) -> bytes:
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, start + size + shift, 1)
    narrow = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF) if full else (count, count, size, start)
    return record + locator + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *narrow, 0)


SIX = np.arange(6, dtype=np.float32).tobytes()


def checkpoint(body: bytes, members: dict[str, bytes] | None = None, protocol: int = 2) -> bytes:
    """Return a file as torch.save writes it, with this pickle and these storages."""
    parts = [Part("m/data.pkl", finish(body, protocol)), Part("m/byteorder", b"little")]
    parts += [Part(f"m/data/{key}", data) for key, data in ({"0": SIX} if members is None else members).items()]
    return build([*parts, Part("m/version", b"3\n")])


# --- whole files -----------------------------------------------------------------------------------------------------


def untyped(key: str, nbytes: int) -> bytes:
    """Return a reference to a storage of bytes, as torch writes it for number forms without a class of their own."""
    kind = named("torch.storage.UntypedStorage")
    return group(text("storage"), kind, text(key), text("cpu"), number(nbytes)) + b"Q"


def view(
    form: np.dtype[Any],
    key: str,
    nbytes: int,
    shape: Iterable[int],
    strides: Iterable[int] | None = None,
    offset: int = 0,
) -> bytes:
    """Return a tensor of any number form over the storage `key`; strides and offset in elements."""
    shape = tuple(shape)
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))] if strides is None else strides
    sizes, steps_written = (group(*map(number, values)) for values in (shape, steps))
    held = untyped(key, nbytes)
    return call(
        "torch._utils._rebuild_tensor_v3",
        *(held, number(offset), sizes, steps_written, b"\x89", NO_HOOKS, named(f"torch.{form.name}")),
    )


def write_torch(
    path: Path, arrays: Mapping[str, NDArray[Any]], views: Mapping[str, tuple[str, Iterable[int], Iterable[int]]] = {}
) -> Path:
    """Write a state dict, each array in a storage of its own.

    Args:
        path: the file.
        arrays: name to array.
        views: name to the name of an array, and the shape and strides of a view of its storage.
    """
    members = {str(index): array.tobytes() for index, array in enumerate(arrays.values())}
    keys = dict(zip(arrays, members, strict=True))
    entries = [(name, view(array.dtype, keys[name], array.nbytes, array.shape)) for name, array in arrays.items()]
    for name, (source, shape, strides) in views.items():
        array = arrays[source]
        entries.append((name, view(array.dtype, keys[source], array.nbytes, shape, strides)))
    path.write_bytes(checkpoint(pairs(entries), members))
    return path


def read_checked(path: Path) -> dict[str, NDArray[Any]]:
    """Return the tensors of a checkpoint whose checksums are right."""
    with zipfile.ZipFile(path) as theirs:
        assert theirs.testzip() is None
    return {name: tensor.read() for name, tensor in CONTAINER.open(path).tensors.items()}
