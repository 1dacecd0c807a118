"""Tools of the vectors: tensors, canonical JSON, safetensors files; independent of the package loraformat."""

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

Files: TypeAlias = Mapping[str, Any]
"""File name to its bytes, or to a value to be written as JSON."""
Tensors: TypeAlias = Mapping[str, "Tensor"]

FORMS: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "I8": np.dtype("<i1"),
    "I32": np.dtype("<i4"),
}
"""The dtypes that `tensor` can make."""
ELEMENT_BITS = {name: form.itemsize * 8 for name, form in FORMS.items()} | {"F4": 4, "F8_E8M0": 8, "U8": 8}
SAMPLES = 16


@dataclass(frozen=True)
class Tensor:
    """A tensor as it stands in a file.

    Attributes:
        dtype: its name in a safetensors header.
        shape: its dimensions.
        data: its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Dice:
    """Small numbers from a linear congruential generator: the same on every machine and with every numpy."""

    def __init__(self, seed: int) -> None:
        self._state = seed * 2654435761 + 12345

    def roll(self, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`, both included."""
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) % 2**64
        return low + (self._state >> 33) % (high - low + 1)

    def numbers(self, shape: Sequence[int], step: float = 0.125, most: int = 12) -> np.ndarray[Any, Any]:
        """Return an array of multiples of `step`, none of them zero, up to `most` steps."""
        count = math.prod(shape)
        steps = [self.roll(1, most) * (1 - 2 * self.roll(0, 1)) for _ in range(count)]
        return np.array(steps, dtype=np.float64).reshape(shape) * step


def tensor(dtype: str, values: Any) -> Tensor:
    """Return `values`, nested lists or an array of numbers that `dtype` holds exactly, as a tensor."""
    wanted = np.asarray(values, dtype=np.float64)
    stored = wanted.astype(FORMS[dtype])
    if not np.array_equal(stored.astype(np.float64), wanted, equal_nan=True):
        raise ValueError(f"{dtype} does not hold {wanted.tolist()}")
    return Tensor(dtype, wanted.shape, np.ascontiguousarray(stored).tobytes())


def canonical(value: Any) -> str:
    """Return RFC 8785's text of `value`, for the numbers that vectors have."""
    if isinstance(value, Mapping):
        ordered = sorted(value.items(), key=lambda item: item[0].encode("utf-16-be"))
        return "{" + ",".join(f"{canonical(key)}:{canonical(item)}" for key, item in ordered) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, float):
        return _print_float(value)
    return json.dumps(value, ensure_ascii=False)


def _print_float(value: float) -> str:
    """Return a 64-bit float as ECMAScript prints it."""
    if value == int(value) and abs(value) < 1e21:
        digits = str(abs(int(value)))
        shortest = repr(abs(value)).split("e")[0].replace(".", "").rstrip("0")
        return ("-" if value < 0 else "") + (shortest.ljust(len(digits), "0") if value else "0")
    mantissa, _, exponent = repr(value).partition("e")
    if exponent:
        if -7 < int(exponent) < 21:
            raise ValueError(f"{value!r} is printed otherwise in ECMAScript: choose another number")
        return f"{mantissa.removesuffix('.0')}e{int(exponent):+d}"
    return mantissa


def frame(header: str | bytes, data: bytes = b"") -> bytes:
    """Return the file of a header text and data, the header as it is."""
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def pack(manifest: Any, tensors: Tensors) -> bytes:
    """Return the canonical file: `manifest` is its value, or its text."""
    text = manifest if isinstance(manifest, str) else canonical(manifest)
    return store(tensors, {"loraformat": text})


def store(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a safetensors file, canonical but for what `metadata` says."""
    ordered = sorted(tensors.items(), key=lambda item: (-ELEMENT_BITS[item[1].dtype], item[0].encode()))
    entries = entries_of(ordered)
    header = canonical(entries | ({"__metadata__": dict(metadata)} if metadata is not None else {})).encode()
    return frame(header + b" " * (-len(header) % 8), b"".join(tensor.data for _, tensor in ordered))


def entries_of(ordered: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
    """Return the header entries of tensors that lie one behind the other in this order."""
    entries: dict[str, Any] = {}
    end = 0
    for name, item in ordered:
        begin, end = end, end + len(item.data)
        entries[name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": [begin, end]}
    return entries


def sha256(data: bytes) -> str:
    """Return the digest, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(target: str, weight: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return the fingerprint of a weight in its canonical shape (R-061)."""
    matrix = weight.reshape(weight.shape[0], -1)
    samples = []
    for index in range(SAMPLES):
        digest = hashlib.sha256(f"loraformat-fingerprint-1\n{target}\n{index}".encode()).digest()
        row, column = (int.from_bytes(digest[start : start + 8], "big") for start in (0, 8))
        samples.append(float(np.float32(matrix[row % matrix.shape[0], column % matrix.shape[1]])))
    return {"shape": list(weight.shape), "samples": samples}


def lora(slot: str, rank: int, rule: str = "multiplier", number: float = 1, **more: Any) -> dict[str, Any]:
    """Return a target of the kind `lora`."""
    field = "multiplier" if rule == "multiplier" else "alpha"
    return {"kind": "lora", "slot": slot, "rank": rank, "scaling": {"rule": rule, field: number}, **more}


def replacement(number: float = 1, **more: Any) -> dict[str, Any]:
    """Return a target of the kind `replace`."""
    scaling = {"rule": "multiplier", "multiplier": number}
    return {"kind": "replace", "slot": "parameter", "rank": 0, "scaling": scaling, **more}


def manifest_of(targets: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return a manifest, of version 1.0 unless `more` says otherwise."""
    return {"version": "1.0", "targets": dict(targets), **more}


def roles_of(slot: str) -> tuple[str, str]:
    """Return the roles of A and B in a slot."""
    return ("lora_embedding_A", "lora_embedding_B") if slot == "embedding" else ("lora_A.weight", "lora_B.weight")


def factors(target: str, slot: str, down: Any, up: Any, dtype: str = "F32") -> dict[str, Tensor]:
    """Return the tensors of one target: A and B."""
    first, second = roles_of(slot)
    return {f"{target}.{first}": tensor(dtype, down), f"{target}.{second}": tensor(dtype, up)}


def shape_factors(
    dice: Dice, target: str, slot: str, shape: Sequence[int], rank: int, dtype: str = "F32"
) -> dict[str, Tensor]:
    """Return factors for a weight of the canonical `shape`, with numbers from `dice`."""
    down = dice.numbers((rank, *shape[1:]))
    up = dice.numbers((shape[0], rank, *(1 for _ in shape[2:])))
    return factors(target, slot, down, up, dtype)
