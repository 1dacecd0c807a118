"""Merging into the base's own files: what is refused, what is left when it fails, and that it is undone to the bit."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from builders import write_peft
from loraformat.apply import in_place
from loraformat.apply.undo import name_journal, name_undo
from models import (
    FORMS,
    IN,
    MODULES,
    OUT,
    RANK,
    copy_base,
    files_below,
    read_model,
    suffix_of,
    write_adapter,
    write_base,
)


@pytest.fixture(params=FORMS)
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return write_base(tmp_path / "in", request.param)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "style")


def refused(act: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[str, ...]:
    with pytest.raises(loraformat.LoraformatError) as caught:
        act(*arguments, **options)
    return caught.value.codes


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_it_has_the_weights_of_a_copy(tmp_path: Path, base: Path, adapter: Path, jobs: int) -> None:
    out = tmp_path / f"merged{base.suffix}"
    copied = loraformat.merge(base, [adapter], out)
    expected, before = read_model(out), files_below(base.parent)
    receipt = loraformat.merge_into(base, [adapter], jobs=jobs)
    assert read_model(base) == expected
    assert receipt.weights == copied.weights
    after = files_below(base.parent)
    added = after.keys() - before.keys()
    assert len(added) == 1
    assert next(iter(added)).endswith("merge_receipt.json")
    assert {name: len(data) for name, data in before.items()} == {name: len(after[name]) for name in before}


def test_what_was_kept_undoes_it_to_the_bit(base: Path, adapter: Path) -> None:
    before = files_below(base.parent)
    receipt = loraformat.merge_into(base, [adapter], keep_undo=True)
    assert name_undo(base).is_file()
    assert files_below(base.parent) != before
    undone = loraformat.unmerge(base)
    assert undone.exact
    assert undone.restored_bytes >= sum(4 * OUT * IN for _ in receipt.weights)
    assert undone.problem is None
    assert files_below(base.parent) == before


def test_several_adapters_are_undone_together(tmp_path: Path, base: Path, adapter: Path) -> None:
    before = files_below(base.parent)
    other = write_adapter(tmp_path / "other", 2, MODULES[1:])
    loraformat.merge_into(base, [(adapter, 0.5), (other, -3.0)], keep_undo=True)
    loraformat.unmerge(base)
    assert files_below(base.parent) == before


def test_merges_in_place_are_undone_one_after_another(tmp_path: Path, base: Path, adapter: Path) -> None:
    """The receipt of the first comes back with its numbers; its kept bytes are the user's to move away."""
    other = write_adapter(tmp_path / "other", 2, MODULES[1:])
    original = files_below(base.parent)
    loraformat.merge_into(base, [adapter], keep_undo=True)
    aside = name_undo(base).rename(tmp_path / "first.undo")
    before = files_below(base.parent)
    loraformat.merge_into(base, [other], keep_undo=True)
    loraformat.unmerge(base)
    assert files_below(base.parent) == before
    aside.rename(name_undo(base))
    loraformat.unmerge(base)
    assert files_below(base.parent) == original


def test_kept_bytes_of_an_earlier_merge_are_not_replaced(tmp_path: Path, base: Path, adapter: Path) -> None:
    other = write_adapter(tmp_path / "other", 2)
    loraformat.merge_into(base, [adapter], keep_undo=True)
    before = files_below(base.parent)
    assert refused(loraformat.merge_into, base, [other], keep_undo=True) == ("LF601",)
    assert files_below(base.parent) == before
    loraformat.merge_into(base, [other], keep_undo=True, force=True)
    loraformat.unmerge(base)
    assert files_below(base.parent).keys() == before.keys() - {str(name_undo(base).relative_to(base.parent))}


def test_kept_bytes_of_an_earlier_merge_do_not_undo_a_later_one(tmp_path: Path, base: Path, adapter: Path) -> None:
    loraformat.merge_into(base, [adapter], keep_undo=True)
    loraformat.merge_into(base, [write_adapter(tmp_path / "other", 2)])
    before = files_below(base.parent)
    assert refused(loraformat.unmerge, base) == ("LF803",)
    assert files_below(base.parent) == before


