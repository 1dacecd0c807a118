"""Sinks: a file that is written, one that is patched, one that is compared, and memory."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import loraformat
from loraformat.engine.sinks import CompareSink, Difference, FileSink, MemorySink, PatchSink
from loraformat.images import Copy
from loraformat.spans import InputFile


@pytest.fixture
def source(tmp_path: Path) -> InputFile:
    path = tmp_path / "source"
    path.write_bytes(bytes(range(100)))
    return InputFile(path)


def descriptor_of(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT)


@pytest.mark.parametrize("before", [0, 30, 500])
def test_a_file_has_its_length_at_once_and_takes_bytes_in_any_order(
    tmp_path: Path, source: InputFile, before: int
) -> None:
    """Also where a killed run has left a part of another length."""
    path = tmp_path / "out"
    path.write_bytes(b"x" * before)
    sink = FileSink(descriptor_of(path), path)
    sink.reserve(60)
    assert path.stat().st_size == 60
    sink.write(memoryview(b"tail"), 56)
    sink.copy(Copy(source, 10, 40), 4)
    sink.write(b"head", 0)
    sink.write(b"mid-part.!.!", 44)
    os.close(sink.descriptor)
    assert path.read_bytes() == b"head" + bytes(range(10, 50)) + b"mid-part.!.!" + b"tail"


def test_what_the_system_refuses_names_the_output(tmp_path: Path, source: InputFile) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"")
    sink = FileSink(os.open(path, os.O_RDONLY), tmp_path / "final")
    for act in (
        lambda: sink.write(b"x", 0),
        lambda: sink.copy(Copy(source, 0, 4), 0),
        lambda: PatchSink(sink.descriptor, tmp_path / "final").write(b"x", 0),
    ):
        with pytest.raises(loraformat.OutputError) as caught:
            act()
        assert caught.value.codes == ("LF605",)
        assert caught.value.problems[0].where == str(tmp_path / "final")
    os.close(sink.descriptor)
    assert path.read_bytes() == b""


def test_a_patched_file_takes_only_what_changes(tmp_path: Path, source: InputFile) -> None:
    path = tmp_path / "own"
    path.write_bytes(b"0123456789")
    sink = PatchSink(descriptor_of(path), path)
    sink.reserve(4000)
    sink.copy(Copy(source, 0, 10), 0)
    sink.write(b"ab", 4)
    os.close(sink.descriptor)
    assert path.read_bytes() == b"0123ab6789"


def compare(path: Path, found: bytes) -> CompareSink:
    path.write_bytes(found)
    return CompareSink(InputFile(path))


def test_what_is_equal_is_not_noted(tmp_path: Path, source: InputFile) -> None:
    sink = compare(tmp_path / "found", bytes(range(100)))
    sink.reserve(100)
    sink.copy(Copy(source, 0, 60), 0)
    sink.write(bytes(range(60, 100)), 60)
    sink.write(b"", 100)
    assert sink.differences == []


@pytest.mark.parametrize(("length", "noted"), [(7, Difference(7, 3)), (12, Difference(10, 2))])
def test_another_length_is_noted_once(tmp_path: Path, length: int, noted: Difference) -> None:
    sink = compare(tmp_path / "found", b"0123456789")
    sink.reserve(length)
    sink.write(b"0123456789ab"[:length], 0)
    assert sink.differences == [noted]


@given(data=st.data())
def test_runs_of_differing_bytes_are_noted(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    expected = data.draw(st.binary(min_size=1, max_size=60))
    changed = data.draw(st.sets(st.integers(0, len(expected) - 1)))
    found = bytes(byte ^ (index in changed) for index, byte in enumerate(expected))
    sink = compare(tmp_path_factory.getbasetemp() / "compared", found)
    sink.write(expected, 0)
    noted = [set(range(each.offset, each.offset + each.length)) for each in sink.differences]
    assert set().union(*noted) == changed
    assert sum(map(len, noted)) == len(changed)
    firsts = {index for index in changed if index - 1 not in changed}
    assert {each.offset for each in sink.differences} == firsts


def test_differences_beyond_counting_are_one(tmp_path: Path) -> None:
    """Every other byte of 5000 differs; the last note reaches to the last of them."""
    sink = compare(tmp_path / "found", bytes(5000))
    sink.write(b"\0\1" * 2500, 0)
    assert len(sink.differences) == 1000
    last = sink.differences[-1]
    assert (last.offset, last.offset + last.length) == (1999, 5000)


def test_a_difference_beyond_the_first_step_has_its_own_offset(tmp_path: Path) -> None:
    data = bytearray(3 << 20)
    data[(2 << 20) + 5] = 1
    sink = compare(tmp_path / "found", bytes(data))
    sink.write(bytes(len(data)), 0)
    assert sink.differences == [Difference((2 << 20) + 5, 1)]
    blank = tmp_path / "blank"
    blank.write_bytes(bytes(len(data)))
    copied = CompareSink(InputFile(tmp_path / "found"))
    copied.copy(Copy(InputFile(blank), 0, len(data)), 0)
    assert copied.differences == sink.differences


def test_memory_takes_bytes_in_any_order_into_the_buffer_that_they_fall_in(source: InputFile) -> None:
    buffers = [np.zeros(length, np.uint8) for length in (5, 1, 6)]
    sink = MemorySink(buffers)
    sink.reserve(12)
    sink.copy(Copy(source, 40, 4), 8)
    sink.write(b"abcde", 0)
    sink.write(memoryview(np.array([0x6867], "<u2")), 6)
    sink.write(b"f", 5)
    assert b"".join(buffer.tobytes() for buffer in buffers) == b"abcdefgh" + bytes(range(40, 44))
