"""Our reader and writer of GGUF against each other, and against files made to hurt. `tests/oracles` has the package."""

import io
import json
import struct
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from laws import container_laws
from laws.container_laws import ContainerLaws, read_all, rewrite, same_bits
from laws.writer_laws import WriterLaws
from loraformat.containers import _gguf_values
from loraformat.containers.gguf import CONTAINER, write_gguf
from loraformat.dtypes import BY_GGML, BY_NAME, BlockDtype
from loraformat.errors import LoraformatError

U32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, data: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + data


def info(name: str | bytes, dims: Sequence[int] = (3, 2), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def frame(
    pairs: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    tensors, keys = counts or (len(infos), len(pairs))
    head = magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data


def write(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Write arrays, and metadata as they were read: JSON texts."""
    sink = io.BytesIO()
    tensors = [(name, BY_NAME[array.dtype.name], array.shape, array) for name, array in arrays.items()]
    write_gguf(sink, tensors, {key: json.loads(text) for key, text in (metadata or {}).items()})
    return sink.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


open_bytes = partial(container_laws.open_bytes, CONTAINER)

METADATA = {
    "general.type": '"adapter"',
    "adapter.lora.alpha": "16.0",
    "general.quantization_version": "2",
    "general.tags": '["lora", "Größe"]',
}
VALUES = {key: json.loads(text) for key, text in METADATA.items()}


class TestGgufLaws(ContainerLaws):
    container = CONTAINER
    mutations = 600

    def write_example(self, folder: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
        path = folder / "example.gguf"
        dice = np.random.default_rng(0)
        arrays = {
            "blk.0.attn_q.weight.lora_a": dice.standard_normal((3, 5)).astype(np.float32),
            "blk.0.attn_q.weight.lora_b": dice.standard_normal((4, 3)).astype(np.float16),
            "none": np.zeros((0, 7), dtype=np.float32),
            "blk.0.ffn_up_exps.weight.lora_a": dice.standard_normal((2, 3, 5)).astype(ml_dtypes.bfloat16),
            "ids": np.arange(7, dtype=np.int32),
        }
        rewrite(path, write(arrays, METADATA))
        return path, arrays


class TestWritingGguf(WriterLaws):
    container = CONTAINER
    forms = ("float32", "float16", "bfloat16", "int8", "int16", "int32", "int64", "float64")
    lacks = "uint16"
    metadata = VALUES
    stated = METADATA


REFUSED = {
    "empty": (b"", "LF101"),
    "magic only": (b"GGUF", "LF101"),
    "another magic": (frame(magic=b"GGML"), "LF121"),
    "version 1": (frame(version=1), "LF131"),
    "version 4": (frame(version=4), "LF131"),
    "version 0": (frame(version=0), "LF131"),
    "big-endian": (frame(version=3 << 24), "LF112"),
    "2^64-1 tensors": (frame(counts=(2**64 - 1, 0)), "LF110"),
    "2^64-1 key-values": (frame(counts=(0, 2**64 - 1)), "LF110"),
    "more tensors than bytes": (frame(counts=(500, 0)), "LF101"),
    "more key-values than bytes": (frame(counts=(0, 500)), "LF101"),
    "one tensor less than said": (frame(infos=[info("a")], data=bytes(32), counts=(2, 0)), "LF301"),
    "string beyond the file": (frame([struct.pack("<Q", 400) + bytes(30)], counts=(0, 1)), "LF101"),
    "string of 2^63": (frame([struct.pack("<Q", 2**63) + bytes(30)], counts=(0, 1)), "LF110"),
    "key twice": (frame([pair("a", U32, bytes(4))] * 2), "LF105"),
    "key with a control character": (frame([pair("a\x1b", U32, bytes(4))]), "LF301"),
    "empty key": (frame([pair("", U32, bytes(4))]), "LF301"),
    "key not UTF-8": (frame([text(b"\xff\xfe") + struct.pack("<II", U32, 0)]), "LF103"),
    "value of type 13": (frame([pair("a", 13, bytes(16))]), "LF109"),
    "truth value 2": (frame([pair("a", 7, b"\2")]), "LF109"),
    "list of lists": (frame([pair("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "LF109"),
    "list of unknown": (frame([pair("a", ARRAY, struct.pack("<IQ", 99, 1))]), "LF109"),
    "list beyond the file": (frame([pair("a", ARRAY, struct.pack("<IQ", U32, 2**61))]), "LF101"),
    "texts beyond the file": (frame([pair("a", ARRAY, struct.pack("<IQ", STRING, 2**61))]), "LF101"),
    "alignment 0": (frame([pair("general.alignment", U32, bytes(4))]), "LF109"),
    "alignment 48": (frame([pair("general.alignment", U32, b"\x30\0\0\0")]), "LF109"),
    "alignment as text": (frame([pair("general.alignment", STRING, text("32"))]), "LF109"),
    "tensor twice": (frame(infos=[info("a"), info("a", offset=32)], data=bytes(64)), "LF105"),
    "name with a bidi mark": (frame(infos=[info("a\u202e")], data=bytes(32)), "LF301"),
    "nine dimensions": (frame(infos=[info("a", [1] * 9)], data=bytes(32)), "LF110"),
    "2^32-1 dimensions": (frame(infos=[text("a") + b"\xff" * 40]), "LF110"),
    "type 4, which ggml removed": (frame(infos=[info("a", kind=4)], data=bytes(32)), "LF106"),
    "type 2^31": (frame(infos=[info("a", kind=2**31)], data=bytes(32)), "LF106"),
    "2^80 elements": (frame(infos=[info("a", [2**40, 2**40])], data=bytes(32)), "LF108"),
    "2^80 elements beside a zero": (frame(infos=[info("a", [0, 2**40, 2**40])]), "LF108"),
    "half a block": (frame(infos=[info("a", [48, 2], kind=2)], data=bytes(64)), "LF108"),
    "a quantised scalar": (frame(infos=[info("a", [], kind=2)], data=bytes(64)), "LF108"),
    "data beyond the file": (frame(infos=[info("a")], data=bytes(23)), "LF107"),
    "offset 2^64-1": (frame(infos=[info("a", offset=2**64 - 1)], data=bytes(32)), "LF107"),
    "a hole": (frame(infos=[info("a"), info("b", offset=64)], data=bytes(96)), "LF107"),
    "an overlap": (frame(infos=[info("a"), info("b", offset=0)], data=bytes(64)), "LF107"),
    "bytes behind the last": (frame(infos=[info("a")], data=bytes(33)), "LF107"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "LF111"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, path: Path) -> None:
    data, code = REFUSED[name]
    with pytest.raises(LoraformatError) as caught:
        open_bytes(path, data)
    assert caught.value.codes == (code,)
    assert str(path) in caught.value.problems[0].where


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("padding", [0, 8])
def test_dimensions_are_turned_round_and_end_padding_is_free(path: Path, version: int, padding: int) -> None:
    numbers = np.arange(6, dtype="<f4")
    opened = open_bytes(
        path, frame(infos=[info("a", [3, 2])], data=numbers.tobytes() + bytes(padding), version=version)
    )
    assert same_bits(opened.tensors["a"].read(), numbers.reshape(2, 3))


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_the_alignment_is_the_files_own(path: Path, alignment: int) -> None:
    pairs = [pair("general.alignment", U32, struct.pack("<I", alignment))]
    data = bytes(alignment) + np.float32(7).tobytes()
    infos = [info("a", [1]), info("b", [1], offset=alignment)]
    opened = open_bytes(path, frame(pairs, infos, data, alignment=alignment))
    assert opened.tensors["b"].read() == 7
    assert opened.tensors["b"].span.offset % alignment == 0


BLOCKS = {number: dtype for number, dtype in BY_GGML.items() if isinstance(dtype, BlockDtype)}


@pytest.mark.parametrize("number", BLOCKS)
def test_quantised_tensors_have_a_span_and_no_numbers(path: Path, number: int) -> None:
    dtype = BLOCKS[number]
    length = 6 * dtype.block_bytes
    infos = [info("q", [2 * dtype.block_elements, 3], number), info("b", [2], 0, length + -length % 32)]
    data = bytes(range(256)) * (length // 256 + 1)
    opened = open_bytes(path, frame(infos=infos, data=data[:length] + bytes(-length % 32) + bytes(8)))
    tensor = opened.tensors["q"]
    assert (tensor.dtype, tensor.shape) == (dtype, (3, 2 * dtype.block_elements))
    assert path.read_bytes()[tensor.span.offset : tensor.span.end] == data[:length]
    with pytest.raises(LoraformatError) as caught:
        tensor.read()
    assert caught.value.codes == ("LF106",)
    assert dtype.name in str(caught.value)


SCALARS = [
    (0, "<B", 200, '{"uint8": 200}'),
    (1, "<b", -3, '{"int8": -3}'),
    (2, "<H", 5, '{"uint16": 5}'),
    (3, "<h", -5, '{"int16": -5}'),
    (4, "<I", 7, "7"),
    (4, "<I", 2**32 - 1, "4294967295"),
    (5, "<i", 7, '{"int32": 7}'),
    (5, "<i", -7, "-7"),
    (6, "<f", 0.1, "0.1"),
    (6, "<f", 16, "16.0"),
    (6, "<f", float("inf"), '{"float32": "inf"}'),
    (7, "<B", 1, "true"),
    (10, "<Q", 2**64 - 1, '{"uint64": 18446744073709551615}'),
    (11, "<q", -(2**63), '{"int64": -9223372036854775808}'),
    (12, "<d", 0.1, '{"float64": 0.1}'),
]


@pytest.mark.parametrize(("kind", "layout", "value", "expected"), SCALARS)
def test_values_are_json_and_come_back(path: Path, kind: int, layout: str, value: Any, expected: str) -> None:
    data = frame([pair("k", kind, struct.pack(layout, value))])
    opened = open_bytes(path, data)
    assert opened.metadata == {"k": expected}
    assert write({}, opened.metadata) == data


def test_lists_are_json_and_come_back(path: Path) -> None:
    lists = {
        "texts": pair("texts", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text("ß")),
        "int32": pair("int32", ARRAY, struct.pack("<IQ2i", 5, 2, 1, -1)),
        "uint32": pair("uint32", ARRAY, struct.pack("<IQ2I", 4, 2, 1, 2)),
        "bools": pair("bools", ARRAY, struct.pack("<IQ2B", 7, 2, 1, 0)),
        "floats": pair("floats", ARRAY, struct.pack("<IQ2f", 6, 2, 0.5, float("nan"))),
        "none": pair("none", ARRAY, struct.pack("<IQ", 6, 0)),
    }
    data = frame(list(lists.values()))
    opened = open_bytes(path, data)
    assert opened.metadata == {
        "texts": '["a", "ß"]',
        "int32": "[1, -1]",
        "uint32": '{"array": "uint32", "items": [1, 2]}',
        "bools": "[true, false]",
        "floats": '{"array": "float32", "items": [0.5, "nan"]}',
        "none": '{"array": "float32", "items": []}',
    }
    assert write({}, opened.metadata) == data


def test_long_lists_are_counted_and_cannot_be_written(path: Path) -> None:
    tokens = pair("tokens", ARRAY, struct.pack("<IQ", STRING, 1000) + b"".join(map(text, map(str, range(1000)))))
    types = pair("types", ARRAY, struct.pack("<IQ", 5, 1000) + bytes(4000))
    opened = open_bytes(path, frame([tokens, types, pair("after", U32, struct.pack("<I", 9))]))
    assert opened.metadata == {
        "tokens": '{"array": "string", "count": 1000}',
        "types": '{"array": "int32", "count": 1000}',
        "after": "9",
    }
    with pytest.raises(LoraformatError) as caught:
        write({}, {"tokens": opened.metadata["tokens"]})
    assert caught.value.codes == ("LF130",)


def test_a_head_longer_than_the_limit_is_not_walked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gguf_values, "MAX_GGUF_HEAD_BYTES", 1000)
    pairs = [pair(f"key {index}", U32, bytes(4)) for index in range(100)]
    with pytest.raises(LoraformatError) as caught:
        open_bytes(path, frame(pairs))
    assert caught.value.codes == ("LF110",)


@pytest.mark.parametrize("value", ["null", "[]", "[[1]]", '{"int8": 300}', '{"int9": 3}', '{"a": 1, "b": 2}', "5e99"])
def test_json_that_is_no_value_is_not_written(value: str) -> None:
    with pytest.raises(LoraformatError) as caught:
        write({}, {"key": value})
    assert caught.value.codes == ("LF130",)
    assert "key" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "array", "code"),
    [
        ("a", np.zeros((1, 1, 1, 1, 1), np.float32), "LF132"),
        ("a" * 64, np.zeros(3, np.float32), "LF132"),
        ("a", np.zeros(3, np.uint16), "LF132"),
        ("a\n", np.zeros(3, np.float32), "LF301"),
    ],
)
def test_tensors_that_ggml_does_not_hold_are_not_written(name: str, array: NDArray[Any], code: str) -> None:
    with pytest.raises(LoraformatError) as caught:
        write({name: array})
    assert caught.value.codes == (code,)


FORMS = ("float32", "float16", "bfloat16", "int8", "int16", "int32", "int64", "float64")


@given(
    forms=st.lists(st.tuples(st.sampled_from(FORMS), st.lists(st.integers(0, 4), max_size=4)), max_size=5),
    facts=st.dictionaries(
        st.text("abc.", min_size=1),
        st.one_of(
            st.booleans(),
            st.integers(-(2**31), 2**32 - 1),
            st.floats(allow_nan=False, allow_infinity=False, width=32).map(lambda value: float(str(np.float32(value)))),
            st.text(st.characters(exclude_categories=["Cs"])),
            st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4),
        ),
    ),
    seed=st.integers(0, 99),
)
def test_what_we_write_we_read(forms: list[tuple[str, list[int]]], facts: Any, seed: int, tmp_path: Path) -> None:
    dice = np.random.default_rng(seed)
    arrays = {
        f"t{index}": np.array(dice.integers(-9, 9, shape)).astype(BY_NAME[form].numpy())
        for index, (form, shape) in enumerate(forms)
    }
    metadata = {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()}
    data = write(arrays, metadata)
    opened = open_bytes(tmp_path / "a.gguf", data)
    assert opened.metadata == metadata
    assert all(tensor.span.offset % 32 == 0 for tensor in opened.tensors.values())
    found = read_all(opened)
    assert list(found) == list(arrays)
    assert all(same_bits(found[name], array) for name, array in arrays.items())
    assert write(found, opened.metadata) == data
