"""The JSON Schemas: sound themselves, of one mind with our reader, and true of what our commands print."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

import builders
import loraformat
from graphs import Net, write_model
from loraformat.containers.safetensors import CONTAINER
from loraformat.errors import LoraformatError
from loraformat.manifest import parse_manifest
from loraformat.receipt import RECEIPT_KEY
from loraformat.strict_json import parse_json_object
from loraformat_cli.group import root
from spec.cases import ALL, Vector, vectors
from spec.schemas import FOLDER, NAMES, errors, schema, validator


def test_the_schemas_are_schemas() -> None:
    assert len(NAMES) >= 11
    for name in NAMES:
        Draft202012Validator.check_schema(schema(name))
        assert schema(name)["$id"] == f"urn:loraformat:1.0:{name}"
        assert schema(name)["title"]
        assert schema(name)["description"].endswith(".")
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.schema.json" for name in NAMES}


@pytest.mark.parametrize("vector", ALL, ids=lambda vector: vector.name)
def test_expectations_are_of_their_schema(vector: Vector) -> None:
    assert not errors("expected", vector.expected)


# --- one mind with the reader -----------------------------------------------------------------------------------------

NUMBER_FORMS = "JSON Schema takes 2.0 for an integer; the specification asks how the number is written (section 1)"
MANIFEST_DIFFERENCES: Mapping[str, str] = {
    "invalid/rank-with-a-fraction": NUMBER_FORMS,
    "invalid/fingerprint-of-a-shape-with-a-fraction": NUMBER_FORMS,
}
HEADER_DIFFERENCES: Mapping[str, str] = {
    "invalid/shape-with-a-fraction": NUMBER_FORMS,
    "invalid/shape-with-an-exponent": NUMBER_FORMS,
    "invalid/offsets-with-a-fraction": NUMBER_FORMS,
    "invalid/offsets-negative": f"{NUMBER_FORMS}; -0 is one",
}
ARITHMETIC = {"LF107", "LF108"}
"""Offsets and sizes, which no schema can see."""
FILES = vectors("valid") + vectors("invalid")


def disagree(vector: Vector, known: Mapping[str, str], *, schema_accepts: bool, reader_accepts: bool) -> bool:
    """Say whether schema and reader differ, or do not differ where the table of differences says so."""
    return (schema_accepts and not reader_accepts) != (vector.name in known) or (reader_accepts and not schema_accepts)


def is_manifest(text: str) -> bool:
    try:
        return bool(parse_manifest(text, "manifest").targets)
    except LoraformatError:
        return False


def test_the_schema_of_manifests_and_the_reader_agree() -> None:
    wrong, asked = [], 0
    for vector in FILES:
        try:
            text = CONTAINER.open(vector.file).metadata["loraformat"]
            parse_json_object(text.encode(), "manifest")
        except (LoraformatError, KeyError):
            continue
        asked += 1
        accepts = not errors("manifest", json.loads(text))
        if disagree(vector, MANIFEST_DIFFERENCES, schema_accepts=accepts, reader_accepts=is_manifest(text)):
            wrong.append(vector.name)
    assert not wrong
    assert asked > 100


def test_the_schema_of_headers_and_the_reader_agree() -> None:
    wrong, asked = [], 0
    for vector in FILES:
        data = vector.file.read_bytes()
        text = data[8 : 8 + int.from_bytes(data[:8], "little")]
        try:
            reader_accepts = "loraformat" in CONTAINER.open(vector.file).metadata
        except LoraformatError as error:
            reader_accepts = bool(set(error.codes) & ARITHMETIC)
            if not reader_accepts and set(error.codes) & {"LF101", "LF102", "LF103", "LF104", "LF105", "LF111"}:
                continue
        asked += 1
        accepts = not errors("header", json.loads(text))
        if disagree(vector, HEADER_DIFFERENCES, schema_accepts=accepts, reader_accepts=reader_accepts):
            wrong.append(vector.name)
    assert not wrong
    assert asked > 100


def test_the_schema_of_headers_takes_a_null_for_no_metadata_as_no_adapter() -> None:
    assert errors("header", {"__metadata__": None})
    assert errors("header", {})
    assert not errors("header", {"__metadata__": {"loraformat": "{}"}})


# --- what commands print ----------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> dict[str, Path]:
    """A PEFT adapter, and an ONNX base and a state dict that it fits."""
    dice = np.random.default_rng(0)
    weights = {name: dice.standard_normal((6, 5)).astype(np.float32) for name in ("model.a.q", "model.a.v")}
    factors = {name: builders.lora_factors(dice, 6, 5, 2) for name in weights}
    return {
        "adapter": builders.write_peft(tmp_path / "adapter", factors, alpha=4),
        "onnx": builders.write_onnx(tmp_path / "base.onnx", weights),
        "base": builders.write_tensors(
            tmp_path / "base.safetensors",
            {f"{name}.weight": weight for name, weight in weights.items()}
            | {"model.a.n.weight": np.ones((2, 2), np.int8), "model.a.norm.weight": np.ones(3, np.float32)},
        ),
    }


@pytest.fixture
def run() -> Callable[..., tuple[int, Any]]:
    """Run the command line and return its exit code and the JSON that it printed."""

    def invoke(*words: str | Path) -> tuple[int, Any]:
        result = CliRunner().invoke(root, [str(word) for word in words], prog_name="loraformat")
        return result.exit_code, json.loads(result.stdout)

    return invoke


def check(name: str, value: Any) -> None:
    """Demand that the schema holds, and that it describes every field there is."""
    assert not errors(name, value)
    assert not errors(name, value, closed=True)


@pytest.mark.parametrize("base", ["onnx", "base"])
def test_plans_receipts_and_inspections(base: str, model: dict[str, Path], run: Any, tmp_path: Path) -> None:
    output = tmp_path / f"merged{model[base].suffix}"
    merging = ["merge", model[base], f"{model['adapter']}:0.5", "-o", output, "--json"]
    code, plan = run(*merging, "--dry-run")
    assert code == 0
    check("plan", plan)
    code, receipt = run(*merging)
    assert code == 0
    check("receipt", receipt)
    assert {"output", "problems"} <= receipt.keys()
    code, inspection = run("inspect", output, "--json")
    assert code == 0
    check("inspection", inspection)
    check("receipt", inspection["receipt"])
    again = loraformat.merge(output, [model["adapter"]], tmp_path / f"again{model[base].suffix}")
    check("receipt", json.loads(again.embedded_text()))
    check("receipt", json.loads(again.embedded_text())["parent"])


def test_plans_and_receipts_of_a_copied_weight(run: Any, tmp_path: Path) -> None:
    """Two modules read one tensor, and one of them is adapted."""
    rng = np.random.default_rng(8)
    net = Net()
    weight = net.weight("w", rng.standard_normal((5, 6)).astype(np.float32))
    for module in ("a", "b"):
        net.op("MatMul", [net.feed(f"x{module}"), weight], net.result(f"y{module}"), f"/{module}/MatMul")
    base, output = write_model(tmp_path / "base.onnx", net.model()), tmp_path / "merged.onnx"
    adapter = builders.write_peft(tmp_path / "adapter", {"a": builders.lora_factors(rng, 6, 5, 2)}, alpha=4)
    code, plan = run("merge", base, adapter, "-o", output, "--json", "--dry-run")
    assert (code, plan["weights"][0]["new"]["copied_from"]) == (0, "w")
    check("plan", plan)
    code, receipt = run("merge", base, adapter, "-o", output, "--json")
    assert (code, receipt["weights"][0]["copied_from"]) == (0, "w")
    check("receipt", receipt)


def test_verifications_and_undone_merges(model: dict[str, Path], run: Any, tmp_path: Path) -> None:
    output, asked = tmp_path / "merged.safetensors", ("--base", model["base"], "--adapter", model["adapter"])
    run("merge", model["base"], model["adapter"], "-o", output, "--json")
    code, found = run("verify", output, *asked, "--json")
    assert (code, found["holds"], found["weights"]) == (0, True, 2)
    check("verification", found)
    graph = tmp_path / "merged.onnx"
    run("merge", model["onnx"], model["adapter"], "-o", graph, "--json")
    code, found = run("verify", graph, "--base", model["onnx"], *asked[2:], "--run", "--json")
    assert (code, found["holds"]) == (0, True)
    assert found["runs"]
    check("verification", found)
    code, undone = run("unmerge", output, "--adapter", model["adapter"], "-o", tmp_path / "near.safetensors", "--json")
    assert (code, undone["exact"]) == (0, False)
    check("undone", undone)
    output.write_bytes(output.read_bytes()[:-1] + b"\x7e")
    code, found = run("verify", output, *asked, "--json")
    assert (code, found["holds"]) == (1, False)
    assert found["problems"]
    check("verification", found)


def test_a_state_dict_carries_its_receipt(model: dict[str, Path], tmp_path: Path) -> None:
    receipt = loraformat.merge(model["base"], [model["adapter"]], tmp_path / "merged.safetensors")
    text = CONTAINER.open(tmp_path / "merged.safetensors").metadata[RECEIPT_KEY]
    assert text.rstrip() == receipt.embedded_text()
    check("receipt", json.loads(text))


def test_the_receipt_of_a_merge_into_zeros(tmp_path: Path) -> None:
    base = builders.write_tensors(tmp_path / "zeros.safetensors", {"m.weight": np.zeros((4, 3), np.float32)})
    factors = builders.lora_factors(np.random.default_rng(1), 4, 3, 2)
    adapter = builders.write_peft(tmp_path / "adapter", {"m": factors})
    check("receipt", json.loads(json.dumps(loraformat.merge(base, [adapter], tmp_path / "o.safetensors").as_json())))


def test_inspections_of_adapters(model: dict[str, Path], run: Any) -> None:
    check("inspection", run("inspect", model["adapter"], "--json")[1])
    for vector in vectors("valid"):
        check("inspection", run("inspect", vector.file, "--json")[1])


def test_inspections_of_bases(model: dict[str, Path], run: Any) -> None:
    for base in ("onnx", "base"):
        check("inspection", run("inspect", model[base], "--json")[1])


def test_verdicts(model: dict[str, Path]) -> None:
    folders = [str(vectors(kind)[0].folder.parent) for kind in ("valid", "invalid")]
    command = [sys.executable, "-m", "loraformat", "validate", *folders, str(model["adapter"]), "--format", "json"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 1
    verdicts = json.loads(done.stdout)
    check("verdicts", verdicts)
    assert len(verdicts["verdicts"]) == 1 + sum(len(vectors(kind, pending=True)) for kind in ("valid", "invalid"))


def test_failures(model: dict[str, Path], run: Any, tmp_path: Path) -> None:
    for words, expected in (
        (("inspect", tmp_path / "nothing", "--json"), 3),
        (("merge", model["base"], "--json"), 2),
        (("merge", model["base"], model["adapter"], "-o", model["base"], "--json"), 4),
        (("merge", model["base"], vectors("invalid")[0].file, "--json"), 3),
    ):
        code, printed = run(*words)
        check("problems", printed)
        assert (code, printed["exit_code"]) == (expected, expected)


def test_a_schema_that_is_closed_finds_an_undescribed_field() -> None:
    value = {"problems": [], "exit_code": 1, "more": 1}
    assert len(errors("problems", value, closed=True)) == len(errors("problems", value)) + 1
    assert validator("problems") is not validator("problems", closed=True)
