"""What every container that can be written keeps, beside `ContainerLaws`.

The class has no `Test` prefix, so that it is collected only where it is inherited.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from laws.container_laws import read_all, same_bits
from loraformat.containers import WritableContainer
from loraformat.dtypes import BY_NAME
from loraformat.errors import LoraformatError


class WriterLaws:
    """The laws.

    Attributes:
        container: the container.
        forms: number forms that it holds.
        lacks: one that it does not hold.
        metadata: what it has a place for, as written.
        stated: the same, as read.
    """

    container: WritableContainer
    forms: tuple[str, ...] = ("float32", "float16")
    lacks: str = "float4_e2m1fn"
    metadata: ClassVar[Mapping[str, Any]] = {}
    stated: ClassVar[Mapping[str, str]] = {}

    def write(self, arrays: Mapping[str, NDArray[Any]]) -> bytes:
        sink = io.BytesIO()
        tensors = [(name, BY_NAME[array.dtype.name], array.shape, array) for name, array in arrays.items()]
        self.container.write(sink, tensors, self.metadata)
        return sink.getvalue()

    def examples(self) -> dict[str, NDArray[Any]]:
        dice = np.random.default_rng(0)
        shapes = [(3, 5), (4, 3), (0, 7), (7,), (2, 3, 5), (1, 1)]
        arrays = {f"model.{form}": dice.standard_normal((5, 2)).astype(BY_NAME[form].numpy()) for form in self.forms}
        return arrays | {
            f"a.{index}.ß": dice.standard_normal(shape).astype(np.float32) for index, shape in enumerate(shapes)
        }

    def test_it_is_a_writable_container(self) -> None:
        assert isinstance(self.container, WritableContainer)

    def test_it_reads_what_it_writes(self, tmp_path: Path) -> None:
        path = tmp_path / f"new{self.container.suffixes[0]}"
        path.write_bytes(self.write(self.examples()))
        opened = self.container.open(path)
        assert dict(opened.metadata) == dict(self.stated)
        found, expected = read_all(opened), self.examples()
        assert set(found) == set(expected)
        assert all(same_bits(found[name], array) for name, array in expected.items())

    def test_the_same_tensors_give_the_same_bytes(self) -> None:
        assert self.write(self.examples()) == self.write(self.examples())

    def test_it_writes_to_a_descriptor_as_to_a_file(self, tmp_path: Path) -> None:
        tensors = [(name, BY_NAME[each.dtype.name], each.shape, each) for name, each in self.examples().items()]
        with (tmp_path / "new").open("wb") as sink:
            self.container.write(sink.fileno(), tensors, self.metadata)
        assert (tmp_path / "new").read_bytes() == self.write(self.examples())

    def test_payloads_are_made_when_they_are_due(self) -> None:
        made: list[str] = []

        def make(name: str, array: NDArray[Any]) -> NDArray[Any]:
            made.append(name)
            return array

        arrays = self.examples()
        tensors = [
            (name, BY_NAME[array.dtype.name], array.shape, lambda name=name, array=array: make(name, array))
            for name, array in arrays.items()
        ]
        sink = io.BytesIO()
        self.container.write(sink, tensors, self.metadata)
        assert sink.getvalue() == self.write(arrays)
        assert sorted(made) == sorted(arrays)

    def test_strides_and_byte_order_do_not_matter(self, tmp_path: Path) -> None:
        array = np.arange(12, dtype=">f4").reshape(3, 4).T
        path = tmp_path / "new"
        path.write_bytes(self.write({"a": array}))
        assert same_bits(self.container.open(path).tensors["a"].read(), np.ascontiguousarray(array, "<f4"))

    def test_a_payload_of_another_form_or_size_is_a_fault_of_the_caller(self) -> None:
        float32 = BY_NAME["float32"]
        for payload in (np.zeros(2, np.float32), np.zeros((1, 1), np.float32), np.zeros(1, np.float64), lambda: b"123"):
            with pytest.raises(ValueError, match="'a'"):
                self.container.write(io.BytesIO(), [("a", float32, (1,), payload)], self.metadata)

    def test_names_are_checked(self) -> None:
        one = ("a", BY_NAME["float32"], (1,), np.zeros(1, np.float32))
        for tensors, code in (([one, one], "LF105"), ([("\x1b", *one[1:])], "LF301"), ([("", *one[1:])], "LF301")):
            with pytest.raises(LoraformatError) as caught:
                self.container.write(io.BytesIO(), tensors, self.metadata)
            assert caught.value.codes == (code,)

    def test_a_form_that_it_lacks_is_refused(self) -> None:
        tensor = ("a", BY_NAME[self.lacks], (2,), lambda: bytes(BY_NAME[self.lacks].count_bytes(2)))
        with pytest.raises(LoraformatError) as caught:
            self.container.write(io.BytesIO(), [tensor], self.metadata)
        assert caught.value.codes == ("LF132",)

    def test_metadata_without_a_place_are_refused(self) -> None:
        with pytest.raises(LoraformatError) as caught:
            self.container.write(io.BytesIO(), [], {"nobody.knows": None})
        assert caught.value.codes == ("LF130",)
