"""Proof after the fact: it holds for every form and manner, and names what was damaged."""

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
