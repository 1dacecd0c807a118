"""Our reader and writer of ONNX Runtime's adapters against onnxruntime, and against files made to hurt."""

import io
import os
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from laws import container_laws
from laws.container_laws import ContainerLaws, read_all, rewrite, same_bits
from laws.writer_laws import WriterLaws
from loraformat.containers import onnx_adapter
from loraformat.containers.onnx_adapter import CONTAINER, write_onnx_adapter
from loraformat.dtypes import BY_GGML, BY_NAME
from loraformat.errors import LoraformatError

CORPUS = Path(os.environ.get("LORAFORMAT_CORPUS", Path(__file__).parents[3] / "shared" / "corpus"))
REAL = CORPUS / "debian__onnxruntime-1.21.0"
VERSIONS = {"format_version": "1", "adapter_version": "3", "model_version": "7"}


def write(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> bytes:
    sink = io.BytesIO()
    tensors = [(name, BY_NAME[array.dtype.name], array.shape, array) for name, array in arrays.items()]
    write_onnx_adapter(sink, tensors, metadata or {})
    return sink.getvalue()


open_bytes = partial(container_laws.open_bytes, CONTAINER)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.onnx_adapter"


def example() -> dict[str, NDArray[Any]]:
    dice = np.random.default_rng(0)
    return {
        "model.layers.0.q_proj.lora_A.weight": dice.standard_normal((5, 3)).astype(np.float32),
        "model.layers.0.q_proj.lora_B.weight": dice.standard_normal((3, 4)).astype(np.float16),
        "none": np.zeros((0, 7), dtype=np.float32),
        "b": dice.standard_normal((2, 3, 1)).astype(ml_dtypes.bfloat16),
        "zero_point": np.arange(7, dtype=np.uint8),
    }


class TestOnnxAdapterLaws(ContainerLaws):
    container = CONTAINER
    mutations = 600

    def write_example(self, folder: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
        path = folder / "example.onnx_adapter"
        rewrite(path, write(example(), VERSIONS))
        return path, example()


class TestWritingOnnxAdapters(WriterLaws):
    container = CONTAINER
    forms = ("float32", "float16", "bfloat16", "float64", "int8", "uint8", "float8_e4m3fn")
    lacks = "bool"
    metadata = VERSIONS
    stated = VERSIONS


FORMS = (
    "float32",
    "float16",
    "float64",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "int64",
    "uint32",
    "uint64",
)


@given(
    parameters=st.dictionaries(
        st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=20),
        st.tuples(st.sampled_from(FORMS), st.lists(st.integers(0, 4), min_size=1, max_size=4)),
        max_size=5,
    ),
    seed=st.integers(0, 99),
)
def test_onnxruntime_reads_what_we_write_and_we_read_what_it_writes(
    parameters: dict[str, tuple[str, list[int]]], seed: int, tmp_path: Path
) -> None:
    dice = np.random.default_rng(seed)
    arrays = {name: np.array(dice.integers(0, 100, shape)).astype(form) for name, (form, shape) in parameters.items()}
    path = tmp_path / "a.onnx_adapter"
    data = write(arrays, VERSIONS)
    opened = open_bytes(path, data)
    assert opened.metadata == VERSIONS
    found = read_all(opened)
    assert list(found) == list(arrays)
    assert all(same_bits(found[name], array) for name, array in arrays.items())
    assert all(tensor.span.offset % 8 == 0 for tensor in opened.tensors.values())
    assert write(found, opened.metadata) == data

    theirs = onnxruntime.AdapterFormat.read_adapter(str(path))
    assert (theirs.get_format_version(), theirs.get_adapter_version(), theirs.get_model_version()) == (1, 3, 7)
    values = theirs.get_parameters()
    assert {name: (value.numpy().tolist(), value.shape()) for name, value in values.items()} == {
        name: (array.tolist(), list(array.shape)) for name, array in arrays.items()
    }

    again = onnxruntime.AdapterFormat()
    again.set_adapter_version(3)
    again.set_model_version(7)
    again.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()})
    path.unlink()
    again.export_adapter(str(path))
    reopened = CONTAINER.open(path)
    assert reopened.metadata == VERSIONS
    back = read_all(reopened)
    assert set(back) == set(arrays)
    assert all(same_bits(back[name], array) for name, array in arrays.items())


