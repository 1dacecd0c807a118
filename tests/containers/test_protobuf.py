import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from loraformat.containers._protobuf import (
    LENGTH,
    Field,
    Frame,
    Leaf,
    Reader,
    decode_varint,
    encode_bytes,
    encode_tag,
    encode_varint,
    splice,
)
from loraformat.containers.onnx_file import CONTAINER, open_onnx
from loraformat.errors import InputError, LoraformatError, RefusedError
from loraformat.images import Edit, Literal, NewOutput
from loraformat.limits import MAX_PROTO_DEPTH
from loraformat.spans import InputFile

# Wire format written by hand: the writers here share no code with the reader.


def varint(value):
    out = b""
    while value >= 128:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def block(number, data):
    return varint(number * 8 + 2) + varint(len(data)) + data


def number(field, value):
    return varint(field * 8) + varint(value)


IR = number(1, 8)


def opened(folder, data):
    path = folder / "m.onnx"
    path.write_bytes(data)
    return open_onnx(path)


def refused(folder, data, code="LF118"):
    with pytest.raises(LoraformatError) as caught:
        opened(folder, data)
    assert caught.value.codes == (code,)
    return str(caught.value)


# -- numbers ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**64 - 1))
def test_varints_round_trip(value):
    data = encode_varint(value)
    assert data == varint(value)
    assert decode_varint(data + b"\x7f", 0) == (value, len(data))


@pytest.mark.parametrize("data", [b"\x80" * 10 + b"\x00", b"\xff" * 9 + b"\x02", b"\xff" * 12])
def test_varints_of_more_than_64_bits_are_refused(data):
    with pytest.raises(ValueError, match="64 bits"):
        decode_varint(data, 0)


def test_a_cut_off_varint_is_an_index_error():
    with pytest.raises(IndexError):
        decode_varint(b"\x80\x80", 0)


# -- fields -------------------------------------------------------------------------------------------------------


def test_fields_of_every_wire_type(tmp_path):
    data = number(1, 300) + b"\x11" + b"d" * 8 + block(3, b"abc") + b"\x25" + b"f" * 4 + block(536870911, b"")
    path = tmp_path / "x"
    path.write_bytes(data)
    reader = Reader(InputFile(path))
    found = list(reader.fields(0, len(data)))
    assert [(field.number, field.wire) for field in found] == [(1, 0), (2, 1), (3, 2), (4, 5), (536870911, 2)]
    assert [data[field.begin : field.end] for field in found] == [b"\xac\x02", b"d" * 8, b"abc", b"f" * 4, b""]
    assert [field.start for field in found[1:]] == [field.end for field in found[:-1]]
    assert reader.varint(found[0]) == 300
    assert reader.read(found[2]) == b"abc"


@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 200_000)), max_size=12))
def test_fields_across_windows(tmp_path_factory, shape):
    data = b"".join(block(field, bytes(length)) for field, length in shape)
    path = tmp_path_factory.mktemp("fields") / "x"
    path.write_bytes(data)
    found = list(Reader(InputFile(path)).fields(0, len(data)))
    assert [(field.number, field.end - field.begin) for field in found] == shape


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01",  # field number 0
        b"\x0b\x0c",  # group
        b"\x0e",  # wire type 6
        b"\x0f",  # wire type 7
        b"\x08",  # no payload
        b"\x08\x80",  # half a varint
        b"\x09\x01",  # half a fixed64
        b"\x0d\x01",  # half a fixed32
        b"\x0a\x05abc",  # past the end
        b"\x0a" + b"\xff" * 9 + b"\x01",  # 2^64 - 1 bytes
        b"\x0a" + b"\xff" * 10 + b"\x01",
        b"\x80" * 10 + b"\x01",
        varint(1 << 32) + b"\x01",  # field number 2^29
    ],
)
def test_malformed_fields(tmp_path, data):
    message = refused(tmp_path, IR + data)
    assert "at byte 2" in message
    inside = refused(tmp_path, IR + block(7, data) + b"\x08" * 32)
    assert f"at byte {len(IR) + 2}" in inside


def test_an_empty_file_is_no_model(tmp_path):
    refused(tmp_path, b"")
    refused(tmp_path, IR)


def test_a_git_lfs_pointer_is_named(tmp_path):
    refused(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "LF111")


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError) as caught:
        open_onnx(tmp_path / "none.onnx")
    assert caught.value.codes == ("LF100",)


# -- models that could be read in two ways ------------------------------------------------------------------------


def test_a_second_graph(tmp_path):
    assert "second field 7" in refused(tmp_path, IR + block(7, b"") + block(7, b""))


