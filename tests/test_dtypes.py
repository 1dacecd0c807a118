import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import pytest
import safetensors

from loraformat.dtypes import BY_NAME, BY_ONNX, BY_SAFETENSORS, Dtype

# ONNX's names where they are not numpy's, written out from onnx.proto.
ONNX_NAMES = {
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "float8_e4m3fn": "FLOAT8E4M3FN",
    "float8_e4m3fnuz": "FLOAT8E4M3FNUZ",
    "float8_e5m2": "FLOAT8E5M2",
    "float8_e5m2fnuz": "FLOAT8E5M2FNUZ",
    "float8_e8m0fnu": "FLOAT8E8M0",
    "float4_e2m1fn": "FLOAT4E2M1",
    "float6_e2m3fn": "FLOAT6E2M3",
    "float6_e3m2fn": "FLOAT6E3M2",
}
IN_ARRAYS = [dtype for dtype in BY_NAME.values() if dtype.family != "string"]


def test_no_name_stands_twice() -> None:
    everything = BY_NAME.values()
    assert len(BY_SAFETENSORS) == sum(dtype.safetensors is not None for dtype in everything)
    assert len(BY_ONNX) == sum(dtype.onnx is not None for dtype in everything)
    assert all(BY_NAME[name].name == name for name in BY_NAME)


def test_the_numbers_are_those_of_onnx() -> None:
    known = dict(onnx.TensorProto.DataType.items())
    ours = {ONNX_NAMES.get(dtype.name, dtype.name.upper()): number for number, dtype in BY_ONNX.items()}
    shared = known.keys() & ours.keys()
    assert {name: ours[name] for name in shared} == {name: known[name] for name in shared}
    assert known.keys() - ours.keys() == {"UNDEFINED"}


@pytest.mark.parametrize("name", BY_SAFETENSORS)
def test_the_sizes_are_those_of_safetensors(name: str) -> None:
    header = f'{{"a":{{"dtype":"{name}","shape":[3,8],"data_offsets":[0,%d]}}}}'
    right = BY_SAFETENSORS[name].count_bytes(24)
    for size in (right, right + 1):
        text = (header % size).encode()
        data = len(text).to_bytes(8, "little") + text + bytes(size)
        if size == right:
            assert safetensors.deserialize(data)[0][1]["dtype"] == name
        else:
            with pytest.raises(safetensors.SafetensorError):
                safetensors.deserialize(data)


@pytest.mark.parametrize("dtype", IN_ARRAYS, ids=lambda dtype: dtype.name)
def test_arrays_have_the_named_form(dtype: Dtype) -> None:
    form = dtype.numpy()
    assert form.name == dtype.name
    assert form.itemsize == max(1, dtype.bits // 8)
    assert form.newbyteorder("<") == form
    assert dtype.numpy() is form
    kinds = {"float": "f", "int": "i", "uint": "u", "bool": "b", "complex": "c"}
    if hasattr(np, dtype.name):
        assert form.kind == kinds[dtype.family]
    elif dtype.family == "float":
        assert ml_dtypes.finfo(form).bits == dtype.bits


@pytest.mark.parametrize(
    ("name", "elements", "size"),
    [
        ("float32", 0, 0),
        ("float32", 7, 28),
        ("complex128", 3, 48),
        ("bool", 9, 9),
        ("int4", 1, 1),
        ("int4", 2, 1),
        ("int4", 3, 2),
        ("uint2", 5, 2),
        ("float6_e2m3fn", 4, 3),
        ("float6_e2m3fn", 5, 4),
        ("float64", 2**70, 2**73),
    ],
)
def test_bytes_are_counted_exactly(name: str, elements: int, size: int) -> None:
    assert BY_NAME[name].count_bytes(elements) == size


def test_naming_a_form_does_not_load_numpy() -> None:
    program = "import sys, loraformat.dtypes; sys.exit('numpy' in sys.modules or 'ml_dtypes' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