def test_a_session_runs_with_what_we_write(path: Path) -> None:
    """onnxruntime's own use of the file: inputs of a model, taken from an adapter."""
    import onnx
    from onnx import helper

    def value(name: str, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    nodes = [helper.make_node("MatMul", ["x", "A"], ["h"]), helper.make_node("MatMul", ["h", "B"], ["y"])]
    inputs = [value("x", [2, 5]), value("A", [5, "r"]), value("B", ["r", 4])]
    empty = [
        helper.make_tensor(name, onnx.TensorProto.FLOAT, shape, []) for name, shape in (("A", [5, 0]), ("B", [0, 4]))
    ]
    graph = helper.make_graph(nodes, "g", inputs, [value("y", [2, 4])], empty)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    dice = np.random.default_rng(1)
    x, a, b = (dice.standard_normal(shape).astype(np.float32) for shape in ((2, 5), (5, 3), (3, 4)))
    rewrite(path, write({"A": a, "B": b}))
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(path))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x}, options)[0], x @ a @ b, rtol=1e-5)


@pytest.mark.skipif(not REAL.exists(), reason="the corpus of real files is not beside the project")
def test_the_file_of_onnxruntimes_own_tests() -> None:
    opened = CONTAINER.open(next(REAL.rglob("*.onnx_adapter")))
    assert opened.metadata == dict.fromkeys(VERSIONS, "1")
    assert {name: tensor.read().tolist() for name, tensor in opened.tensors.items()} == {
        "lora_param_a": [[3.0], [4.0], [5.0], [6.0]],
        "lora_param_b": [[7.0, 8.0, 9.0, 10.0]],
    }


# The writer's layout: root offset, identifier, vtable at 8, root table at 20, vector of parameters at 40.
ONE = write({"abc": np.arange(6, dtype=np.float32).reshape(2, 3)})
TABLE = 48


def patch(at: int, value: int, form: str = "<I") -> bytes:
    data = bytearray(ONE)
    struct.pack_into(form, data, at, value)
    return bytes(data)


