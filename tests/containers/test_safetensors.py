"""Our safetensors reader and writer against the library, and against files made to hurt."""

import io
import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from laws import container_laws
from laws.container_laws import ContainerLaws, read_all, rewrite, same_bits
from loraformat import limits
from loraformat.containers._safetensors_images import describe_images, escape_for_header
from loraformat.containers.safetensors import (
    CONTAINER,
    NewTensor,
    Safetensors,
    find_data_start,
    write_safetensors,
)
from loraformat.dtypes import BY_NAME, BY_SAFETENSORS, Dtype
from loraformat.errors import InputError, LoraformatError, RefusedError
from loraformat.images import Blank, Copy, FileImage, Literal
from loraformat.spans import InputFile

F32 = BY_NAME["float32"]


def frame(header: bytes, data: bytes = b"") -> bytes:
    """Return a file of this header text and data."""
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: str = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write(tensors: list[NewTensor], metadata: dict[str, str] | None = None) -> bytes:
    sink = io.BytesIO()
    write_safetensors(sink, tensors, metadata or {})
    return sink.getvalue()


def fill(image: FileImage, text: str) -> bytes:
    """Return the file that `image` describes, its blank filled as the engine does."""
    out = bytearray(image.size_bytes)
    for offset, piece in image.placed():
        match piece:
            case Literal(data):
                new = data
            case Blank(length):
                new = escape_for_header(text).ljust(length)
            case Copy(file, start, length):
                new = file.read(start, length)
        assert len(new) == piece.length
        out[offset : offset + len(new)] = new
    return bytes(out)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


open_bytes = partial(container_laws.open_bytes, CONTAINER)
refusal = partial(container_laws.refuse_bytes, CONTAINER)