@pytest.mark.parametrize("field", [number(2, 1), block(8, b"w"), block(9, b"1234"), number(14, 0)])
def test_tensors_with_a_field_twice(tmp_path, field):
    refused(tmp_path, IR + block(7, block(5, field + field)))


def test_an_attribute_with_two_tensors(tmp_path):
    attribute = block(1, b"value") + block(5, b"") + block(5, b"")
    refused(tmp_path, IR + block(7, block(1, block(5, attribute))))


def test_a_tensor_that_has_a_segment(tmp_path):
    refused(tmp_path, IR + block(7, block(5, block(3, number(1, 0) + number(2, 4)))))


DIMENSION = block(11, block(1, b"x") + block(2, block(1, block(2, block(1, block(2, b"batch\xff"))))))


@pytest.mark.parametrize(
    "place",
    [block(7, block(2, b"\xff")), block(2, b"\xff"), block(14, block(1, b"\xc3")), block(7, DIMENSION)],
)
def test_strings_that_are_not_utf8(tmp_path, place):
    assert "UTF-8" in refused(tmp_path, IR + (b"" if place[0] == 0x3A else block(7, b"")) + place)


def test_long_strings_are_checked_piece_by_piece(tmp_path):
    long = "ä".encode() * 50_000  # Two bytes each, so that pieces cut letters in half.
    assert opened(tmp_path, IR + block(7, block(2, b"x" + long))).model.graph.name == "x" + long.decode()
    refused(tmp_path, IR + block(7, block(2, long[:-1])))


@pytest.mark.parametrize("depth", [MAX_PROTO_DEPTH, 5000])
def test_deep_nesting(tmp_path, depth):
    graph = b""
    for _ in range(depth // 3):
        graph = block(1, block(5, block(6, graph)))
    refused(tmp_path, IR + block(7, graph))


def test_moderate_nesting(tmp_path):
    graph = block(5, block(8, b"inner") + number(2, 1) + number(1, 1) + block(9, b"1234"))
    for _ in range(25):
        graph = block(1, block(5, block(6, graph)))
    (entry,) = opened(tmp_path, IR + block(7, graph)).tensors()
    assert entry[1].name == "inner"


def test_unpacked_numbers_are_not_a_run(tmp_path):
    tensor = number(1, 2) + number(2, 1) + block(8, b"w") + (b"\x25" + b"1234") * 2
    file = opened(tmp_path, IR + block(7, block(5, tensor)))
    assert list(file.model.graph.initializer[0].float_data) == [np.frombuffer(b"1234", "<f4")[0]] * 2
    assert file.stored_tensor(file.model.graph.initializer[0]).code == "LF403"


def test_large_unpacked_numbers_are_cut(tmp_path):
    tensor = number(1, 90_000) + number(2, 1) + (b"\x25" + b"1234") * 90_000 + block(8, b"w")
    file = opened(tmp_path, IR + block(7, block(5, tensor)))
    assert file.model.ByteSize() < 100
    assert file.model.graph.initializer[0].name == "w"


def test_an_external_flag_with_high_bits_counts_as_protobuf_counts_it(tmp_path):
    entry = block(13, block(1, b"location") + block(2, b"w.bin"))
    tensor = number(1, 1) + number(2, 1) + block(8, b"w") + entry + number(14, 2**32 + 1)
    (tmp_path / "w.bin").write_bytes(b"1234")
    file = opened(tmp_path, IR + block(7, block(5, tensor)))
    assert file.model.graph.initializer[0].data_location == TensorProto.EXTERNAL
    assert len(file.images(NewOutput(tmp_path / "out.onnx", 5, "00000000"))) == 2


# -- limits -------------------------------------------------------------------------------------------------------


def test_the_skeleton_has_a_cap(tmp_path, monkeypatch):
    monkeypatch.setattr("loraformat.containers._onnx.skeleton.MAX_SKELETON_BYTES", 1000)
    refused(tmp_path, IR + block(7, block(10, b"d" * 1001)), "LF110")
    raw = number(1, 5000) + number(2, 2) + block(9, bytes(5000))
    assert opened(tmp_path, IR + block(7, block(5, raw))).model.ByteSize() < 100


def test_the_number_of_tensors_has_a_cap(tmp_path, monkeypatch):
    monkeypatch.setattr("loraformat.containers._onnx.walk.MAX_TENSORS", 3)
    opened(tmp_path, IR + block(7, block(5, b"") * 3))
    with pytest.raises(RefusedError) as caught:
        opened(tmp_path, IR + block(7, block(5, b"") * 4))
    assert caught.value.codes == ("LF110",)


# -- splicing -----------------------------------------------------------------------------------------------------


def apply(data, edits):
    out, position = b"", 0
    for edit in edits:
        assert edit.offset >= position
        out += data[position : edit.offset] + b"".join(piece.data for piece in edit.pieces)
        position = edit.offset + edit.length
    return out + data[position:]


def frames_of(path):
    """Return the main graph's frame, and for each initializer its frame and that of its name."""
    reader = Reader(InputFile(path))
    (graph,) = (Frame(f) for f in reader.fields(0, path.stat().st_size) if f.number == 7)
    tensors = [graph.enter(f) for f in reader.fields(graph.field.begin, graph.field.end) if f.number == 5]
    names = [t.enter(f) for t in tensors for f in reader.fields(t.field.begin, t.field.end) if f.number == 8]
    return graph, tensors, names


LENGTHS = [0, 1, 60, 110, 127, 128, 129, 300, 16_300, 16_384, 17_000]


@given(
    old=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=4),
    new=st.lists(st.sampled_from([None, *LENGTHS]), min_size=4, max_size=4),
    inserted=st.lists(st.sampled_from(LENGTHS), max_size=3),
)
def test_splicing_equals_editing_the_parsed_model(tmp_path_factory, old, new, inserted):
    """Names are rewritten or removed and initializers are inserted; onnx does the same on the parsed model."""
    model = onnx.ModelProto(ir_version=8)
    model.graph.initializer.extend(TensorProto(name="n" * length, dims=[3, 2]) for length in old)
    data = model.SerializeToString(deterministic=True)
    path = tmp_path_factory.mktemp("splice") / "m.onnx"
    path.write_bytes(data)
    graph, tensors, names = frames_of(path)
    leaves = []
    for position, (length, tensor, name) in enumerate(zip(new, tensors, names, strict=False)):
        field = name.field
        if length is None:
            leaves.append(Leaf(Edit(field.start, field.end - field.start, ()), tensor))
            model.graph.initializer[position].ClearField("name")
        else:
            leaves.append(Leaf(Edit(field.begin, field.end - field.begin, (Literal(b"m" * length),)), name))
            model.graph.initializer[position].name = "m" * length
    for length in inserted:
        added = TensorProto(name="i" * length)
        edit = Edit(graph.field.end, 0, (Literal(encode_bytes(5, added.SerializeToString())),))
        leaves.append(Leaf(edit, graph))
        model.graph.initializer.append(added)
    result = onnx.ModelProto.FromString(apply(data, splice(leaves)))
    assert result == model


