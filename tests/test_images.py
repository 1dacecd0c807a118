"""Output files as pieces: where everything comes from, and where it lands."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraformat.containers._strided import StridedTensor
from loraformat.dtypes import BY_NAME
from loraformat.images import (
    Blank,
    Copy,
    Edit,
    FileImage,
    Fresh,
    Literal,
    OutputTensor,
    Piece,
    edit_file,
    join_copies,
)
from loraformat.spans import InputFile, Span, StoredTensor

CONTENT = bytes(range(60))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> InputFile:
    path = tmp_path_factory.mktemp("images") / "input"
    path.write_bytes(CONTENT)
    return InputFile(path)


def content_of(image: FileImage) -> bytes:
    out = bytearray(b"?" * image.size_bytes)
    for start, piece in image.placed():
        match piece:
            case Copy(source, offset, length):
                new = source.read(offset, length)
            case Literal():
                new = piece.data
            case Blank(length):
                new = b" " * length
        out[start : start + len(new)] = new
    assert len(out) == image.size_bytes
    return bytes(out)


def test_pieces_stand_one_after_another(file: InputFile) -> None:
    pieces = [Literal(b"ab"), Copy(file, 10, 3), Blank(0), Literal(b""), Copy(file, 5, 0), Blank(2), Copy(file, 0, 1)]
    image = FileImage(Path("out"), pieces)
    assert list(image.placed()) == [(0, pieces[0]), (2, pieces[1]), (5, pieces[5]), (7, pieces[6])]
    assert image.size_bytes == 8
    assert content_of(image) == b"ab\x0a\x0b\x0c  \0"


def test_an_empty_file(file: InputFile) -> None:
    image = FileImage(Path("out"), [])
    assert image.size_bytes == 0
    assert not list(image.placed())
    assert image.locate(Span(file.path, 0, 1)) is None


def test_spans_are_located_inside_one_copy(file: InputFile) -> None:
    image = FileImage(Path("out"), [Literal(b"abc"), Copy(file, 20, 10), Blank(7), Copy(file, 0, 5), Copy(file, 40, 2)])
    located = {(20, 10): 3, (20, 1): 3, (25, 5): 8, (29, 1): 12, (0, 5): 20, (4, 1): 24, (40, 2): 25}
    for (offset, length), place in located.items():
        assert image.locate(Span(file.path, offset, length)) == place, (offset, length)
    for offset, length in [(19, 2), (29, 2), (30, 1), (4, 2), (10, 1), (0, 6), (39, 3), (42, 1), (59, 1)]:
        assert image.locate(Span(file.path, offset, length)) is None, (offset, length)


def test_spans_of_other_files_are_not_located(file: InputFile) -> None:
    image = FileImage(Path("out"), [Copy(file, 0, 60)])
    for name in ("a", "input2", "zzz"):
        assert image.locate(Span(file.path.with_name(name), 0, 1)) is None


def test_two_inputs_in_one_image(file: InputFile, tmp_path: Path) -> None:
    (tmp_path / "second").write_bytes(b"0123456789")
    second = InputFile(tmp_path / "second")
    image = FileImage(Path("out"), [Copy(second, 2, 4), Copy(file, 2, 4), Copy(second, 8, 2)])
    assert image.locate(Span(second.path, 3, 2)) == 1
    assert image.locate(Span(file.path, 3, 2)) == 5
    assert image.locate(Span(second.path, 8, 2)) == 8


def test_rooms_for_computed_tensors_are_located_by_their_keys(file: InputFile) -> None:
    pieces = [Literal(b"abc"), Fresh("a", 4), Copy(file, 0, 5), Fresh("none", 0), Fresh("b", 2)]
    image = FileImage(Path("out"), pieces)
    assert image.size_bytes == 14
    assert [image.locate_fresh(key) for key in ("a", "b", "none", "c")] == [3, 12, None, None]
    assert image.locate(Span(file.path, 0, 5)) == 7


def test_neighbours_in_one_input_are_one_copy(file: InputFile, tmp_path: Path) -> None:
    (tmp_path / "second").write_bytes(CONTENT)
    second = InputFile(tmp_path / "second")
    pieces = [
        *(Copy(file, 0, 3), Copy(file, 3, 4), Copy(file, 7, 1), Copy(file, 9, 1), Copy(second, 10, 1)),
        *(Literal(b"x"), Copy(second, 11, 2), Fresh("k", 1), Copy(second, 13, 1), Copy(second, 13, 1)),
    ]
    joined = list(join_copies(pieces))
    assert joined[:3] == [Copy(file, 0, 8), Copy(file, 9, 1), Copy(second, 10, 1)]
    assert joined[3:] == pieces[5:]
    assert list(join_copies([])) == []


def test_a_tensor_is_copied_when_its_form_and_shape_stay(file: InputFile) -> None:
    form, span = BY_NAME["float32"], Span(file.path, 8, 24)
    source = StoredTensor("w", form, (2, 3), span, file)
    assert OutputTensor("w", form, (2, 3), source).as_piece() == Copy(file, 8, 24)
    assert OutputTensor("other", form, (2, 3), source).as_piece() == Copy(file, 8, 24)
    turned = StridedTensor("w", form, (3, 2), (1, 3), span, file)
    for tensor in (
        OutputTensor("w", form, (2, 3), None),
        OutputTensor("w", form, (3, 2), source),
        OutputTensor("w", form, (2, 3), turned),
    ):
        assert not tensor.is_copied
        assert tensor.as_piece() == Fresh("w", 24)
    assert OutputTensor("w", BY_NAME["float16"], (2, 3), source).as_piece() == Fresh("w", 12)


def test_a_tensor_that_is_no_run_of_bytes_is_gathered_when_it_is_written(file: InputFile) -> None:
    turned = StridedTensor("w", BY_NAME["uint8"], (3, 2), (1, 3), Span(file.path, 8, 6), file)
    tensor = OutputTensor("w", BY_NAME["uint8"], (3, 2), turned)
    assert not tensor.is_copied
    image = FileImage(Path("out"), [Literal(b"ab"), tensor.as_piece()])
    assert image.size_bytes == 8
    assert content_of(image) == b"ab" + bytes([8, 11, 9, 12, 10, 13])


def test_edits_must_not_overlap(file: InputFile) -> None:
    with pytest.raises(ValueError, match="overlap"):
        edit_file(file, [Edit(10, 5, ()), Edit(14, 1, ())])
    assert edit_file(file, [Edit(15, 1, ()), Edit(10, 5, ())])


@st.composite
def edit_lists(draw: st.DrawFn) -> list[tuple[int, int, bytes]]:
    ends = sorted(draw(st.lists(st.integers(0, len(CONTENT)), max_size=8)))
    pairs = zip(ends[::2], ends[1::2], strict=False)
    return [(begin, end - begin, draw(st.binary(max_size=5))) for begin, end in pairs]


@given(edits=edit_lists(), tail=st.binary(max_size=4), data=st.data())
def test_editing_is_what_it_is_for_bytes(
    file: InputFile, edits: list[tuple[int, int, bytes]], tail: bytes, data: st.DataObject
) -> None:
    expected, position = b"", 0
    for offset, length, new in edits:
        expected += CONTENT[position:offset] + new
        position = offset + length
    expected += CONTENT[position:] + tail
    shuffled = data.draw(st.permutations(edits)) if len({offset for offset, _, _ in edits}) == len(edits) else edits
    pieces: list[Piece] = edit_file(
        file, [Edit(offset, length, (Literal(new),)) for offset, length, new in shuffled], [Literal(tail)]
    )
    image = FileImage(Path("out"), pieces)
    assert content_of(image) == expected
    begin = data.draw(st.integers(0, len(CONTENT) - 1))
    span = Span(file.path, begin, data.draw(st.integers(1, len(CONTENT) - begin)))
    place = image.locate(span)
    cut = any(offset < span.end and begin < offset + length for offset, length, _ in edits)
    if place is not None:
        assert expected[place : place + span.length] == CONTENT[begin : span.end]
        assert not cut
    else:
        assert cut or any(begin < offset < span.end for offset, _, _ in edits)