def test_a_journal_stops_everything_but_unmerge(tmp_path: Path, base: Path, adapter: Path) -> None:
    """As a killed merge leaves it: the journal is what the undo file becomes at the end."""
    whole, before = copy_base(base, tmp_path / "whole"), files_below(base.parent)
    loraformat.merge_into(base, [adapter], keep_undo=True)
    name_undo(base).rename(name_journal(base))
    assert refused(loraformat.merge, base, [adapter], tmp_path / f"out{base.suffix}") == ("LF621",)
    assert refused(loraformat.merge_into, base, [adapter]) == ("LF621",)
    assert refused(loraformat.plan_merge, base, [adapter]) == ("LF621",)
    assert refused(loraformat.verify, base, whole, [adapter]) == ("LF621",)
    assert refused(loraformat.verify, whole, base, [adapter]) == ("LF621",)
    assert refused(loraformat.unmerge, base, tmp_path / f"out{base.suffix}") == ("LF621",)
    undone = loraformat.unmerge(base)
    assert (undone.output, undone.exact) == (base, True)
    assert undone.restored_bytes > 0
    assert files_below(base.parent) == before
    loraformat.merge_into(base, [adapter])


# --- refusals and failures -------------------------------------------------------------------------------------------


def _break(form: str, folder: Path) -> tuple[Path, Path, str]:
    """Return a base and an adapter that merge into numbers out of range, or that drown."""
    if form == "overflow":
        base = write_base(folder / "in", "safetensors", number_form=np.float16)
        factors = {MODULES[0]: (np.full((RANK, IN), 300, np.float32), np.full((OUT, RANK), 300, np.float32))}
        return base, write_peft(folder / "large", factors, alpha=RANK), "LF503"
    base = write_base(folder / "in", "safetensors", number_form=np.float16)
    factors = {MODULES[0]: (np.full((RANK, IN), 1e-4, np.float32), np.full((OUT, RANK), 1e-4, np.float32))}
    return base, write_peft(folder / "small", factors, alpha=RANK), "LF504"


@pytest.mark.parametrize("case", ["overflow", "drowned"])
@pytest.mark.parametrize("keep", [False, True])
def test_numbers_that_do_not_hold_are_rolled_back(tmp_path: Path, case: str, keep: bool) -> None:
    base, adapter, code = _break(case, tmp_path)
    before = files_below(base.parent)
    assert set(refused(loraformat.merge_into, base, [adapter], keep_undo=keep)) == {code}
    assert files_below(base.parent) == before


def test_a_failure_at_the_end_is_rolled_back(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_below(base.parent)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("loraformat.apply.in_place._write_beside", fail)
    with pytest.raises(OSError, match="Input/output"):
        loraformat.merge_into(base, [adapter])
    assert files_below(base.parent) == before


def test_a_file_of_two_names_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    for path in list(base.rglob("*")) if base.is_dir() else list(base.parent.iterdir()):
        os.link(path, tmp_path / f"second-{path.name}")
    before = files_below(base.parent)
    assert refused(loraformat.merge_into, base, [adapter]) == ("LF904",)
    assert files_below(base.parent) == before


def test_a_link_to_a_file_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    """So are the snapshots of a hub's cache, whose blobs other snapshots have too; a link to a folder is a folder."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list((base if base.is_dir() else base.parent).iterdir()):
        os.symlink(os.path.relpath(path.rename(blobs / path.name), path.parent), path)
    before = files_below(blobs)
    code = refused(loraformat.merge_into, base, [adapter])
    assert code in {("LF625",), ("LF903",)}  # ONNX's external data may not lead elsewhere at all.
    assert files_below(blobs) == before
    assert not name_journal(base).exists()


def test_a_linked_folder_is_a_folder(tmp_path: Path, adapter: Path) -> None:
    base = write_base(tmp_path / "in", "folder")
    before = files_below(base)
    (tmp_path / "link").symlink_to(base)
    loraformat.merge_into(tmp_path / "link", [adapter], keep_undo=True)
    loraformat.unmerge(base)
    assert files_below(base) == before


def test_a_closed_file_is_refused_and_nothing_is_left(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = files_below(base.parent), os.open

    def deny(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_ACCMODE == os.O_RDWR and not flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", deny)
    assert refused(loraformat.merge_into, base, [adapter]) == ("LF605",)
    assert files_below(base.parent) == before


def test_a_merge_that_ended_meanwhile_is_not_merged_over(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan was made of what the model was: fingerprints, receipts and parents would be of another base."""
    other = write_adapter(tmp_path / "other", 2)
    merged: dict[str, bytes] = {}

    def overtake(model: Path) -> None:
        if not merged:
            merged.update({"": b""})
            loraformat.merge_into(base, [other])
            merged.update(files_below(base.parent))
        check(model)

    check = in_place.check_no_journal
    monkeypatch.setattr(in_place, "check_no_journal", overtake)
    assert refused(loraformat.merge_into, base, [adapter]) == ("LF906",)
    assert files_below(base.parent) == {name: data for name, data in merged.items() if name}


def test_a_full_disk_is_told_before_the_journal(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_below(base.parent)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 900})())
    assert refused(loraformat.merge_into, base, [adapter]) == ("LF604",)
    assert files_below(base.parent) == before


