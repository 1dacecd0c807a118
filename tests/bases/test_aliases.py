"""Which tensors share bytes, compared with looking at every pair."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.bases._aliases import group_aliases
from loraformat.containers._strided import StridedTensor
from loraformat.dtypes import BY_NAME
from loraformat.spans import InputFile, Span, StoredTensor

BYTE = BY_NAME["uint8"]
EXTENTS = st.tuples(st.sampled_from("ab"), st.integers(0, 12), st.integers(0, 5), st.booleans())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, InputFile]:
    folder = tmp_path_factory.mktemp("aliases")
    for name in "ab":
        (folder / name).write_bytes(bytes(20))
    return {name: InputFile(folder / name) for name in "ab"}


def make(files: dict[str, InputFile], number: int, extent: tuple[str, int, int, bool]) -> StoredTensor:
    name, offset, length, strided = extent
    span = Span(files[name].path, offset, length)
    if strided and length > 1:
        return StridedTensor(f"t{number}", BYTE, (2,), (length - 1,), span, files[name])
    return StoredTensor(f"t{number}", BYTE, (length,), span, files[name])


def overlap(one: StoredTensor, other: StoredTensor) -> bool:
    a, b = one.extent, other.extent
    return a.path == b.path and a.offset < b.end and b.offset < a.end


@given(extents=st.lists(EXTENTS, max_size=12))
def test_every_tensor_that_shares_bytes_knows_it(
    files: dict[str, InputFile], extents: list[tuple[str, int, int, bool]]
) -> None:
    tensors = [make(files, number, extent) for number, extent in enumerate(extents)]
    groups = group_aliases(tensors)
    held = [tensor for group in groups for tensor in group.tensors]
    assert sorted(tensor.name for tensor in held) == sorted(tensor.name for tensor in tensors if tensor.elements)
    for group in groups:
        assert all(tensor.extent == group.first.extent for tensor in group.tensors)
        assert group.first.is_contiguous or len(group.tensors) == 1
        others = [tensor for tensor in held if tensor not in group.tensors]
        sharing = {
            f"the tensor {other.name!r}, whose bytes overlap its own" for other in others if overlap(group.first, other)
        }
        assert set(group.overlapping) <= sharing
        assert bool(group.overlapping) == bool(sharing)


def test_a_file_of_another_path_does_not_overlap(files: dict[str, InputFile], tmp_path: Path) -> None:
    tensors = [make(files, number, (name, 3, 5, False)) for number, name in enumerate("ab")]
    assert [group.overlapping for group in group_aliases(tensors)] == [(), ()]
