"""Proof after the fact: it holds for every form and manner, and names what was damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

import loraformat
from loraformat.verification import Verification
from models import FOLDERS, FORMS, OTHERS_FORMAT, STATES, copy_base, read_model, suffix_of, write_adapter, write_base


def codes(found: Verification) -> set[str]:
    return {problem.code for problem in found.problems}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "style")


# --- it holds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options", [{}, {"keep_undo": True}, {"resume": True}, {"durable": True, "jobs": 5}], ids=lambda o: "+".join(o)
)
def test_a_copy_is_proven(tmp_path: Path, adapter: Path, form: str, options: dict[str, Any]) -> None:
    base = write_base(tmp_path / "in", form)
    out = tmp_path / f"merged{suffix_of(form)}"
    loraformat.merge(base, [adapter], out, **options)
    found = loraformat.verify(out, base, [adapter])
    assert found.problems == ()
    assert found.holds
    assert found.weights == 2
    assert found.compared_bytes > 3 * 12 * 10 * 4


@pytest.mark.parametrize("form", FORMS)
def test_several_adapters_take_their_weights_from_the_receipt(tmp_path: Path, adapter: Path, form: str) -> None:
    base, other = write_base(tmp_path / "in", form), write_adapter(tmp_path / "other", 2)
    out = tmp_path / f"merged{suffix_of(form)}"
    loraformat.merge(base, [(adapter, 0.5), (other, -2.0)], out)
    assert loraformat.verify(out, base, [adapter, other]).problems == ()
    assert loraformat.verify(out, base, [(adapter, 0.5), other]).problems == ()
    assert not loraformat.verify(out, base, [(adapter, 0.25), other]).holds
    assert not loraformat.verify(out, base, [other, adapter]).holds
    assert not loraformat.verify(out, base, [adapter]).holds


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [False, True], ids=["plain", "undo"])
def test_a_merge_in_place_is_proven(tmp_path: Path, adapter: Path, form: str, keep: bool) -> None:
    base = write_base(tmp_path / "in", form)
    model = copy_base(base, tmp_path / "work")
    loraformat.merge_into(model, [adapter], keep_undo=keep)
    assert loraformat.verify(model, base, [adapter]).problems == ()


@pytest.mark.parametrize("form", FORMS)
def test_a_second_merge_in_place_is_proven_against_the_first(tmp_path: Path, adapter: Path, form: str) -> None:
    other = write_adapter(tmp_path / "other", 2)
    base = write_base(tmp_path / "in", form)
    once, twice = copy_base(base, tmp_path / "once"), copy_base(base, tmp_path / "twice")
    loraformat.merge_into(once, [adapter])
    first = loraformat.merge_into(twice, [adapter])
    second = loraformat.merge_into(twice, [other])
    assert second.parent is not None
    assert second.parent["plan_sha256"] == first.plan_sha256
    assert loraformat.verify(twice, once, [other]).problems == ()
    assert not loraformat.verify(twice, base, [other]).holds


@pytest.mark.parametrize("form", STATES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_another_number_form_is_proven(tmp_path: Path, adapter: Path, form: str, dtype: str) -> None:
    base = write_base(tmp_path / "in", form)
    out = tmp_path / f"merged{suffix_of(form, anew=True)}"
    loraformat.merge(base, [adapter], out, dtype=dtype, to="safetensors")
    assert loraformat.verify(out, base, [adapter]).problems == ()
    assert read_model(out)["norm.weight"][0] == dtype


@pytest.mark.parametrize("form", OTHERS_FORMAT)
def test_another_format_is_proven(tmp_path: Path, adapter: Path, form: str) -> None:
    base = write_base(tmp_path / "in", form)
    out = tmp_path / f"merged{suffix_of(form, anew=True)}"
    loraformat.merge(base, [adapter], out, to="safetensors")
    assert loraformat.verify(out, base, [adapter]).problems == ()


@pytest.mark.parametrize("form", FOLDERS)
def test_linked_shards_are_proven(tmp_path: Path, adapter: Path, form: str) -> None:
    base, out = write_base(tmp_path / "in", form), tmp_path / "merged"
    loraformat.merge(base, [adapter], out, link=True)
    assert loraformat.verify(out, base, [adapter]).problems == ()


@pytest.mark.parametrize("form", ["one", "many"])
def test_a_replaced_model_with_data_of_a_new_name_is_proven(tmp_path: Path, adapter: Path, form: str) -> None:
    base, out = write_base(tmp_path / "in", form), tmp_path / "out" / "merged.onnx"
    out.parent.mkdir()
    loraformat.merge(base, [(adapter, 2.0)], out)
    loraformat.merge(base, [adapter], out, force=True)
    assert loraformat.verify(out, base, [adapter]).problems == ()


def test_renamed_base_and_adapter_are_the_same(tmp_path: Path, adapter: Path) -> None:
    base, out = write_base(tmp_path / "in", "safetensors"), tmp_path / "merged.safetensors"
    loraformat.merge(base, [adapter], out)
    base, adapter = base.rename(base.with_name("other.safetensors")), adapter.rename(tmp_path / "renamed")
    moved = out.rename(tmp_path / "moved.safetensors")
    assert loraformat.verify(moved, base, [adapter]).problems == ()


@pytest.mark.parametrize("form", FORMS)
def test_progress_adds_up(tmp_path: Path, adapter: Path, form: str) -> None:
    base = write_base(tmp_path / "in", form)
    out = tmp_path / f"merged{suffix_of(form)}"
    loraformat.merge(base, [adapter], out)

    class Counted:
        total = done = 0

        def start(self, total_bytes: int) -> None:
            self.total = total_bytes

        def advance(self, done_bytes: int) -> None:
            self.done += done_bytes

    counted = Counted()
    loraformat.verify(out, base, [adapter], progress=counted)
    assert counted.done == counted.total > 0


# --- damage ----------------------------------------------------------------------------------------------------------


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def _find(folder: Path, data: bytes) -> tuple[Path, int]:
    """Return the file below a folder that holds `data`, and where."""
    found = [(path, path.read_bytes().find(data)) for path in folder.rglob("*") if path.is_file()]
    return next((path, place) for path, place in found if place >= 0)


def _verify(out: Path, base: Path, adapter: Path) -> set[str]:
    """Return the codes of what is found or of why the model cannot be read."""
    try:
        found = loraformat.verify(out, base, [adapter])
    except loraformat.LoraformatError as error:
        return set(error.codes)
    assert not found.holds
    return codes(found)


@pytest.fixture(params=FORMS)
def merged(request: pytest.FixtureRequest, tmp_path: Path, adapter: Path) -> tuple[Path, Path]:
    base = write_base(tmp_path / "in", request.param)
    out = tmp_path / "out" / f"merged{base.suffix}"
    out.parent.mkdir()
    loraformat.merge(base, [adapter], out)
    return out, base


@pytest.mark.parametrize(("touched", "code"), [(True, "LF802"), (False, "LF801")])
def test_a_flipped_bit_is_named(merged: tuple[Path, Path], adapter: Path, touched: bool, code: str) -> None:
    out, base = merged
    new, old = read_model(out), read_model(base)
    name = next(name for name in new if (new[name] != old[name]) == touched and len(new[name][2]) > 60)
    path, place = _find(out.parent, new[name][2])
    _flip(path, place + 17)
    found = loraformat.verify(out, base, [adapter])
    assert not found.holds
    named = [problem for problem in found.problems if problem.code == code]
    assert [problem.where.rpartition(": ")[2] for problem in named] == [name]
    assert str(place + 17) in named[0].found


def test_every_file_is_compared_to_its_last_byte(merged: tuple[Path, Path], adapter: Path) -> None:
    """Six places of each file, the receipt's among them: none may hold anything else unnoticed."""
    out, base = merged
    for path in [path for path in out.parent.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for place in {*range(0, len(whole), max(1, len(whole) // 6)), len(whole) - 1}:
            _flip(path, place)
            assert _verify(out, base, adapter), (path.name, place)
            path.write_bytes(whole)
    assert loraformat.verify(out, base, [adapter]).holds


@pytest.mark.parametrize("change", ["longer", "shorter", "missing"])
def test_files_of_another_length_are_told(merged: tuple[Path, Path], adapter: Path, change: str) -> None:
    out, base = merged
    for path in [path for path in out.parent.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        if change == "missing":
            path.unlink()
        else:
            path.write_bytes(whole + b"x" if change == "longer" else whole[:-1])
        assert _verify(out, base, adapter), path.name
        path.write_bytes(whole)


@pytest.mark.parametrize("form", FOLDERS)
def test_a_file_more_is_told(tmp_path: Path, adapter: Path, form: str) -> None:
    base, out = write_base(tmp_path / "in", form), tmp_path / "merged"
    loraformat.merge(base, [adapter], out)
    (out / "more.json").write_text("{}")
    (problem,) = loraformat.verify(out, base, [adapter]).problems
    assert (problem.code, Path(problem.where).name) == ("LF804", "more.json")


def test_another_base_or_adapter_is_told(merged: tuple[Path, Path], adapter: Path, tmp_path: Path) -> None:
    out, base = merged
    assert "LF803" in _verify(out, base, write_adapter(tmp_path / "other", 2))
    other = copy_base(base, tmp_path / "copy")
    name, tensor = next((name, tensor) for name, tensor in read_model(other).items() if len(tensor[2]) == 480)
    path, place = _find(other.parent, tensor[2])
    _flip(path, place + 3)
    assert _verify(out, other, adapter) & {"LF801", "LF802", "LF902"}, name


# --- receipts --------------------------------------------------------------------------------------------------------

HOSTILE: dict[str, Any] = {
    "base": [None, 3, [], {}, {"structure_sha256": 3}],
    "plan_sha256": [None, 3, {}],
    "adapters": [None, {}, [3], [{}], [{"name": "x", "sha256": "y", "weight": "z"}], [{"name": 1}]],
    "weights": [None, {}, [3], [{}], []],
    "room_bytes": [None, -1, "3", 1e300, True, 10**18],
    "options": [[], {"output": "x"}, {"dtype": 3}, {"allow_unmatched": "x"}, {"anew": 1}],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, listed in HOSTILE.items() for value in listed])
def test_a_receipt_with_other_types_is_a_problem(tmp_path: Path, adapter: Path, field: str, value: Any) -> None:
    base, out = write_base(tmp_path / "in", "torch"), tmp_path / "merged.pt"
    loraformat.merge(base, [adapter], out)
    receipt = tmp_path / "merged.pt.merge_receipt.json"
    record = json.loads(receipt.read_text())
    receipt.write_text(json.dumps(record | {field: value}))
    assert "LF803" in _verify(out, base, adapter)
    del record[field]
    receipt.write_text(json.dumps(record))
    assert "LF803" in _verify(out, base, adapter) or field == "options"


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}"])
def test_a_receipt_that_is_none_is_a_problem(tmp_path: Path, adapter: Path, text: str) -> None:
    base, out = write_base(tmp_path / "in", "npz"), tmp_path / "merged.npz"
    loraformat.merge(base, [adapter], out)
    (tmp_path / "merged.npz.merge_receipt.json").write_text(text)
    assert _verify(out, base, adapter) <= {"LF803", "LF804", "LF102", "LF103", "LF104", "LF105"}


def test_no_character_of_a_receipt_can_change(tmp_path: Path, adapter: Path) -> None:
    """Names of files and fields that are not compared with anything are held by the receipt's own digest."""
    base, out = write_base(tmp_path / "in", "torch"), tmp_path / "merged.pt"
    loraformat.merge(base, [adapter], out)
    receipt = tmp_path / "merged.pt.merge_receipt.json"
    whole = receipt.read_bytes()
    told = [b'"name"', b'"bytes"', b"base.pt", b'"version"', b'"unmatched"', b'"sha256"', b'"targets"', b'"options"']
    for place in [whole.index(text) + len(text) - 2 for text in told]:
        _flip(receipt, place)
        assert _verify(out, base, adapter) == {"LF803"}, whole[place - 9 : place + 9]
        with pytest.raises(loraformat.LoraformatError, match="LF803"):
            loraformat.unmerge(out, adapters=[adapter], output=tmp_path / "back.pt")
        receipt.write_bytes(whole)
    earlier = {name: value for name, value in json.loads(whole).items() if name != "sha256"}
    receipt.write_text(json.dumps(earlier).ljust(len(whole) - 1) + "\n")
    assert loraformat.verify(out, base, [adapter]).holds, "of a version that wrote no digest"


def test_edited_numbers_of_a_receipt_are_told(tmp_path: Path, adapter: Path) -> None:
    base, out = write_base(tmp_path / "in", "torch"), tmp_path / "merged.pt"
    loraformat.merge(base, [adapter], out)
    receipt = tmp_path / "merged.pt.merge_receipt.json"
    whole = json.loads(receipt.read_text())
    for field, value in {"retained": 0.5, "relative": None, "error": 0.1, "targets": [], "scales": [3.0]}.items():
        record = json.loads(json.dumps(whole))
        record["weights"][0][field] = value
        receipt.write_text(json.dumps(record).ljust(whole["room_bytes"]) + "\n")
        (problem,) = loraformat.verify(out, base, [adapter]).problems
        assert problem.code == "LF803"
        assert problem.where.endswith(field)
    receipt.write_text(json.dumps(whole | {"plan_sha256": "0" * 64}).ljust(whole["room_bytes"]) + "\n")
    (problem,) = loraformat.verify(out, base, [adapter]).problems
    assert problem.where.endswith("plan_sha256")