def test_other_sizes_or_forms_are_refused(tmp_path: Path, adapter: Path) -> None:
    base = write_base(tmp_path / "in", "safetensors")
    before = files_below(base.parent)
    assert refused(loraformat.merge_into, base, [adapter], dtype="bfloat16") == ("LF620",)
    assert files_below(base.parent) == before


@pytest.mark.parametrize("form", ["torch", "torch folder", "npz"])
def test_wrong_checksums_of_the_base_come_back_as_they_were(tmp_path: Path, adapter: Path, form: str) -> None:
    """torch can be told to write other numbers than CRC-32s, which its reader does not mind."""
    base = write_base(tmp_path / "in", form)
    assert suffix_of(form) == base.suffix
    for archive in base.glob("*.bin") if base.is_dir() else [base]:
        _spoil_checksums(archive)
    before = files_below(base.parent)
    loraformat.merge_into(base, [adapter], keep_undo=True)
    assert files_below(base.parent) != before
    loraformat.unmerge(base)
    assert files_below(base.parent) == before


def _spoil_checksums(archive: Path) -> None:
    """Change the CRC-32 of every member, in both places."""
    data = bytearray(archive.read_bytes())
    for mark, at in ((b"PK\x01\x02", 16), (b"PK\x03\x04", 14), (b"PK\x07\x08", 4)):
        place = data.find(mark)
        while place >= 0:
            if any(data[place + at : place + at + 4]):
                data[place + at] ^= 0x55
            place = data.find(mark, place + 1)
    archive.write_bytes(data)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
@pytest.mark.parametrize("form", FORMS)
def test_names_that_are_no_text(tmp_path: Path, form: str) -> None:
    """Of files named in Latin-1, say: what is written names them escaped, and a model refers to none of them."""
    base = write_base(tmp_path / "in", form)
    odd = base.rename(base.with_name(f"b\udcff{base.suffix}"))
    adapter = write_adapter(tmp_path / "a\udcfe")
    output = tmp_path / f"out{base.suffix}"
    loraformat.merge(odd, [adapter], output, resume=True)
    assert loraformat.verify(output, odd, [adapter]).holds
    loraformat.save(loraformat.extract(output, odd).adapter, tmp_path / "extracted.safetensors")
    before = files_below(tmp_path)
    if odd.is_dir() or form in ("one", "many"):  # Their numbers are in files of other names.
        loraformat.merge_into(odd, [adapter])
        assert read_model(odd) == read_model(output)
    else:
        with pytest.raises(loraformat.LoraformatError) as caught:
            loraformat.merge_into(odd, [adapter])
        assert caught.value.codes == ("LF608",)
        assert files_below(tmp_path) == before
