"""Our reader of numpy archives against numpy, and against files made to hurt."""

import io
import os
import re
import struct
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib import format as npy
from numpy.typing import NDArray

from laws import container_laws
from laws.container_laws import ContainerLaws, read_all, same_bits
from laws.writer_laws import WriterLaws
from loraformat import limits
from loraformat.containers._strided import StridedTensor
from loraformat.containers.npz import CONTAINER, describe_images, list_crc_fields, mend_crcs
from loraformat.errors import LoraformatError, RefusedError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "arrays.npz"


def pack(members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=method)
    return sink.getvalue()


def frame(header: str | bytes, data: bytes = bytes(24), version: tuple[int, int] = (1, 0)) -> bytes:
    raw = header if isinstance(header, bytes) else header.encode()
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version[0] == 1 else "<I", len(raw)) + raw + data


def header(descr: str = "'<f4'", order: str = "False", shape: str = "(2, 3)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


open_bytes = partial(container_laws.open_bytes, CONTAINER)
refusal = partial(container_laws.refuse_bytes, CONTAINER)


class TestNpzLaws(ContainerLaws):
    container = CONTAINER
    mutations = 600

    def write_example(self, folder: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
        path = folder / "example.npz"
        dice = np.random.default_rng(0)
        arrays: dict[str, NDArray[Any]] = {
            "scale": np.array(2.5),
            "model.q_proj.lora_A.weight": dice.standard_normal((3, 5)).astype(np.float32),
            "none/here": np.zeros((0, 7), dtype=np.float16),
            "Größe": np.arange(7, dtype=np.uint8),
        }
        path.unlink(missing_ok=True)
        np.savez(path, **arrays)
        return path, arrays


class TestWritingNpz(WriterLaws):
    container = CONTAINER
    forms = ("float64", "float32", "float16", "int64", "uint8", "bool", "complex64")
    lacks = "bfloat16"

    def test_numpy_reads_it(self, path: Path) -> None:
        path.write_bytes(self.write(self.examples()))
        with np.load(path) as theirs:
            assert list(theirs) == list(self.examples())
            assert all(same_bits(theirs[name], array) for name, array in self.examples().items())


FORMS = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "c8", "c16", "b1"]


@given(
    form=st.sampled_from(FORMS),
    shape=st.lists(st.integers(0, 4), max_size=4),
    fortran=st.booleans(),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    seed=st.integers(0, 99),
)
def test_what_numpy_writes_we_read(
    form: str, shape: list[int], fortran: bool, version: tuple[int, int], seed: int, tmp_path: Path
) -> None:
    dice = np.random.default_rng(seed)
    array = np.array(dice.integers(0, 2 if form == "b1" else 100, shape)).astype(form)
    array = array.copy(order="F" if fortran else "C")
    sink = io.BytesIO()
    npy.write_array(sink, array, version=version)
    opened = open_bytes(tmp_path / "a.npz", pack({"a.b.npy": sink.getvalue()}))
    found = opened.tensors["a.b"]
    assert same_bits(found.read(), array.copy(order="C"))
    if isinstance(found, StridedTensor):
        assert fortran
    else:
        stored = (tmp_path / "a.npz").read_bytes()[found.span.offset : found.span.end]
        assert stored == array.tobytes(order="C")


def test_fortran_order_is_read_but_has_no_span(path: Path) -> None:
    array = np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))
    np.savez(path, w=array, line=np.asfortranarray(np.ones((1, 5))))
    opened = CONTAINER.open(path)
    assert same_bits(opened.tensors["w"].read(), np.ascontiguousarray(array))
    with pytest.raises(LoraformatError) as caught:
        _ = opened.tensors["w"].span
    assert caught.value.codes == ("LF114",)
    assert opened.tensors["line"].span.length == 40


