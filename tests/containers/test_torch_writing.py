"""New torch checkpoints, read by our own reader; `oracles/test_torch_files.py` has torch itself."""

from pathlib import Path

import numpy as np
import pytest

from laws.container_laws import same_bits
from laws.writer_laws import WriterLaws
from loraformat.containers.torch_zip import CONTAINER
from loraformat.dtypes import BY_NAME
from loraformat.errors import LoraformatError


class TestWritingTorchZip(WriterLaws):
    container = CONTAINER
    forms = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    lacks = "float8_e4m3fn"

    def test_every_storage_lies_at_a_multiple_of_64(self, tmp_path: Path) -> None:
        path = tmp_path / "new.pt"
        path.write_bytes(self.write(self.examples()))
        tensors = CONTAINER.open(path).tensors.values()
        assert all(tensor.span.offset % 64 == 0 for tensor in tensors if tensor.span.length)


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_an_outer_dictionary(tmp_path: Path, wrapper: str) -> None:
    path = tmp_path / "new.pth"
    array = np.ones((2, 3), np.float32)
    with path.open("wb") as sink:
        CONTAINER.write(sink, [("a.b", BY_NAME["float32"], (2, 3), array)], {"torch.wrapper": wrapper})
    opened = CONTAINER.open(path)
    assert opened.metadata["torch.wrapper"] == wrapper
    assert same_bits(opened.tensors["a.b"].read(), array)


def test_an_outer_dictionary_that_no_reader_opens(tmp_path: Path) -> None:
    with (tmp_path / "new.pth").open("wb") as sink, pytest.raises(LoraformatError) as caught:
        CONTAINER.write(sink, [], {"torch.wrapper": "weights"})
    assert caught.value.codes == ("LF130",)
