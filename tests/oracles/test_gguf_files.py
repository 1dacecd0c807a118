"""Our reader and writer of GGUF against the gguf package, both ways."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from laws.container_laws import same_bits
from loraformat.containers.gguf import CONTAINER, write_gguf
from loraformat.dtypes import BY_GGML, BY_NAME, BlockDtype

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
pytestmark = pytest.mark.oracle

ARRAYS = {
    "blk.0.attn_q.weight.lora_a": np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32),
    "blk.0.attn_q.weight.lora_b": np.random.default_rng(1).standard_normal((7, 3)).astype(np.float16),
    "blk.0.ffn_up_exps.weight.lora_a": np.random.default_rng(2).standard_normal((2, 3, 5)).astype(np.float64),
    "ids": np.arange(7, dtype=np.int32),
}
FACTS: dict[str, tuple[str, Any, str]] = {
    "adapter.type": ("add_string", "lora", '"lora"'),
    "adapter.lora.alpha": ("add_float32", 16.0, "16.0"),
    "some.float32": ("add_float32", 0.1, "0.1"),
    "some.float64": ("add_float64", 0.1, '{"float64": 0.1}'),
    "some.bool": ("add_bool", True, "true"),
    "some.uint8": ("add_uint8", 200, '{"uint8": 200}'),
    "some.int8": ("add_int8", -3, '{"int8": -3}'),
    "some.uint16": ("add_uint16", 7, '{"uint16": 7}'),
    "some.int16": ("add_int16", -7, '{"int16": -7}'),
    "some.uint32": ("add_uint32", 2**32 - 1, "4294967295"),
    "some.int32": ("add_int32", 7, '{"int32": 7}'),
    "some.uint64": ("add_uint64", 2**63, '{"uint64": 9223372036854775808}'),
    "some.int64": ("add_int64", -1, '{"int64": -1}'),
    "some.ints": ("add_array", [1, -2, 3], "[1, -2, 3]"),
    "some.texts": ("add_array", ["a", "Größe"], '["a", "Größe"]'),
    "some.floats": ("add_array", [0.5, 2.0], "[0.5, 2.0]"),
    "many.texts": ("add_array", [str(index) for index in range(3000)], '{"array": "string", "count": 3000}'),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter.gguf"


def write_theirs(path: Path, fill: Callable[[Any], None]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_all(writer: Any) -> None:
    for key, (method, value, _) in FACTS.items():
        getattr(writer, method)(key, value)
    for name, array in ARRAYS.items():
        writer.add_tensor(name, array)


def test_we_read_what_it_writes(path: Path) -> None:
    write_theirs(path, add_all)
    opened = CONTAINER.open(path)
    assert dict(opened.metadata) == {"general.architecture": '"llama"'} | {
        key: text for key, (*_, text) in FACTS.items()
    }
    assert set(opened.tensors) == set(ARRAYS)
    assert all(same_bits(opened.tensors[name].read(), array) for name, array in ARRAYS.items())


def test_it_reads_what_we_write(path: Path) -> None:
    facts = {key: text for key, (*_, text) in FACTS.items() if not key.startswith("many")}
    values = {key: json.loads(text) for key, text in facts.items()}
    brain = ARRAYS["blk.0.attn_q.weight.lora_a"].astype(ml_dtypes.bfloat16)
    arrays = ARRAYS | {"brain": brain}
    with path.open("wb") as sink:
        write_gguf(sink, [(n, BY_NAME[a.dtype.name], a.shape, a) for n, a in arrays.items()], values)
    reader = gguf.GGUFReader(path)
    for key in facts:
        assert reader.fields[key].contents() == pytest.approx(FACTS[key][1]), key
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert set(found) == set(arrays)
    for name, array in ARRAYS.items():
        assert same_bits(np.array(found[name].data), array), name
        assert found[name].data_offset % 32 == 0
    assert found["brain"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert np.array(found["brain"].data).tobytes() == brain.tobytes()


def test_block_sizes_are_the_packages_own() -> None:
    theirs = {int(kind): (kind.name.lower(), *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    blocks = {n: (d.name, d.block_elements, d.block_bytes) for n, d in BY_GGML.items() if isinstance(d, BlockDtype)}
    assert blocks == {number: facts for number, facts in theirs.items() if number in blocks}
    plain = set(theirs) - set(blocks)
    assert {theirs[number] for number in plain} == {
        (gguf.GGMLQuantizationType(n).name.lower(), 1, BY_GGML[n].bits // 8) for n in plain
    }


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K"])
def test_quantised_tensors_of_the_package_lie_where_we_say(path: Path, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    weights = np.random.default_rng(3).standard_normal((5, 512)).astype(np.float32)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        data = gguf.quantize(weights, kind)
    except NotImplementedError:  # The package reads the k-quants, and only ggml writes them.
        data = np.random.default_rng(4).integers(0, 256, (5, 512 // elements * size), dtype=np.uint8)

    def fill(writer: Any) -> None:
        writer.add_tensor("q", data, raw_dtype=kind)
        writer.add_tensor("after", weights[:, :3])

    write_theirs(path, fill)
    opened = CONTAINER.open(path)
    assert opened.tensors["q"].shape == (5, 512)
    assert opened.tensors["q"].dtype.name == name.lower()
    span = opened.tensors["q"].span
    assert path.read_bytes()[span.offset : span.end] == data.tobytes()
    assert same_bits(opened.tensors["after"].read(), np.ascontiguousarray(weights[:, :3]))
