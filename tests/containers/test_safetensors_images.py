"""safetensors files that are described tensor by tensor, read back by the safetensors package."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from builders import write_tensors
from laws.container_laws import same_bits
from loraformat.containers._safetensors_images import describe_images, describe_rewritten, escape_for_header
from loraformat.containers.safetensors import CONTAINER
from loraformat.dtypes import BY_NAME
from loraformat.errors import LoraformatError
from loraformat.images import Copy, Fresh, OutputTensor
from outputs import write_images

F32 = BY_NAME["float32"]


@given(
    kinds=st.lists(st.sampled_from(["float64", "float32", "float16", "uint8", "bool"]), max_size=6),
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=6, max_size=6),
    computed=st.sets(st.integers(0, 5)),
    order=st.randoms(use_true_random=False),
    metadata=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
    receipt=st.none() | st.text(max_size=5).map(str.rstrip),
)
def test_any_tensors_in_any_order(
    kinds: list[str],
    shapes: list[list[int]],
    computed: set[int],
    order: Any,
    metadata: dict[str, str],
    receipt: str | None,
    tmp_path: Path,
) -> None:
    dice = np.random.default_rng(len(kinds))
    drawn = zip(kinds, shapes, strict=False)
    arrays = {f"t{i}": dice.integers(0, 2, shape).astype(kind) for i, (kind, shape) in enumerate(drawn)}
    opened = CONTAINER.open(write_tensors(tmp_path / "in.safetensors", arrays))
    tensors = [
        OutputTensor(name, tensor.dtype, tensor.shape, None if int(name[1:]) in computed else tensor)
        for name, tensor in opened.tensors.items()
    ]
    order.shuffle(tensors)
    text = escape_for_header(receipt or "")
    key = None if receipt is None else "receipt"
    image = describe_rewritten(tmp_path / "out.safetensors", tensors, metadata, key, len(text) + 2 if key else 0)
    write_images([image], text, {name: array.tobytes() for name, array in arrays.items()})
    found = load_file(image.path)
    assert found.keys() == arrays.keys()
    assert all(same_bits(found[name], arrays[name]) for name in arrays)
    with safetensors.safe_open(image.path, "np") as theirs:
        noted = theirs.metadata() or {}
    assert {name: value.rstrip(" ") if name == key else value for name, value in noted.items()} == (
        metadata | ({} if receipt is None else {"receipt": receipt})
    )
    again = CONTAINER.open(image.path)
    sizes = [tensor.dtype.bits // 8 for tensor in again.tensors.values()]
    assert all(tensor.span.offset % size == 0 for tensor, size in zip(again.tensors.values(), sizes, strict=True))


def test_tensors_in_the_order_of_the_source_are_one_copy(tmp_path: Path) -> None:
    arrays = {f"t{index}": np.full((2, 3), index, np.float32) for index in range(5)}
    opened = CONTAINER.open(write_tensors(tmp_path / "in.safetensors", arrays))
    tensors = [OutputTensor(t.name, t.dtype, t.shape, t) for t in opened.tensors.values()]
    new = OutputTensor("new", F32, (1, 2), None)
    image = describe_rewritten(tmp_path / "out", [*tensors, new], {})
    pieces = [piece for _, piece in image.placed()]
    assert [type(piece) for piece in pieces[-2:]] == [Copy, Fresh]
    assert sum(isinstance(piece, Copy) for piece in pieces) == 1
    for tensor in opened.tensors.values():
        assert image.locate(tensor.span) is not None


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ([OutputTensor("a", F32, (2,), None), OutputTensor("a", F32, (3,), None)], "LF105"),
        ([OutputTensor("a\x1b", F32, (2,), None)], "LF301"),
        ([OutputTensor("__metadata__", F32, (2,), None)], "LF301"),
        ([OutputTensor("a", BY_NAME["complex128"], (2,), None)], "LF610"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tensors: list[OutputTensor], code: str, tmp_path: Path) -> None:
    with pytest.raises(LoraformatError) as caught:
        describe_rewritten(tmp_path / "out", tensors, {})
    assert caught.value.codes == (code,)


def test_an_empty_key_is_a_key(tmp_path: Path) -> None:
    opened = CONTAINER.open(write_tensors(tmp_path / "in.safetensors", {}))
    write_images(describe_images(opened, tmp_path / "out", "", 3), b"x")
    assert CONTAINER.open(tmp_path / "out").metadata == {"": "x  "}
