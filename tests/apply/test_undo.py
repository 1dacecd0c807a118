"""Undo files: what they keep, what of them is believed, and how the kept bytes go back into a copy."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import loraformat
from graphs import read_state
from loraformat.apply.undo import (
    UNDO_KEY,
    check_undo,
    name_journal,
    name_undo,
    open_undo,
    record_in_place,
    restore_pieces,
)
from loraformat.images import Blank, Copy, FileImage, Literal
from loraformat.spans import InputFile
from models import FORMS, files_below, read_model, suffix_of, write_adapter, write_base
from outputs import write_images

PLAN = "0" * 64


def write_undo(path: Path, kept: dict[str, bytes], **record: Any) -> Path:
    """Write an undo file by hand; `record` is what it says beside a version and a plan."""
    entries, end = {}, 0
    for name, data in kept.items():
        entries[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [end, end + len(data)]}
        end += len(data)
    stated = json.dumps({"version": "1.0", "plan_sha256": PLAN} | record)
    text = json.dumps({"__metadata__": {UNDO_KEY: stated}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(kept.values()))
    return path


def codes(act: Any, *arguments: Any) -> tuple[str, ...]:
    with pytest.raises(loraformat.LoraformatError) as caught:
        act(*arguments)
    return caught.value.codes


@pytest.mark.parametrize("form", FORMS)
def test_it_keeps_the_base_s_bytes_of_what_was_merged(tmp_path: Path, form: str) -> None:
    """Read as the safetensors file that it is, its arrays put into the merged files give the base's numbers."""
    base, adapter = write_base(tmp_path / "in", form), write_adapter(tmp_path / "style")
    merged = tmp_path / f"merged{suffix_of(form)}"
    receipt = loraformat.merge(base, [adapter], merged, keep_undo=True)
    kept = read_state(name_undo(merged))
    undo = open_undo(name_undo(merged))
    assert (undo.plan_sha256, undo.is_in_place, undo.receipt) == (receipt.plan_sha256, False, None)
    assert undo.kept_bytes == sum(array.nbytes for array in kept.values())
    assert read_model(merged) != read_model(base)
    root = merged if merged.is_dir() else tmp_path
    for name, array in kept.items():
        file, _, offset = name.rpartition("@")
        data = bytearray((root / file).read_bytes())
        data[int(offset) : int(offset) + array.nbytes] = array.tobytes()
        (root / file).write_bytes(data)
    assert read_model(merged) == read_model(base)
    assert len(receipt.weights) == 2


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b/c"]), st.integers(0, 40), st.integers(1, 9)),
        unique_by=lambda kept: kept[:2],
        max_size=6,
    )
)
def test_bytes_that_overlap_are_refused(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[str, int, int]]
) -> None:
    taken = [(file, at) for file, offset, length in spans for at in range(offset, offset + length)]
    kept = {f"{file}@{offset}": bytes(length) for file, offset, length in spans}
    path = write_undo(tmp_path_factory.getbasetemp() / "some.undo", kept)
    if len(taken) > len(set(taken)):
        assert codes(open_undo, path) == ("LF803",)
    else:
        assert {(each.file, each.offset, each.length) for each in open_undo(path).spans} == set(spans)


@pytest.mark.parametrize("receipt", [None, b"{}", bytes(range(256))])
def test_what_stood_in_the_receipt_s_file_comes_back(tmp_path: Path, receipt: bytes | None) -> None:
    undo = open_undo(write_undo(tmp_path / "x.undo", {}, **record_in_place(receipt)))
    assert (undo.is_in_place, undo.receipt) == (True, receipt)


def test_ranges_that_a_model_does_not_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(bytes(20))
    files = {"model": InputFile(tmp_path / "model")}
    for kept, known in (({"model@16": b"1234"}, True), ({"model@17": b"1234"}, False), ({"mode@0": b"1"}, False)):
        undo = open_undo(write_undo(tmp_path / "x.undo", kept))
        if known:
            check_undo(undo, files)
        else:
            assert codes(check_undo, undo, files) == ("LF803",)


@pytest.mark.parametrize(
    ("kept", "record", "code"),
    [
        ({"base.safetensors@99999": b"1234"}, {}, "LF803"),
        ({"../base.safetensors@0": b"1234"}, {}, "LF903"),
        ({"/etc/hostname@0": b"1234"}, {}, "LF903"),
        ({"base.safetensors@0": b"1", "base.safetensors@00": b"2"}, {}, "LF803"),
        ({"base.safetensors@1e3": b"1234"}, {}, "LF109"),
        ({"base.safetensors@٣": b"1234"}, {}, "LF109"),
        ({"@8": b"1234"}, {}, "LF109"),
        ({"base.safetensors@8": b"1234"}, {"plan_sha256": None}, "LF803"),
        ({"base.safetensors@8": b"1234"}, {"receipt_before": ["x"]}, "LF803"),
    ],
)
def test_a_hostile_journal_changes_nothing(
    tmp_path: Path, kept: dict[str, bytes], record: dict[str, Any], code: str
) -> None:
    model = write_base(tmp_path / "in", "safetensors")
    (tmp_path / "base.safetensors").write_bytes(bytes(100))
    write_undo(name_journal(model), kept, **record)
    before = files_below(tmp_path)
    assert codes(loraformat.unmerge, model) == (code,)
    assert files_below(tmp_path) == before