class TestSafetensorsLaws(ContainerLaws):
    container = CONTAINER
    mutations = 600

    def write_example(self, folder: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
        path = folder / "example.safetensors"
        dice = np.random.default_rng(0)
        arrays = {
            "scale": np.array(2.5, dtype=np.float64),
            "model.layers.0.q_proj.lora_A.weight": dice.standard_normal((3, 5)).astype(np.float32),
            "none.here": np.zeros((0, 7), dtype=np.float32),
            "model.layers.0.q_proj.lora_B.weight": dice.standard_normal((4, 3)).astype(ml_dtypes.bfloat16),
            "tokens": np.arange(7, dtype=np.uint8),
        }
        tensors = [(name, BY_NAME[array.dtype.name], array.shape, array) for name, array in arrays.items()]
        rewrite(path, write(tensors, {"format": "pt", "note": "Größe"}))
        return path, arrays


# One bytes literal, or a few, for each reason a file is refused.
REFUSED = {
    "empty": (b"", "LF101"),
    "seven bytes": (b"\x10\0\0\0\0\0\0", "LF101"),
    "only a length": (b"\x02\0\0\0\0\0\0\0", "LF102"),
    "length beyond the file": (b"\x03\0\0\0\0\0\0\0{}", "LF102"),
    "length of 2^63": (b"\0\0\0\0\0\0\0\x80{}", "LF102"),
    "length of 2^64-1": (b"\xff" * 8 + b"{}", "LF102"),
    "length 0": (frame(b""), "LF102"),
    "length 1": (frame(b"{"), "LF102"),
    "leading space": (frame(b" {}"), "LF103"),
    "byte order mark": (frame(b"\xef\xbb\xbf{}"), "LF103"),
    "latin-1": (frame(b'{"__metadata__":{"a":"\xe9"}}'), "LF103"),
    "array": (frame(b"[]"), "LF103"),
    "not JSON": (frame(b"{]"), "LF104"),
    "NUL padding": (frame(b"{}\0\0\0\0\0\0"), "LF104"),
    "two objects": (frame(b"{}{}"), "LF104"),
    "NaN": (frame(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}'), "LF104"),
    "infinity by overflow": (frame(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,0]}}'), "LF104"),
    "a long integer": (frame(b'{"a":' + b"9" * 5000 + b"}"), "LF104"),
    "deep": (frame(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "LF104"),
    "lone surrogate": (frame(b'{"__metadata__":{"a":"\\ud800"}}'), "LF104"),
    "raw control character": (frame(b'{"__metadata__":{"a":"\x01"}}'), "LF104"),
    "tensor twice": (
        frame(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
            b"\0",
        ),
        "LF105",
    ),
    "metadata key twice": (frame(b'{"__metadata__":{"a":"1","a":"2"}}'), "LF105"),
    "metadata twice": (frame(b'{"__metadata__":{},"__metadata__":{}}'), "LF105"),
    "field twice": (frame(b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'), "LF105"),
    "escaped key twice": (frame(b'{"__metadata__":{"a":"1","\\u0061":"2"}}'), "LF105"),
    "unknown dtype": (frame(b'{"a":{"dtype":"F31","shape":[0],"data_offsets":[0,0]}}'), "LF106"),
    "dtype in small letters": (frame(b'{"a":{"dtype":"f32","shape":[0],"data_offsets":[0,0]}}'), "LF106"),
    "dtype as a number": (frame(b'{"a":{"dtype":32,"shape":[0],"data_offsets":[0,0]}}'), "LF106"),
    "dtype as a list": (frame(b'{"a":{"dtype":["F32"],"shape":[0],"data_offsets":[0,0]}}'), "LF106"),
    "reversed": (frame(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}', b"\0"), "LF107"),
    "cut off": (frame(b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}', b"\0\0"), "LF107"),
    "trailing byte": (frame(b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}', b"\0" * 4), "LF107"),
    "data without tensors": (frame(b"{}", b"\0"), "LF107"),
    "hole at the start": (frame(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"\0\0"), "LF107"),
    "hole between": (
        frame(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}',
            b"\0" * 3,
        ),
        "LF107",
    ),
    "overlap": (
        frame(
            b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
            b"\0" * 3,
        ),
        "LF107",
    ),
    "one place for two": (
        frame(
            b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
            b"\0" * 2,
        ),
        "LF107",
    ),
    "end of 2^64-1": (
        frame(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,18446744073709551615]}}'),
        "LF107",
    ),
    "fewer bytes than the shape": (
        frame(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"\0" * 4),
        "LF108",
    ),
    "more bytes than the shape": (frame(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}', b"\0" * 8), "LF108"),
    "half a byte": (frame(b'{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}', b"\0" * 2), "LF108"),
    "product above 2^64": (
        frame(b'{"a":{"dtype":"U8","shape":[4294967296,4294967296,2],"data_offsets":[0,0]}}'),
        "LF108",
    ),
    "overflow beside a zero": (
        frame(b'{"a":{"dtype":"F32","shape":[18446744073709551615,0],"data_offsets":[0,0]}}'),
        "LF108",
    ),
    "metadata is a list": (frame(b'{"__metadata__":[]}'), "LF109"),
    "metadata holds a number": (frame(b'{"__metadata__":{"a":1}}'), "LF109"),
    "entry is a string": (frame(b'{"a":"F32"}'), "LF109"),
    "entry is a list": (frame(b'{"a":["F32",[0],[0,0]]}'), "LF109"),
    "no dtype": (frame(b'{"a":{"shape":[0],"data_offsets":[0,0]}}'), "LF109"),
    "a field more": (frame(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":0}}'), "LF109"),
    "shape is a number": (frame(b'{"a":{"dtype":"U8","shape":3,"data_offsets":[0,0]}}'), "LF109"),
    "shape is a string": (frame(b'{"a":{"dtype":"U8","shape":"","data_offsets":[0,1]}}', b"\0"), "LF109"),
    "float in the shape": (frame(b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', b"\0"), "LF109"),
    "bool in the shape": (frame(b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', b"\0"), "LF109"),
    "negative in the shape": (frame(b'{"a":{"dtype":"U8","shape":[-1,-1],"data_offsets":[0,1]}}', b"\0"), "LF109"),
    "minus zero in the shape": (frame(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "LF109"),
    "three offsets": (frame(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0,0]}}'), "LF109"),
    "negative offset": (frame(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[-1,1]}}', b"\0"), "LF109"),
    "bool as offset": (frame(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[false,true]}}', b"\0"), "LF109"),
    "nine dimensions": (
        frame(b'{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}', b"\0"),
        "LF110",
    ),
    "long name": (frame(b'{"' + b"n" * 4097 + b'":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "LF110"),
    "git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n",
        "LF111",
    ),
    "short git-LFS pointer": (b"version https://git-lfs", "LF111"),
    "web page": (b"<!DOCTYPE html>\n<html><title>404</title></html>", "LF111"),
    "web page in small letters": (b"\n <html lang=en>", "LF111"),
    "XML error": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "LF111"),
    "zip": (b"PK\x03\x04\x14\0\0\0\0\0\0\0archive/data.pkl", "LF111"),
    "pickle of torch": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "LF111"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94\x8c\x01a\x94K\x01s.", "LF111"),
    "GGUF": (b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "LF111"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "LF111"),
    "JSON": (b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "LF111"),
    "small JSON": (b"{}", "LF111"),
    "JSON with a brace where a header begins": (b'{"abcd":{"x":1}}', "LF111"),
    "JSON with a mark": (b'\xef\xbb\xbf\n{"a": 1}', "LF111"),
    "empty name": (frame(b'{"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "LF301"),
    "NUL in a name": (frame(b'{"a\\u0000":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "LF301"),
    "newline in a name": (frame(b'{"a\\n":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "LF301"),
    "escape sequence in a name": (
        frame(b'{"\\u001b[2J":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "LF301",
    ),
    "bidi mark in a name": (
        frame('{"a\u202eb":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'.encode()),
        "LF301",
    ),
    "C1 control in a name": (frame('{"a\u009b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'.encode()), "LF301"),
}

# What the library takes and we do not, each on purpose (spec: reader rules; reliability.md §3.2).
STRICTER = {
    "leading space",
    "tensor twice",
    "metadata key twice",
    "escaped key twice",
    "overflow beside a zero",
    "entry is a list",
    "a field more",
    "nine dimensions",
    "long name",
    "empty name",
    "NUL in a name",
    "newline in a name",
    "escape sequence in a name",
    "bidi mark in a name",
    "C1 control in a name",
}


def accepted_by_library(data: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """Return the tensors as the library reads them, or None when it refuses the file."""
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return None
    return {name: (parts["dtype"], parts["shape"], bytes(parts["data"])) for name, parts in found}


@pytest.mark.parametrize("case", REFUSED)
def test_each_defect_has_its_reason(case: str, path: Path) -> None:
    data, code = REFUSED[case]
    error = refusal(path, data)
    assert error.codes == (code,)
    assert isinstance(error, RefusedError if code == "LF110" else InputError)
    assert str(error).isprintable() or "\n" in str(error)
    assert "\x1b" not in str(error)


@pytest.mark.parametrize("case", REFUSED)
def test_where_we_are_stricter_than_the_library(case: str) -> None:
    assert (accepted_by_library(REFUSED[case][0]) is not None) == (case in STRICTER)


def test_every_reason_of_the_reader_has_a_case() -> None:
    named = {word.strip(".,") for word in (Safetensors.open.__doc__ or "").split() if word.startswith("LF")}
    assert {code for _, code in REFUSED.values()} == named
    assert len(named) == 12


def test_messages_say_file_tensor_and_numbers(path: Path) -> None:
    (hole,) = refusal(path, REFUSED["hole between"][0]).problems
    assert "'b'" in hole.where
    assert "2" in hole.found
    assert hole.expected == "1"
    (unknown,) = refusal(path, REFUSED["unknown dtype"][0]).problems
    assert "F31" in unknown.found
    assert all(name in unknown.expected for name in BY_SAFETENSORS)
    (lfs,) = refusal(path, REFUSED["git-LFS pointer"][0]).problems
    assert lfs.mend == "git lfs pull"
    (size,) = refusal(path, frame(json.dumps({"w": entry(shape=(2, 3), offsets=(0, 20))}).encode(), bytes(20))).problems
    assert "20" in size.found
    assert "24" in size.expected


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({f"t{index}": entry("U8", [0], [0, 0]) for index in range(2600)}),
        json.dumps({str(index): 0 for index in range(10_100)}, separators=(" , ", " \n: ")),
        json.dumps({"a": [0] * 1_000_100}),
    ],
    ids=["tensors", "members", "values"],
)
def test_a_header_of_far_too_many_values_is_refused_unparsed(
    path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Before a hundred megabytes of text become a gigabyte of values."""
    monkeypatch.setattr("loraformat.containers.safetensors.MAX_TENSORS", 5)
    monkeypatch.setattr("loraformat.containers.safetensors.parse_json_object", None)
    assert refusal(path, frame(text.encode())).codes == ("LF110",)


def test_caps_hold_at_their_edges(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "loraformat.containers.safetensors"
    tensors = {name: entry("U8", [1], [index, index + 1]) for index, name in enumerate("abc")}
    data = frame(json.dumps({"__metadata__": {"k": "é" * 5}} | tensors).encode(), b"\0" * 3)
    for cap, enough in (("MAX_TENSORS", 3), ("MAX_METADATA_BYTES", 10)):
        monkeypatch.setattr(f"{module}.{cap}", enough)
        assert list(open_bytes(path, data).tensors) == ["a", "b", "c"]
        monkeypatch.setattr(f"{module}.{cap}", enough - 1)
        assert refusal(path, data).codes == ("LF110",)
        monkeypatch.undo()
    name = "n" * limits.MAX_NAME_BYTES
    assert list(open_bytes(path, frame(json.dumps({name: entry("U8", [1] * 8, [0, 1])}).encode(), b"\0")).tensors) == [
        name
    ]


def test_a_header_beyond_the_cap_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A sparse file: its length field is true, and a reader that trusts it would take 200 MB.
    rewrite(path, (200_000_000).to_bytes(8, "little") + b"{")
    os.truncate(path, 200_000_008)
    lengths: list[int] = []
    read = InputFile.read

    def watched(file: InputFile, offset: int, length: int) -> bytes:
        lengths.append(length)
        return read(file, offset, length)

    monkeypatch.setattr(InputFile, "read", watched)
    with pytest.raises(InputError) as caught:
        CONTAINER.open(path)
    assert caught.value.codes == ("LF102",)
    assert sum(lengths) <= 64


def test_a_header_of_three_bytes_and_odd_sizes_is_fine(path: Path) -> None:
    opened = open_bytes(path, frame(b'{"a":{"shape":[3],"data_offsets":[0,3],"dtype":"U8"}} \n\t', b"abc"))
    assert opened.tensors["a"].read().tobytes() == b"abc"
    assert find_data_start(opened.file) == opened.tensors["a"].span.offset
    assert not open_bytes(path, frame(b"{}")).tensors


def test_a_length_that_looks_like_a_pickle_is_a_length(path: Path) -> None:
    header = b"{}".ljust(0x0280)
    assert frame(header)[:2] == b"\x80\x02"
    assert not open_bytes(path, frame(header)).tensors


def test_tensors_come_in_the_order_of_their_offsets(path: Path) -> None:
    entries = {"c": entry("U8", [2], [3, 5]), "z": entry("U8", [0], [3, 3]), "a": entry("U8", [3], [0, 3])}
    opened = open_bytes(path, frame(json.dumps(entries).encode(), b"aaacc"))
    assert list(opened.tensors) == ["a", "z", "c"]
    assert opened.tensors["c"].read().tobytes() == b"cc"


def test_packed_numbers_are_indexed_but_not_unpacked(path: Path) -> None:
    opened = open_bytes(path, frame(json.dumps({"a": entry("F4", [2, 3], [0, 3])}).encode(), b"abc"))
    assert opened.tensors["a"].span.length == 3
    with pytest.raises(InputError) as caught:
        opened.tensors["a"].read()
    assert caught.value.codes == ("LF106",)


# --- against the library, both ways -----------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs", "Cf", "Zl", "Zp")), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
METADATA = st.dictionaries(TEXTS, TEXTS, max_size=4)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def new_tensors(draw: st.DrawFn) -> list[NewTensor]:
    tensors: list[NewTensor] = []
    for name in draw(st.lists(NAMES, unique=True, max_size=5)):
        dtype = draw(st.sampled_from(sorted(BY_SAFETENSORS.values(), key=lambda dtype: dtype.name)))
        shape = draw(SHAPES)
        if dtype.bits < 8:
            shape = (*shape, 8)
        data = draw(st.binary(min_size=size_of(dtype, shape), max_size=size_of(dtype, shape)))
        tensors.append((name, dtype, shape, lambda data=data: data))
    return tensors


def size_of(dtype: Dtype, shape: tuple[int, ...]) -> int:
    return dtype.count_bytes(math.prod(shape))


def parts_of(tensors: list[NewTensor]) -> dict[str, tuple[str, list[int], bytes]]:
    return {name: (str(dtype.safetensors), list(shape), bytes(payload())) for name, dtype, shape, payload in tensors}


def parts_read(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    opened = CONTAINER.open(path)
    return {
        name: (str(t.dtype.safetensors), list(t.shape), t.file.read(t.span.offset, t.span.length))
        for name, t in opened.tensors.items()
    }


@given(tensors=new_tensors(), metadata=METADATA)
def test_what_we_write_the_library_and_we_read(
    tensors: list[NewTensor], metadata: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "ours.safetensors"
    data = write(tensors, metadata)
    rewrite(path, data)
    assert accepted_by_library(data) == parts_of(tensors) == parts_read(path)
    assert dict(CONTAINER.open(path).metadata) == metadata
    with safetensors.safe_open(path, "np") as theirs:
        assert (theirs.metadata() or {}) == metadata
    assert write(tensors[::-1], dict(reversed(metadata.items()))) == data


@given(tensors=new_tensors(), metadata=METADATA)
def test_what_the_library_writes_we_read(tensors: list[NewTensor], metadata: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    tensors = [tensor for tensor in tensors if tensor[1].bits >= 8]  # Packed ones have other names and shapes there.
    buffers = {name: np.frombuffer(bytes(payload()) or b"\0", dtype=np.uint8) for name, _, _, payload in tensors}
    spec = {
        name: safetensors.TensorSpec(
            dtype=dtype.name,
            shape=list(shape),
            data_ptr=buffers[name].ctypes.data,
            data_len=size_of(dtype, tuple(shape)),
        )
        for name, dtype, shape, _ in tensors
    }
    # The library (0.8.0) cannot read what it writes for no tensors and empty metadata: `{},"__metadata__":{}}`.
    rewrite(path, safetensors.serialize(spec, metadata or None))
    assert parts_read(path) == parts_of(tensors)
    assert dict(CONTAINER.open(path).metadata) == metadata


def test_arrays_through_safe_open(path: Path) -> None:
    dice = np.random.default_rng(0)
    arrays = {
        name: dice.standard_normal((2, 3)).astype(BY_NAME[name].numpy()) for name in ("float64", "float16", "int32")
    }
    rewrite(path, write([(name, BY_NAME[name], array.shape, array) for name, array in arrays.items()]))
    with safetensors.safe_open(path, "np") as theirs:
        for name, array in arrays.items():
            assert same_bits(theirs.get_tensor(name), array)
    assert all(same_bits(found, arrays[name]) for name, found in read_all(CONTAINER.open(path)).items())


# --- structure-aware damage -------------------------------------------------------------------------------------------

ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**19, 10**25, -(2**63)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["", "F32", "BF16", "F4", "I64", "f32", "__metadata__", "\x00", "a\u202e", "x" * 5000]),
    st.lists(st.integers(-1, 30), max_size=3),
    st.lists(st.sampled_from([0, 1, 2, 2**32, 2**63, 2**64 - 1]), max_size=10),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), st.integers(0, 3), max_size=3),
)
SWAPS = [
    (b"[0,", b"[-0,"),
    (b":", b"::"),
    (b"}", b"}}"),
    (b"{", b" {"),
    (b'"a"', b'"b"'),
    (b'"dtype"', b'"shape"'),
    (b'"', b"'"),
    (b"]", b",]"),
    (b"0", b"00"),
    (b"1", b"1.0"),
    (b"2", b"2e0"),
    (b"}", b"}\n"),
    (b"}", b"}\x00"),
    (b"a", b"\xff"),
    (b"a", b"\\u0061"),
    (b"{", b"{/**/"),
]


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    header: dict[str, Any] = {
        "__metadata__": {"k": "v"},
        "a": entry("F32", [1, 2], [0, 8]),
        "b": entry("U8", [3], [8, 11]),
        "c": entry("BF16", [0, 2], [11, 11]),
    }
    for _ in range(draw(st.integers(0, 3))):
        place: Any = header
        for _ in range(draw(st.integers(0, 2))):
            child = place[draw(st.sampled_from(sorted(place)))] if place else None
            place = child if isinstance(child, dict) else place
        key = draw(st.sampled_from([*sorted(place), "new"]))
        if draw(st.booleans()):
            place[key] = draw(ODD_VALUES)
        elif key in place and isinstance(place[key], list) and place[key]:
            place[key][draw(st.integers(0, len(place[key]) - 1))] = draw(ODD_VALUES)
        else:
            place.pop(key, None)
    text = json.dumps(header, separators=(",", ":")).encode()
    for old, new in draw(st.lists(st.sampled_from(SWAPS), max_size=2)):
        text = text.replace(old, new, draw(st.integers(1, 3)))
    length = len(text) + draw(st.sampled_from([0] * 12 + [-1, 1, 8, 2**40]))
    data = bytes(range(draw(st.sampled_from([11] * 8 + [0, 3, 8, 10, 12, 27]))))
    return max(length, 0).to_bytes(8, "little") + text + data


@given(data=damaged_files())
def test_damage_is_refused_or_read_as_the_library_reads_it(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    rewrite(path, data)
    try:
        ours = parts_read(path)
    except LoraformatError as error:
        str(error)  # Building the message must not fail either.
        return
    assert ours == accepted_by_library(data)


def test_many_random_headers_agree_with_the_library(path: Path) -> None:
    """Fields drawn at random, most of them nearly right: where we accept, the library reads the same."""
    dice = np.random.default_rng(7)
    accepted = 0
    for _ in range(1500):
        begin, entries = 0, {}
        for index in range(int(dice.integers(0, 4))):
            shape = [int(size) for size in dice.integers(0, 4, size=int(dice.integers(0, 3)))]
            dtype = BY_SAFETENSORS[str(dice.choice(["F32", "BF16", "U8", "F4", "F6_E2M3", "C64"]))]
            end = begin + math.prod(shape) * dtype.bits // 8 + int(dice.choice([0] * 12 + [-1, 1]))
            entries[f"t{index}"] = entry(str(dtype.safetensors), shape, (begin, end))
            begin = end + int(dice.choice([0] * 14 + [-1, 1]))
        data = frame(json.dumps(entries).encode(), bytes(max(begin, 0)))
        rewrite(path, data)
        theirs = accepted_by_library(data)
        try:
            ours = parts_read(path)
        except LoraformatError:
            assert theirs is None, entries
            continue
        accepted += 1
        assert ours == theirs
    assert 250 < accepted < 1450


# --- writing ----------------------------------------------------------------------------------------------------------


def test_the_bytes_are_these() -> None:
    tensors: list[NewTensor] = [
        ("z", BY_NAME["uint8"], (3,), np.array([1, 2, 3], dtype=np.uint8)),
        ("b", F32, (1, 2), np.array([[1.0, -2.0]], dtype=np.float32)),
        ("a", F32, (), np.array(0.5, dtype=np.float32)),
    ]
    header = (
        b'{"__metadata__":{"a":"\xc3\xa9","k":"\\"1\\""},'
        b'"a":{"data_offsets":[0,4],"dtype":"F32","shape":[]},'
        b'"b":{"data_offsets":[4,12],"dtype":"F32","shape":[1,2]},'
        b'"z":{"data_offsets":[12,15],"dtype":"U8","shape":[3]}}'
    )
    header = header.ljust(208)
    data = bytes.fromhex("0000003f0000803f000000c0010203")
    assert write(tensors, {"k": '"1"', "a": "é"}) == frame(header, data)
    assert write([], {}) == frame(b"{}      ")


def test_data_is_aligned_for_every_number_form() -> None:
    tensors = [(d.name, d, (8,), lambda d=d: bytes(d.count_bytes(8))) for d in BY_SAFETENSORS.values()]
    for name, start in starts_of(write(tensors)).items():
        assert start % max(1, BY_NAME[name].bits // 8) == 0, name


def starts_of(data: bytes) -> dict[str, int]:
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    return {name: 8 + length + fields["data_offsets"][0] for name, fields in header.items() if name != "__metadata__"}


@pytest.mark.parametrize(
    "reshape",
    [
        pytest.param(lambda array: array, id="plain"),
        pytest.param(np.asfortranarray, id="fortran"),
        pytest.param(lambda array: np.repeat(array, 2, axis=1)[:, ::2], id="every second column"),
        pytest.param(lambda array: array[:, ::-1].copy()[:, ::-1], id="backwards"),
        pytest.param(lambda array: array.T.copy().T, id="transposed"),
        pytest.param(lambda array: np.broadcast_to(array[:1], array.shape), id="broadcast"),
        pytest.param(lambda array: array.astype(array.dtype.newbyteorder(">")), id="big-endian"),
    ],
)
@pytest.mark.parametrize("name", ["float32", "float16", "int64", "bfloat16", "bool"])
def test_arrays_are_written_by_value(name: str, reshape: Any, path: Path) -> None:
    array = reshape(np.arange(15).reshape(3, 5).astype(BY_NAME[name].numpy()))
    array.setflags(write=False)
    rewrite(path, write([("w", BY_NAME[name], (3, 5), array)]))
    # Not array.tolist(): ml_dtypes 0.6 reads a byte-swapped bfloat16 wrongly there.
    expected = np.array(array.astype(np.float64).tolist(), dtype=BY_NAME[name].numpy())
    assert same_bits(CONTAINER.open(path).tensors["w"].read(), expected)


def test_payloads_are_asked_for_one_after_another() -> None:
    events: list[str] = []

    class Sink(io.BytesIO):
        def write(self, data: Any) -> int:
            events.append(f"write {len(data)}")
            return super().write(data)

    def payload(name: str, size: int) -> Any:
        events.append(name)
        return np.zeros(size, dtype=np.uint8)

    tensors = [
        (name, BY_NAME["uint8"], (size,), lambda n=name, s=size: payload(n, s)) for name, size in (("b", 5), ("a", 3))
    ]
    write_safetensors(Sink(), tensors, {})
    assert events[1:] == ["a", "write 3", "b", "write 5"]


def test_a_descriptor_is_written_and_stays_open(path: Path) -> None:
    tensors: list[NewTensor] = [("w", F32, (2, 3), np.ones((2, 3), dtype=np.float32))]
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    write_safetensors(descriptor, tensors, {"k": "v"})
    assert os.fstat(descriptor).st_size == path.stat().st_size
    os.close(descriptor)
    assert path.read_bytes() == write(tensors, {"k": "v"})


@pytest.mark.parametrize(
    "tensor",
    [
        ("w", F32, (2, 3), np.zeros((3, 2), dtype=np.float32)),
        ("w", F32, (2, 3), np.zeros((2, 3), dtype=np.float64)),
        ("w", F32, (2, 3), np.zeros((2, 3), dtype=np.int32)),
        ("w", F32, (2, 3), lambda: b"\0" * 23),
        ("w", F32, (2, 3), lambda: np.zeros((2, 3), dtype=">f8")),
        ("w", BY_NAME["float4_e2m1fn"], (2, 3), np.zeros((2, 3), dtype=ml_dtypes.float4_e2m1fn)),
        ("w", BY_NAME["float4_e2m1fn"], (3,), lambda: b"\0\0"),
        ("w", BY_NAME["int4"], (2,), lambda: b"\0"),
    ],
    ids=["shape", "wider", "other family", "short", "wider and swapped", "unpacked", "half a byte", "no name for it"],
)
def test_a_payload_that_is_not_what_was_stated_is_an_error(tensor: NewTensor) -> None:
    with pytest.raises(ValueError, match="tensor 'w'"):
        write([tensor])


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (["a", "a"], "LF105"),
        ([""], "LF301"),
        (["__metadata__"], "LF301"),
        (["a\x1b"], "LF301"),
        (["n" * (limits.MAX_NAME_BYTES + 1)], "LF110"),
    ],
)
def test_what_we_would_not_read_we_do_not_write(names: list[str], code: str) -> None:
    sink = io.BytesIO()
    with pytest.raises(LoraformatError) as caught:
        write_safetensors(sink, [(name, F32, (0,), lambda: b"") for name in names], {})
    assert caught.value.codes == (code,)
    assert not sink.getvalue()


def test_a_metadata_value_too_long_is_not_written() -> None:
    with pytest.raises(RefusedError) as caught:
        write([], {"k": "v" * (limits.MAX_METADATA_BYTES + 1)})
    assert caught.value.codes == ("LF110",)


# --- images -----------------------------------------------------------------------------------------------------------


@given(
    tensors=new_tensors(),
    metadata=METADATA,
    key=st.one_of(TEXTS, st.just("loraformat.receipt")),
    text=TEXTS.map(str.rstrip),
    room=st.integers(1, 50),
)
def test_the_image_is_the_same_file_with_one_entry_more(
    tensors: list[NewTensor], metadata: dict[str, str], key: str, text: str, room: int, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    rewrite(source, write(tensors, metadata))
    opened = CONTAINER.open(source)
    (image,) = describe_images(opened, output, key, len(escape_for_header(text)) + room)
    rewrite(output, fill(image, text))
    with safetensors.safe_open(output, "np") as theirs:
        found = theirs.metadata()
    assert found[key].rstrip(" ") == text
    assert {name: value for name, value in found.items() if name != key} == {
        name: value for name, value in metadata.items() if name != key
    }
    assert dict(CONTAINER.open(output).metadata) == found
    assert accepted_by_library(output.read_bytes()) == accepted_by_library(source.read_bytes())
    assert list(CONTAINER.open(output).tensors) == list(opened.tensors)
    assert image.path == output
    assert find_data_start(CONTAINER.open(output).file) % 8 == 0


def test_spans_land_where_the_image_says(path: Path) -> None:
    tensors: list[NewTensor] = [
        ("a", F32, (2, 3), np.arange(6, dtype=np.float32).reshape(2, 3)),
        ("b", BY_NAME["uint8"], (5,), np.arange(5, dtype=np.uint8)),
    ]
    opened = open_bytes(path, write(tensors, {"k": "v"}))
    (image,) = describe_images(opened, path.with_name("out"), "receipt", 100)
    data = fill(image, "{}")
    for tensor in opened.tensors.values():
        place = image.locate(tensor.span)
        assert place is not None
        assert data[place : place + tensor.span.length] == tensor.read().tobytes()


def test_an_image_of_an_image_replaces_the_entry(path: Path) -> None:
    opened = open_bytes(path, write([("a", F32, (2, 3), np.ones((2, 3), dtype=np.float32))], {"other": "kept"}))
    for text in ('{"first":1}', '{"second":"é"}'):
        (image,) = describe_images(opened, path, "receipt", 64)
        opened = open_bytes(path, fill(image, text))
    assert {key: value.rstrip() for key, value in opened.metadata.items()} == {
        "other": "kept",
        "receipt": '{"second":"é"}',
    }


def test_offsets_and_order_are_kept_when_they_are_not_the_canonical_ones(path: Path) -> None:
    entries = {"a": entry("U8", [2], [3, 5]), "z": entry("F32", [], [5, 9]), "c": entry("U8", [3], [0, 3])}
    opened = open_bytes(path, frame(json.dumps(entries, indent=1).encode(), b"cccaaffff"))
    (image,) = describe_images(opened, path, "k", 3)
    again = open_bytes(path, fill(image, "x"))
    assert list(again.tensors) == ["c", "a", "z"]
    assert again.file.read(find_data_start(again.file), 9) == b"cccaaffff"


def test_a_blank_that_readers_would_refuse_is_refused(path: Path) -> None:
    opened = open_bytes(path, write([]))
    describe_images(opened, path, "k", limits.MAX_METADATA_BYTES)
    with pytest.raises(RefusedError) as caught:
        describe_images(opened, path, "k", limits.MAX_METADATA_BYTES + 1)
    assert caught.value.codes == ("LF110",)


def test_metadata_may_be_null_as_mlx_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "mlx.safetensors"
    path.write_bytes(frame(b'{"__metadata__":null,"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'))
    opened = CONTAINER.open(path)
    assert list(opened.tensors) == ["a"]
    assert opened.metadata == {}