REFUSED = {
    "empty": (b"", "LF101"),
    "head only": (ONE[:8], "LF121"),
    "root outside": (patch(0, 10**6), "LF133"),
    "root of 2^32-1": (patch(0, 2**32 - 1), "LF133"),
    "root 0": (patch(0, 0), "LF133"),
    "vtable before the file": (patch(20, 1000, "<i"), "LF133"),
    "vtable behind the file": (patch(20, -1000, "<i"), "LF133"),
    "vtable of 2 bytes": (patch(8, 2, "<H"), "LF133"),
    "vtable of 65535 bytes": (patch(8, 65535, "<H"), "LF133"),
    "another version of the format": (patch(24, 2, "<i"), "LF131"),
    "vector outside": (patch(36, 10**6), "LF133"),
    "2^32-1 parameters": (patch(40, 2**32 - 1), "LF133"),
    "a parameter outside": (patch(44, 10**6), "LF133"),
    "a name outside": (patch(TABLE + 4, 10**6), "LF133"),
    "a name of 2^31 bytes": (patch(TABLE + 20, 2**31), "LF133"),
    "a name that is not UTF-8": (patch(TABLE + 24, 0xFF, "<B"), "LF103"),
    "a name with a control character": (patch(TABLE + 24, 0x1B, "<B"), "LF301"),
    "an empty name": (patch(TABLE + 20, 0), "LF301"),
    "2^31 dimensions": (patch(TABLE + 28, 2**31), "LF133"),
    "dimensions of -1": (patch(TABLE + 32, -1, "<q"), "LF108"),
    "dimensions of 2^62": (patch(TABLE + 32, 2**62, "<q"), "LF108"),
    "another shape": (patch(TABLE + 32, 3, "<q"), "LF108"),
    "text as numbers": (patch(TABLE + 12, 8), "LF106"),
    "data type 99": (patch(TABLE + 12, 99), "LF106"),
    "data type 0": (patch(TABLE + 12, 0), "LF106"),
    "data outside": (patch(TABLE + 16, 10**6), "LF133"),
    "one byte more": (patch(len(ONE) - 28, 25), "LF133"),
    "one byte less": (patch(len(ONE) - 28, 23), "LF108"),
    "a GGUF file": (b"GGUF" + ONE[4:4] + bytes(40), "LF111"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, path: Path) -> None:
    data, code = REFUSED[name]
    with pytest.raises(LoraformatError) as caught:
        open_bytes(path, data)
    assert caught.value.codes == (code,)
    assert str(path) in caught.value.problems[0].where


def point(data: bytes, at: int, place: int) -> bytes:
    """Return `data` with the offset at `at` leading to `place`."""
    changed = bytearray(data)
    struct.pack_into("<I", changed, at, place - at)
    return bytes(changed)


def test_two_names_and_two_owners_of_one_place(path: Path) -> None:
    first, second = (np.full((2, 3), value, np.float32) for value in (1, 2))
    two = write({"a": first, "b": second})
    tables = [44 + 4 * index + struct.unpack_from("<I", two, 44 + 4 * index)[0] for index in range(2)]
    twice = point(two, 48, tables[0])
    name_at, data_at = (tables[1] + field for field in (4, 16))
    same_name = point(two, tables[0] + 4, name_at + struct.unpack_from("<I", two, name_at)[0])
    same_data = point(two, tables[0] + 16, data_at + struct.unpack_from("<I", two, data_at)[0])
    for data, code in ((twice, "LF105"), (same_name, "LF105"), (same_data, "LF107")):
        with pytest.raises(LoraformatError) as caught:
            open_bytes(path, data)
        assert caught.value.codes == (code,)


def test_nine_dimensions_are_too_many(path: Path) -> None:
    with pytest.raises(LoraformatError) as caught:
        open_bytes(path, write({"a": np.zeros([1] * 9, np.float32)}))
    assert caught.value.codes == ("LF110",)


def test_fields_may_be_left_out(path: Path) -> None:
    """A vtable may be short or hold zeros: such a field has the value 0, and a vector is empty."""
    opened = open_bytes(path, write({}))
    assert dict(opened.tensors) == {}
    with pytest.raises(LoraformatError) as caught:
        open_bytes(path, patch(8, 4, "<H"))
    assert caught.value.codes == ("LF131",)


@pytest.mark.parametrize(
    "metadata",
    [
        {"format_version": "2"},
        {"format_version": "0"},
        {"adapter_version": "-1"},
        {"adapter_version": "1.5"},
        {"model_version": str(2**31)},
        {"note": "1"},
    ],
)
def test_what_the_file_has_no_place_for_is_not_written(metadata: dict[str, str]) -> None:
    with pytest.raises(LoraformatError) as caught:
        write({}, metadata)
    assert caught.value.codes == ("LF130",)


def test_tensors_that_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = ("q", BY_GGML[2], (32,), lambda: bytes(18))
    scalar = ("s", BY_NAME["float32"], (), np.zeros((), np.float32))
    for tensor in (quantised, scalar):
        with pytest.raises(LoraformatError) as caught:
            write_onnx_adapter(io.BytesIO(), [tensor], {})
        assert caught.value.codes == ("LF132",)
    monkeypatch.setattr(onnx_adapter, "MAX_FLATBUFFER_BYTES", 100)
    with pytest.raises(LoraformatError) as caught:
        write(example())
    assert caught.value.codes == ("LF110",)