@pytest.mark.parametrize(
    "text",
    [
        header(),
        header() + " " * 40 + "\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,3)}",
        "{ 'shape' : ( 2 , 3 , ) , 'descr':'<f4','fortran_order':False }",
    ],
)
def test_headers_as_several_writers_have_them(path: Path, text: str) -> None:
    data = pack({"w.npy": frame(text, np.arange(6, dtype="<f4").tobytes())})
    assert open_bytes(path, data).tensors["w"].read().tolist() == [[0, 1, 2], [3, 4, 5]]
    with np.load(path) as theirs:
        assert theirs["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


class Trap:
    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


@pytest.mark.parametrize(
    ("array", "code", "words"),
    [
        (np.array([1, None]), "LF901", "pickle"),
        (np.array([Trap()]), "LF901", "pickle"),
        (np.array([(1, None)], dtype=[("a", "i4"), ("b", "O")]), "LF109", ""),
        (np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), "LF109", ""),
        (np.ones(3, ">f4"), "LF112", "newbyteorder"),
        (np.ones(3, ">i8"), "LF112", "newbyteorder"),
        (np.ones(3, ml_dtypes.bfloat16), "LF106", "bfloat16"),
        (np.ones(3, ml_dtypes.float8_e4m3fn), "LF106", ""),
        (np.array(["text"]), "LF106", ""),
        (np.array([b"text"]), "LF106", ""),
        (np.array(["2020-01-01"], "M8[D]"), "LF106", ""),
        (np.ones(2, np.longdouble), "LF106", ""),
        (np.ones(2, "V7"), "LF106", ""),
    ],
)
def test_number_forms_that_are_not_read(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: Any, code: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(path, a=np.ones(2), w=array)
    data = path.read_bytes()
    error = refusal(path, data)
    assert error.codes == (code,)
    assert words in str(error)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("member", "code"),
    [
        (b"", "LF109"),
        (b"\x93NUMPY\x01\x00", "LF109"),
        (b"\x93NUMPZ" + frame(header())[6:], "LF109"),
        (frame(header(), version=(4, 0)), "LF109"),
        (frame(header(), version=(1, 1)), "LF109"),
        (frame(header(), version=(0, 0)), "LF109"),
        (frame(header())[:30], "LF102"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(50), "LF102"),
        (frame(header() + " " * limits.MAX_NPY_HEADER_BYTES), "LF102"),
        (frame(header(), bytes(23)), "LF108"),
        (frame(header(), bytes(25)), "LF108"),
        (frame(header(), b""), "LF108"),
        (frame(header(shape="(0, 99999999999999)"), b"x"), "LF108"),
        (frame(header(shape="(4294967296, 4294967296)")), "LF108"),
        (frame(header(shape="(9999999999999999999,)")), "LF108"),
        (frame(header(shape="(1, 1, 1, 1, 1, 1, 1, 1, 6)")), "LF110"),
        (frame(header(shape="(2)")), "LF109"),
        (frame(header(shape="(-2, -3)")), "LF109"),
        (frame(header(shape="(2.0, 3)")), "LF109"),
        (frame(header(shape="(02, 3)")), "LF109"),
        (frame(header(shape="(,)")), "LF109"),
        (frame(header(shape="(2 3)")), "LF109"),
        (frame(header(shape="[2, 3]")), "LF109"),
        (frame(header(shape="(" + "9" * 5000 + ",)")), "LF109"),
        (frame(header(order="1")), "LF109"),
        (frame(header(order="'False'")), "LF109"),
        (frame(header(descr="'='")), "LF106"),
        (frame(header(descr="'=f4'")), "LF106"),
        (frame(header(descr="'f4'")), "LF106"),
        (frame(header(descr="''")), "LF106"),
        (frame(header(descr="__import__('os').system('true')")), "LF109"),
        (frame(header(descr="('<f4', (2,))")), "LF109"),
        (frame("(" * 5000), "LF109"),
        (frame("{" + "-" * 9000 + "1}"), "LF109"),
        (frame("{'descr': '<f4'," + " " * 9000), "LF109"),
        (frame(" " * 9000), "LF109"),
        (frame("{'shape': (" + "1," * 4000), "LF109"),
        (frame("{'shape': (" + "1 " * 4000), "LF109"),
        (frame("'shape':" * 1000), "LF109"),
        (frame("{}"), "LF109"),
        (frame(header()[:-2] + ", 'x': 1}"), "LF109"),
        (frame("{'descr': '<f4', 'descr': '<f4', 'shape': (2, 3)}"), "LF109"),
        (frame("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), 'shape': (2, 3)}"), "LF109"),
        (frame("{'descr': '<f4', 'fortran_order': False}"), "LF109"),
        (frame(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), '\xff\xfe': 1}"), "LF109"),
    ],
)
def test_damaged_headers(path: Path, member: bytes, code: str) -> None:
    error = refusal(path, pack({"good.npy": frame(header()), "w.npy": member}))
    assert error.codes == (code,)
    assert "w.npy" in error.problems[0].where


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("w", "LF111"),
        ("w.npy.txt", "LF111"),
        (".npy", "LF301"),
        ("a\u202eb.npy", "LF301"),
        ("../w.npy", "LF902"),
        ("/w.npy", "LF902"),
        ("a\\w.npy", "LF902"),
        ("a\x1b[2J.npy", "LF902"),
        ("n" * 5000 + ".npy", "LF902"),
    ],
)
def test_names_that_are_not_taken(path: Path, name: str, code: str) -> None:
    assert refusal(path, pack({name: frame(header())})).codes == (code,)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for _ in range(2):
            archive.writestr("w.npy", frame(header()))
    assert refusal(path, path.read_bytes()).codes == ("LF902",)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_refused_with_the_command(path: Path, method: int) -> None:
    bomb = frame(header(shape="(25000000,)"), bytes(10**8)) if method == zipfile.ZIP_DEFLATED else frame(header())
    error = refusal(path, pack({"w.npy": bomb}, method))
    assert isinstance(error, RefusedError)
    assert error.codes == ("LF902",)
    assert "numpy.savez(" in error.problems[0].advice