def test_insertions_at_one_offset_go_to_their_own_messages():
    """The end of an inner message is also the end of the outer one."""
    data = block(1, block(2, b"ab"))
    outer = Frame(Field(1, LENGTH, 0, 1, 2, 6))
    inner = outer.enter(Field(2, LENGTH, 2, 3, 4, 6))
    leaves = [
        Leaf(Edit(6, 0, (Literal(b"T"),)), None),
        Leaf(Edit(6, 0, (Literal(block(3, b"O")),)), outer),
        Leaf(Edit(6, 0, (Literal(b"I"),)), inner),
    ]
    assert apply(data, splice(leaves)) == block(1, block(2, b"abI") + block(3, b"O")) + b"T"


def test_an_edit_that_keeps_its_length_changes_nothing_around_it():
    frame = Frame(Field(1, LENGTH, 0, 1, 2, 4))
    edit = Edit(2, 2, (Literal(b"xy"),))
    assert splice([Leaf(edit, frame)]) == [edit]


# -- sniffing -----------------------------------------------------------------------------------------------------


def test_sniffing():
    node = helper.make_node("Relu", ["x"], ["y"])
    graph = helper.make_graph([node] * 20, "g", [], [])
    for model in (helper.make_model(graph), helper.make_model(graph, producer_name="pytorch")):
        data = model.SerializeToString()
        assert CONTAINER.sniff(data[:64], len(data))
    header = b'{"__metadata__":{"format":"pt"}}'
    assert not CONTAINER.sniff((8).to_bytes(8, "little") + header, 4000)
    assert not CONTAINER.sniff(len(header).to_bytes(8, "little") + header, 4000)
    for head in (b"", b"PK\x03\x04", b"GGUF\x03\0\0\0", b"\x80\x02}q\0.", b"{}", b"version https://git-lfs", b"\x08"):
        assert not CONTAINER.sniff(head, 4000)
    assert encode_tag(7, LENGTH) == b"\x3a"
