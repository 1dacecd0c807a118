"""This package passes every conformance vector."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import loraformat
from loraformat.adapter import SlotKind, Target
from loraformat.api import validate
from loraformat.containers.safetensors import CONTAINER
from loraformat.kinds import KINDS
from spec.cases import CODES_OF_THE_SPEC, PENDING, VECTORS, Vector, read, vectors


def named(kind: str, verdict: str) -> pytest.MarkDecorator:
    chosen = [vector for vector in vectors(kind) if vector.expected["verdict"] == verdict]
    return pytest.mark.parametrize("vector", chosen, ids=lambda vector: vector.name)


def shapes_of(target: Target) -> dict[str, Any]:
    shapes = {change.parameter: list(change.shape) for change in KINDS.find(target.kind).changes(target)}
    return {"shapes": shapes} if target.slot is SlotKind.PARAMETER else {"shape": shapes["weight"]}


@named("valid", "valid")
def test_a_valid_file_is_read_as_it_is_meant(vector: Vector) -> None:
    adapter, problems = read(vector.file)
    assert adapter is not None
    assert all(problem.severity != "error" for problem in problems)
    # What else our validator warns of is its own affair.
    assert {problem.code for problem in problems} & CODES_OF_THE_SPEC == set(vector.expected["problems"])
    seen = {
        target.name: {
            "kind": target.kind,
            "slot": target.slot.value,
            "rank": target.rank,
            "scale": target.scale,
            **shapes_of(target),
        }
        for target in adapter.targets
    }
    assert seen == vector.expected["targets"]


@named("valid", "valid")
def test_a_valid_file_has_one_canonical_form(vector: Vector, tmp_path: Path) -> None:
    if "canonical_codes" in vector.expected:
        with pytest.raises(loraformat.LoraformatError) as caught:
            loraformat.save(loraformat.load(vector.file), tmp_path / "none.safetensors")
        assert list(caught.value.codes) == vector.expected["canonical_codes"]
        return
    written = loraformat.save(loraformat.load(vector.file), tmp_path / "canonical.safetensors")
    assert loraformat.load(written).sha256 == vector.expected["canonical_sha256"]
    again = loraformat.save(loraformat.load(written), tmp_path / "again.safetensors")
    assert again.read_bytes() == written.read_bytes()


def test_what_is_pending_is_not_passed() -> None:
    """An entry that has become untrue is to be removed from the table."""
    for vector in (Vector(VECTORS / name) for name in PENDING):
        adapter, problems = read(vector.file)
        refused = adapter is None or any(problem.severity == "error" for problem in problems)
        judged = "invalid" if refused else "valid"
        assert judged != vector.expected["verdict"], f"{vector.name} is passed: take it off the table in cases.py"


@named("invalid", "invalid")
def test_an_invalid_file_is_refused_for_its_reason(vector: Vector) -> None:
    _, problems = read(vector.file)
    codes = {problem.code for problem in problems if problem.severity == "error"}
    assert codes
    assert codes <= set(vector.expected["codes"]), [str(problem) for problem in problems]


@named("invalid", "invalid")
def test_validate_finds_something_in_each_invalid_file(vector: Vector) -> None:
    (verdict,) = validate(vector.file)
    assert verdict.reaches("error")


def nested(levels: int) -> Any:
    value: Any = "innermost"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("provenance", [{"deep": nested(31)}, {"seed": 2**53 + 1}, {"text": "\ud800"}], ids=str)
def test_a_writer_refuses_what_a_reader_would(provenance: Any, tmp_path: Path) -> None:
    adapter = loraformat.load(VECTORS / "valid" / "minimal" / "adapter.safetensors")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.save(replace(adapter, provenance=provenance), tmp_path / "written.safetensors")
    assert caught.value.codes == ("LF104",)
    assert not list(tmp_path.iterdir())


def merge(vector: Vector, base: Path, output: Path) -> None:
    adapters = [(vector.folder / item["file"], item["weight"]) for item in vector.expected["adapters"]]
    least = vector.expected.get("min_retained", float("-inf"))
    loraformat.merge(base, adapters, output, min_retained=least)


@named("merge", "merged")
def test_a_merge_gives_these_bits(vector: Vector, tmp_path: Path) -> None:
    for name, tensors in vector.expected["merged"].items():
        output = tmp_path / name
        merge(vector, vector.folder / name, output)
        merged = CONTAINER.open(output).tensors
        assert {key: tensor.read().tobytes().hex() for key, tensor in merged.items()} == tensors
        before = CONTAINER.open(vector.folder / name).tensors
        assert {key: (tensor.dtype, tensor.shape) for key, tensor in merged.items()} == {
            key: (tensor.dtype, tensor.shape) for key, tensor in before.items()
        }


@named("merge", "refused")
def test_a_merge_is_refused_for_its_reason(vector: Vector, tmp_path: Path) -> None:
    (base,) = vector.folder.glob("base.*")
    with pytest.raises(loraformat.LoraformatError) as caught:
        merge(vector, base, tmp_path / "merged.safetensors")
    assert set(caught.value.codes) <= set(vector.expected["codes"]), str(caught.value)
    assert not list(tmp_path.iterdir())


@named("convert", "converted")
def test_a_folder_becomes_this_file(vector: Vector, tmp_path: Path) -> None:
    adapter = loraformat.load(vector.folder / "peft", scheme=vector.expected["source"])
    written = loraformat.save(adapter, tmp_path / "native.safetensors")
    assert written.read_bytes() == (vector.folder / "native.safetensors").read_bytes()
    assert loraformat.load(written).sha256 == vector.expected["sha256"]
    assert not [problem for problem in read(written)[1] if problem.severity == "error"]


def test_merging_twice_is_not_merging_both(tmp_path: Path) -> None:
    """The vectors `one-rounding-*` tell a merge with one rounding from two merges."""
    for vector in vectors("merge"):
        if not vector.folder.name.startswith("one-rounding"):
            continue
        ((base, tensors),) = vector.expected["merged"].items()
        first = tmp_path / f"first.{base}"
        loraformat.merge(vector.folder / base, [vector.folder / "adapter1.safetensors"], first, min_retained=-9)
        second = tmp_path / f"second.{base}"
        loraformat.merge(first, [vector.folder / "adapter2.safetensors"], second, min_retained=-9)
        (tensor,) = CONTAINER.open(second).tensors.values()
        assert tensor.read().tobytes().hex() != tensors[tensor.name]