def _check_siblings(model: Path, folder: Path) -> None:
    """See that a journal that names other files of the model's folder is refused, and changes nothing."""
    siblings = ("other.safetensors", "config.json")
    for name in siblings:
        (folder / name).write_bytes(b"{}" + b" " * 100)
    before = files_below(folder)
    for name in siblings:
        journal = write_undo(name_journal(model), {f"{name}@8": b"1234"}, **record_in_place(None))
        assert codes(loraformat.unmerge, model) == ("LF803",)
        journal.unlink()
        assert files_below(folder) == before


@pytest.mark.parametrize("form", FORMS)
def test_a_journal_names_only_files_of_its_model(tmp_path: Path, form: str) -> None:
    """What else lies in the folder, another model's numbers or a program, is not its to overwrite."""
    model = write_base(tmp_path / "in", form)
    folder = model if model.is_dir() else model.parent
    _check_siblings(model, folder)


@pytest.mark.parametrize("form", ["torch", "npz", "torch folder"])
def test_nor_where_a_kill_left_checksums_that_differ(tmp_path: Path, form: str) -> None:
    """Such an archive cannot be opened; its own bytes are restored all the same, and no others."""
    model = write_base(tmp_path / "in", form)
    folder = model if model.is_dir() else model.parent
    (path,) = [model] if model.is_file() else [each for each in folder.iterdir() if "00001" in each.name]
    whole = path.read_bytes()
    place = whole.index(b"PK\x01\x02") + 16  # The first member's checksum in the directory.
    path.write_bytes(whole[:place] + bytes(byte ^ 255 for byte in whole[place : place + 4]) + whole[place + 4 :])
    assert codes(loraformat.plan_merge, model, []) == ("LF902",)
    _check_siblings(model, folder)
    write_undo(name_journal(model), {f"{path.name}@{place}": whole[place : place + 4]}, **record_in_place(None))
    assert loraformat.unmerge(model).exact
    assert path.read_bytes() == whole


def test_a_journal_does_not_reach_through_links(tmp_path: Path) -> None:
    model = write_base(tmp_path / "in", "safetensors")
    (tmp_path / "secret").write_bytes(bytes(100))
    (model.parent / "link").symlink_to(tmp_path / "secret")
    write_undo(name_journal(model), {"link@0": b"1234"})
    before = files_below(tmp_path)
    assert codes(loraformat.unmerge, model) == ("LF903",)
    assert files_below(tmp_path) == before


def test_what_is_no_undo_file_is_refused(tmp_path: Path) -> None:
    model = write_base(tmp_path / "in", "safetensors")
    assert codes(open_undo, model) == ("LF121",)
    assert codes(loraformat.unmerge, model, tmp_path / "out.safetensors") == ("LF622",)
    name_undo(model).write_bytes(b"not one")
    with pytest.raises(loraformat.InputError):
        loraformat.unmerge(model, tmp_path / "out.safetensors")


@given(st.sets(st.integers(0, 9), max_size=6), st.integers(0, 20))
def test_kept_bytes_go_where_they_stood(tmp_path_factory: pytest.TempPathFactory, places: set[int], start: int) -> None:
    """Spans of three bytes at multiples of six, in a copy of a part of the file."""
    folder = tmp_path_factory.getbasetemp()
    merged = folder / "merged.bin"
    merged.write_bytes(bytes(range(60)))
    kept = {f"merged.bin@{6 * place}": bytes([200 + place] * 3) for place in sorted(places, reverse=True)}
    undo = open_undo(write_undo(folder / "kept.undo", kept))
    file = InputFile(merged)
    image = FileImage(folder / "restored.bin", [Literal(b"head"), Copy(file, start, 60 - start), Blank(8)])
    write_images([restore_pieces(image, {merged: "merged.bin"}, undo)], b"receipt")
    expected = bytearray(range(60))
    for place in places:
        if 6 * place >= start:
            expected[6 * place : 6 * place + 3] = bytes([200 + place] * 3)
    assert (folder / "restored.bin").read_bytes() == b"head" + expected[start:] + b"receipt "
