"""Undoing merges: exactly from what was kept, else by subtraction; and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from graphs import make_adapter, read_state
from loraformat.apply.side_receipt import find_receipt
from loraformat.apply.undo import UNDO_KEY, name_undo
from loraformat.loading import open_base
from models import FOLDERS, FORMS, MODULES, copy_base, files_below, read_model, write_adapter, write_base


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "style")


def refused(*arguments: Any, **options: Any) -> tuple[str, ...]:
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.unmerge(*arguments, **options)
    return caught.value.codes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in place"])
def test_kept_bytes_give_the_base_s_weights(tmp_path: Path, adapter: Path, form: str, in_place: bool) -> None:
    base = write_base(tmp_path / "in", form)
    merged = tmp_path / "out" / f"merged{base.suffix}"
    merged.parent.mkdir()
    if in_place:
        merged = copy_base(base, tmp_path / "work")
        loraformat.merge_into(merged, [adapter], keep_undo=True)
    else:
        loraformat.merge(base, [adapter], merged, keep_undo=True)
    before = files_below(merged.parent)
    again = tmp_path / f"again{base.suffix}"
    undone = loraformat.unmerge(merged, again)
    assert (undone.output, undone.exact, undone.problem) == (again, True, None)
    assert read_model(again) == read_model(base) != read_model(merged)
    assert find_receipt(open_base(again)) is None
    assert files_below(merged.parent) == before


@pytest.mark.parametrize("form", FOLDERS)
def test_folders_named_from_the_working_directory(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    base = write_base(tmp_path, form)
    monkeypatch.chdir(tmp_path)
    loraformat.merge(base.name, [adapter], "merged", keep_undo=True)
    loraformat.unmerge("merged", "again")
    assert read_model(Path("again")) == read_model(base) != read_model(Path("merged"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_place", [False, True], ids=["copy", "in place"])
def test_a_merge_upon_a_merge_is_taken_back_to_the_first(tmp_path: Path, form: str, in_place: bool) -> None:
    base = write_base(tmp_path / "in", form)
    first = tmp_path / "first" / f"model{base.suffix}"
    second = tmp_path / "second" / f"model{base.suffix}"
    again = tmp_path / "again" / f"model{base.suffix}"
    for place in (first, second, again):
        place.parent.mkdir()
    loraformat.merge(base, [write_adapter(tmp_path / "style")], first)
    other = [(write_adapter(tmp_path / "style"), 0.5)]
    if in_place:
        second = copy_base(first, tmp_path / "work")
        loraformat.merge_into(second, other, keep_undo=True)
    else:
        loraformat.merge(first, other, second, keep_undo=True)
    loraformat.unmerge(second, again)
    assert files_below(again.parent) == files_below(first.parent)


@pytest.mark.parametrize("form", FORMS)
def test_subtraction_says_that_it_is_not_exact(tmp_path: Path, form: str) -> None:
    base = write_base(tmp_path / "in", form)
    merged = tmp_path / f"merged{base.suffix}"
    adapter = write_adapter(tmp_path / "style")
    loraformat.merge(base, [(adapter, 0.3)], merged)
    again = tmp_path / f"again{base.suffix}"
    undone = loraformat.unmerge(merged, again, adapters=[adapter])  # the weight is the receipt's
    assert not undone.exact
    assert undone.problem is not None
    assert (undone.problem.code, undone.problem.severity) == ("LF623", "warning")
    found, expected, merged_weights = read_model(again), read_model(base), read_model(merged)
    for name, (form_name, shape, data) in expected.items():
        got = np.frombuffer(found[name][2], form_name).astype(np.float64)
        largest = np.abs(np.frombuffer(merged_weights[name][2], form_name)).max().astype(np.float64) + 8
        np.testing.assert_allclose(got, np.frombuffer(data, form_name), rtol=0, atol=2 * largest * 2.0**-24)
        assert found[name][:2] == (form_name, shape)


def test_nothing_to_undo_it_with(tmp_path: Path, adapter: Path) -> None:
    base, merged = write_base(tmp_path / "in", "safetensors"), tmp_path / "merged.safetensors"
    loraformat.merge(base, [adapter], merged)
    assert refused(merged, tmp_path / "again.safetensors") == ("LF622",)
    assert refused(merged) == ("LF622",)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "x.safetensors", keep_undo=True, dtype="bfloat16")
    assert caught.value.codes == ("LF622",)


def test_only_what_was_merged_is_subtracted(tmp_path: Path, adapter: Path) -> None:
    base, merged = write_base(tmp_path / "in", "safetensors"), tmp_path / "merged.safetensors"
    loraformat.merge(base, [(adapter, 0.5)], merged)
    again = tmp_path / "again.safetensors"
    assert refused(merged, again, adapters=[write_adapter(tmp_path / "other", 2)]) == ("LF803",)
    assert refused(merged, again, adapters=[(adapter, 2.0)]) == ("LF803",)
    assert not again.exists()


def test_replaced_values_cannot_be_subtracted(tmp_path: Path) -> None:
    from test_replacement import saved

    base, merged = write_base(tmp_path / "in", "safetensors"), tmp_path / "merged.safetensors"
    shape = read_state(base)[f"{MODULES[0]}.weight"].shape
    adapter = make_adapter(saved(MODULES[0], weight=np.ones(shape, np.float32)))
    loraformat.merge(base, [adapter], merged)
    assert refused(merged, tmp_path / "again.safetensors", adapters=[adapter]) == ("LF622",)


def test_a_copy_is_not_restored_in_place(tmp_path: Path, adapter: Path) -> None:
    base, merged = write_base(tmp_path / "in", "folder"), tmp_path / "merged"
    loraformat.merge(base, [adapter], merged, keep_undo=True)
    before = files_below(merged)
    assert refused(merged) == ("LF601",)
    assert files_below(merged) == before


# --- undo files are hostile ------------------------------------------------------------------------------------------


def _edit_undo(path: Path, entries: dict[str, tuple[int, int]], record: dict[str, Any]) -> None:
    """Write an undo file anew: entries by name with their bytes in the data, and the record's changes."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    stated = json.loads(header["__metadata__"][UNDO_KEY]) | record
    payload = b"x" * max((stop for _, stop in entries.values()), default=0)
    made = {
        name: {"dtype": "U8", "shape": [stop - begin], "data_offsets": [begin, stop]}
        for name, (begin, stop) in entries.items()
    }
    text = json.dumps({"__metadata__": {UNDO_KEY: json.dumps(stated)}, **made}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


FILE = "merged.safetensors"


@pytest.mark.parametrize(
    ("entries", "record", "code"),
    [
        ({"other.safetensors@0": (0, 4)}, {}, "LF803"),
        ({f"{FILE}@999999": (0, 4)}, {}, "LF803"),
        ({f"{FILE}@2000": (0, 4), f"{FILE}@2002": (4, 8)}, {}, "LF803"),
        ({f"{FILE}@0": (0, 8)}, {}, "LF803"),
        ({"../merged.safetensors@8": (0, 4)}, {}, "LF903"),
        ({"/etc/passwd@8": (0, 4)}, {}, "LF903"),
        ({f"{FILE}@-8": (0, 4)}, {}, "LF109"),
        ({f"{FILE}": (0, 4)}, {}, "LF109"),
        ({f"{FILE}@{'9' * 19}": (0, 4)}, {}, "LF109"),
        ({f"{FILE}@2000": (0, 4)}, {"plan_sha256": 3}, "LF803"),
        ({f"{FILE}@2000": (0, 4)}, {"plan_sha256": "0" * 64}, "LF803"),
        ({f"{FILE}@2000": (0, 4)}, {"receipt_before": 3}, "LF803"),
    ],
)
def test_hostile_undo_files_are_refused(
    tmp_path: Path, adapter: Path, entries: dict[str, tuple[int, int]], record: dict[str, Any], code: str
) -> None:
    base, merged = write_base(tmp_path / "in", "safetensors"), tmp_path / FILE
    loraformat.merge(base, [adapter], merged, keep_undo=True)
    _edit_undo(name_undo(merged), entries, record)
    before = files_below(tmp_path)
    assert refused(merged, tmp_path / "again.safetensors") == (code,)
    assert files_below(tmp_path) == before


def test_the_undo_file_of_another_model_is_refused(tmp_path: Path, adapter: Path) -> None:
    base, merged = write_base(tmp_path / "in", "safetensors"), tmp_path / FILE
    loraformat.merge(base, [adapter], merged, keep_undo=True)
    kept = name_undo(merged).read_bytes()
    loraformat.merge(base, [(adapter, 2.0)], merged, force=True)
    assert not name_undo(merged).exists()
    name_undo(merged).write_bytes(kept)
    assert refused(merged, tmp_path / "again.safetensors") == ("LF803",)