def test_savez_compressed_and_the_command(path: Path, tmp_path: Path) -> None:
    np.savez_compressed(path, **{"a.b": np.ones((2, 3)), "c": np.zeros(4)})
    advice = refusal(path, path.read_bytes()).problems[0].advice
    found = re.search(r'python -c "(.*)" OLD NEW', advice)
    assert found is not None
    program = compile(found[1].removeprefix("import sys, numpy; "), "advice", "exec")
    exec(program, {"numpy": np, "sys": type("sys", (), {"argv": ["", str(path), str(tmp_path / "new.npz")]})})
    assert read_all(CONTAINER.open(tmp_path / "new.npz")).keys() == {"a.b", "c"}


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "LF101"),
        (pack({"w.npy": frame(header())})[:-1], "LF101"),
        (b"PK\x03\x04" + bytes(50), "LF101"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "LF111"),
        (b"\x93NUMPY\x01\x00", "LF111"),
        (b"\x80\x04N.", "LF111"),
    ],
)
def test_files_that_are_something_else(path: Path, data: bytes, code: str) -> None:
    assert refusal(path, data).codes == (code,)


def test_what_is_sniffed() -> None:
    def sniff(name: str) -> bool:
        data = pack({name: frame(header())})
        return CONTAINER.sniff(data[:64], len(data))

    assert sniff("w.npy")
    assert sniff("model.layers.0.self_attn.q_proj.lora_A.weight.npy")
    assert not sniff("archive/data.pkl")
    assert not sniff("word/document.xml")
    assert not CONTAINER.sniff(b"PK\x03\x04", 4)


def test_a_copy_can_be_rewritten_and_mended(path: Path, tmp_path: Path) -> None:
    """numpy checks the CRC, so a copy that is not mended cannot be loaded."""
    np.savez(path, a=np.zeros((2, 3)), b=np.ones(4))
    opened = CONTAINER.open(path)
    (image,) = describe_images(opened, tmp_path / "out.npz")
    span = opened.tensors["a"].span
    data = bytearray(path.read_bytes())
    place = image.locate(span)
    assert place is not None
    data[place : place + span.length] = np.full((2, 3), 7.0).tobytes()
    image.path.write_bytes(data)
    with np.load(image.path) as theirs, pytest.raises(zipfile.BadZipFile, match="CRC"):
        theirs["a"]
    fields = {held: places for held, places in list_crc_fields(opened).items() if held.offset <= span.offset < held.end}
    assert len(fields) == 1
    descriptor = os.open(image.path, os.O_RDWR)
    mend_crcs(descriptor, fields)
    os.close(descriptor)
    with np.load(image.path) as theirs:
        assert theirs["a"].tolist() == [[7.0] * 3] * 2
        assert theirs["b"].tolist() == [1.0] * 4


GOOD = pack({"a.npy": frame(header()), "b.npy": frame(header("'<i8'", "True", "(3, 1)"))})


@given(
    damage=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.one_of(st.none(), st.integers(0, len(GOOD))),
    grown=st.binary(max_size=30),
)
def test_any_damage_is_read_or_refused(
    damage: list[tuple[int, int]], cut: int | None, grown: bytes, tmp_path: Path
) -> None:
    data = bytearray(GOOD)
    for place, value in damage:
        data[place] = value
    try:
        opened = open_bytes(tmp_path / "damaged.npz", bytes(data[:cut] + grown))
    except LoraformatError as error:
        str(error)
        return
    read_all(opened)


PIECES = st.sampled_from(
    [
        "{",
        "}",
        "'descr'",
        ":",
        "'<f4'",
        "'|b1'",
        ",",
        "'fortran_order'",
        "False",
        "True",
        "'shape'",
        "(2, 3)",
        "()",
        "(24,)",
        " ",
    ]
)


@given(
    pieces=st.lists(PIECES, max_size=16),
    shuffled=st.permutations(range(3)),
    tail=st.sampled_from(["", ",", ", }", "\n"]),
)
def test_headers_that_are_taken_are_read_as_numpy_reads_them(
    pieces: list[str], shuffled: list[int], tail: str, tmp_path: Path
) -> None:
    entries = ["'descr': '<f4'", "'fortran_order': False", "'shape': (2, 3)"]
    for text in ("".join(pieces), "{" + ", ".join(entries[place] for place in shuffled) + tail + "}"):
        path = tmp_path / "header.npz"
        try:
            found = open_bytes(path, pack({"w.npy": frame(text)})).tensors["w"]
        except LoraformatError:
            continue
        with np.load(path) as theirs:
            assert same_bits(found.read(), theirs["w"])
