"""What every container keeps. A container's test class inherits `ContainerLaws` and gives the container and an example.

The class has no `Test` prefix, so that it is collected only where it is inherited.
"""

import os
import random
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loraformat.arrays import HeldFile
from loraformat.containers import CONTAINERS, Container, TensorFile
from loraformat.containers._strided import StridedTensor
from loraformat.errors import LoraformatError

STRANGERS = {
    "empty": b"",
    "one byte": b"{",
    "text": b"Dear reader, this file holds no tensors at all, only these words and a full stop.",
    "html": b"<!DOCTYPE html><html><head><title>404</title></head></html>",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
    "zeros": bytes(100),
    "ones": b"\xff" * 100,
}
"""Files that belong to no container."""
EXTREMES = (0, 1, 2**7, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
"""Counts, sizes and offsets that arithmetic has been known to overflow at."""


def rewrite(path: Path, data: bytes) -> None:
    """Make a new file of this name. Some file systems are ten times slower at emptying an old one."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def open_bytes(container: Container, path: Path, data: bytes) -> TensorFile:
    """Return the index of a file of these bytes."""
    rewrite(path, data)
    return container.open(path)


def refuse_bytes(container: Container, path: Path, data: bytes) -> LoraformatError:
    """Return the error with which a file of these bytes, which it names, is refused."""
    with pytest.raises(LoraformatError) as caught:
        open_bytes(container, path, data)
    assert str(path) in caught.value.problems[0].where
    assert str(caught.value)
    return caught.value


def same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Say whether two arrays are equal to the bit, in shape and in number form."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


class ContainerLaws:
    """The laws; `mutations` says how many damaged copies are tried."""

    container: Container
    mutations = 300

    @abstractmethod
    def write_example(self, folder: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
        """Write a valid file into `folder`; return its path and the tensors that it holds, in the order of the file."""

    @pytest.fixture
    def example(self, tmp_path: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
        return self.write_example(tmp_path)

    def test_its_room_finds_it(self) -> None:
        assert any(member is self.container for _, member in CONTAINERS)

    def test_suffixes_are_lower_case_with_the_dot(self) -> None:
        assert self.container.suffixes
        assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in self.container.suffixes)

    def test_its_example_uses_a_usual_suffix(self, example: tuple[Path, Any]) -> None:
        assert example[0].name.endswith(self.container.suffixes)

    def test_it_knows_its_own_by_content(self, example: tuple[Path, Any]) -> None:
        data = example[0].read_bytes()
        assert self.container.sniff(data[:64], len(data))

    @pytest.mark.parametrize("kind", STRANGERS)
    def test_it_does_not_claim_strangers(self, kind: str) -> None:
        assert not self.container.sniff(STRANGERS[kind][:64], len(STRANGERS[kind]))

    @pytest.mark.parametrize("kind", STRANGERS)
    def test_it_refuses_to_open_strangers(self, kind: str, tmp_path: Path) -> None:
        path = tmp_path / f"stranger{self.container.suffixes[0]}"
        path.write_bytes(STRANGERS[kind])
        with pytest.raises(LoraformatError) as caught:
            self.container.open(path)
        assert str(path) in caught.value.problems[0].where

    def test_names_shapes_and_numbers_are_those_of_the_file(
        self, example: tuple[Path, dict[str, NDArray[Any]]]
    ) -> None:
        path, expected = example
        opened = self.container.open(path)
        assert list(opened.tensors) == list(expected)
        for name, tensor in opened.tensors.items():
            assert tensor.name == name
            assert tensor.elements == expected[name].size
            assert same_bits(tensor.read(), expected[name]), name

    def test_spans_lie_inside_their_files(self, example: tuple[Path, Any]) -> None:
        for tensor in self.container.open(example[0]).tensors.values():
            assert tensor.span.path == tensor.file.path
            assert tensor.span.length == tensor.dtype.count_bytes(tensor.elements)
            assert 0 <= tensor.span.offset <= tensor.span.end <= tensor.file.size_bytes

    def test_a_span_holds_the_bytes_of_the_tensor(self, example: tuple[Path, dict[str, NDArray[Any]]]) -> None:
        path, expected = example
        for name, tensor in self.container.open(path).tensors.items():
            stored = tensor.span.path.read_bytes()[tensor.span.offset : tensor.span.end]
            assert stored == expected[name].tobytes(), name

    def test_opening_twice_gives_one_index(self, example: tuple[Path, Any]) -> None:
        def index(opened: TensorFile) -> Any:
            return [(t.name, t.dtype, t.shape, t.span) for t in opened.tensors.values()], dict(opened.metadata)

        assert index(self.container.open(example[0])) == index(self.container.open(example[0]))

    def test_bytes_in_memory_are_as_good_as_a_file(self, example: tuple[Path, dict[str, NDArray[Any]]]) -> None:
        path, expected = example
        tensors = self.container.open(HeldFile(path, path.read_bytes())).tensors
        assert list(tensors) == list(self.container.open(path).tensors)
        assert all(same_bits(tensors[name].read(), array) for name, array in expected.items())

    def test_the_suffix_does_not_matter(self, example: tuple[Path, Any]) -> None:
        path, expected = example
        renamed = path.rename(path.with_name("model.bin"))
        assert list(self.container.open(renamed).tensors) == list(expected)

    def test_opening_leaves_the_file_as_it_was(self, example: tuple[Path, Any]) -> None:
        before = example[0].read_bytes(), example[0].stat().st_mtime_ns
        self.container.open(example[0])
        assert (example[0].read_bytes(), example[0].stat().st_mtime_ns) == before

    def test_a_refused_file_is_closed_again(self, tmp_path: Path) -> None:
        path = tmp_path / "text"
        path.write_bytes(STRANGERS["text"])
        before = set(os.listdir("/dev/fd"))
        with pytest.raises(LoraformatError) as caught:
            self.container.open(path)
        assert not set(os.listdir("/dev/fd")) - before, caught

    def test_a_missing_file_is_said_to_be_missing(self, tmp_path: Path) -> None:
        with pytest.raises(LoraformatError) as caught:
            self.container.open(tmp_path / "absent")
        assert caught.value.codes == ("LF100",)

    def test_a_folder_and_a_pipe_are_not_read(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path, tmp_path / "pipe"):
            with pytest.raises(LoraformatError) as caught:
                self.container.open(path)
            assert caught.value.codes == ("LF905",)

    def test_a_file_cut_off_later_gives_an_error_and_no_numbers(self, example: tuple[Path, Any]) -> None:
        opened = self.container.open(example[0])
        inside = [t for t in opened.tensors.values() if t.span.length and t.file.path == opened.file.path]
        if not inside:
            pytest.skip("the example keeps its numbers in other files")
        last = max(inside, key=lambda tensor: tensor.span.end)
        os.truncate(example[0], last.span.end - 1)
        with pytest.raises(LoraformatError) as caught:
            last.read()
        assert caught.value.codes == ("LF906",)

    def test_every_shorter_file_is_an_index_or_an_error(self, example: tuple[Path, Any], tmp_path: Path) -> None:
        data = example[0].read_bytes()
        for length in sorted(random.Random(0).sample(range(len(data)), min(len(data), self.mutations))):
            self._open_or_refuse(example[0], data[:length])

    def test_every_damaged_file_is_an_index_or_an_error(self, example: tuple[Path, Any], tmp_path: Path) -> None:
        data = example[0].read_bytes()
        dice = random.Random(1)
        for _ in range(self.mutations):
            damaged = bytearray(data)
            for _ in range(dice.choice((1, 1, 2, 8))):
                damaged[dice.randrange(len(data))] = dice.randrange(256)
            self._open_or_refuse(example[0], bytes(damaged))

    def test_every_file_with_other_parts_is_an_index_or_an_error(self, example: tuple[Path, Any]) -> None:
        data = example[0].read_bytes()
        dice = random.Random(2)
        for _ in range(self.mutations // 2):
            start = dice.randrange(min(len(data), dice.choice((64, 512, len(data)))))
            stop = start + dice.choice((1, 4, 8, 30, 100))
            others = (
                data[start:stop] * dice.choice((2, 3, 50)),
                b"",
                bytes(dice.randrange(1, 40)),
                dice.choice(EXTREMES).to_bytes(8, "little")[: dice.choice((2, 4, 8))],
            )
            self._open_or_refuse(example[0], data[:start] + dice.choice(others) + data[stop:])

    def _open_or_refuse(self, path: Path, data: bytes) -> None:
        """Read what there is; a changed order or stride may leave a sound tensor without a span."""
        rewrite(path, data)
        try:
            opened = self.container.open(path)
        except LoraformatError:
            return
        for tensor in opened.tensors.values():
            if not isinstance(tensor, StridedTensor):
                assert tensor.span.end <= tensor.file.size_bytes
            if tensor.dtype.bits >= 8:
                assert tensor.read().shape == tensor.shape


def read_all(opened: TensorFile) -> dict[str, NDArray[Any]]:
    """Return every tensor of a file."""
    return {name: np.asarray(tensor.read()) for name, tensor in opened.tensors.items()}
