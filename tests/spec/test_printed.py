"""What our commands print under `--json` is what its JSON Schema says, and nothing beside it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

import builders
import loraformat
from graphs import Net, write_model
from loraformat.containers.safetensors import CONTAINER
from loraformat.receipt import RECEIPT_KEY
from loraformat_cli.group import root
from spec.cases import SPEC, vectors
from spec.schemas import NAMES, errors, validator


def run(*words: str | Path) -> tuple[int, Any]:
    """Run the command line and return its exit code and the JSON that it printed."""
    result = CliRunner().invoke(root, [str(word) for word in words], prog_name="loraformat")
    return result.exit_code, json.loads(result.stdout)


def make_models(folder: Path) -> dict[str, Path]:
    """A PEFT adapter, an ONNX base and a state dict that it fits, and the state dict after training."""
    dice = np.random.default_rng(0)
    weights = {
        name: dice.standard_normal((6, 5)).astype(np.float32) for name in ("model.0.q", "model.0.v", "model.1.q")
    }
    factors = {name: builders.lora_factors(dice, 6, 5, 2) for name in weights}
    tuned = {name: weight + factors[name][1] @ factors[name][0] for name, weight in weights.items()}
    rest = {"model.n.weight": np.ones((2, 2), np.int8), "model.norm.weight": np.ones(3, np.float32)}
    return {
        "folder": folder,
        "adapter": builders.write_peft(folder / "adapter", factors, alpha=4),
        "onnx": builders.write_onnx(folder / "base.onnx", weights),
        **{
            name: builders.write_tensors(
                folder / f"{name}.safetensors", {f"{each}.weight": array for each, array in arrays.items()} | rest
            )
            for name, arrays in (("base", weights), ("tuned", tuned))
        },
    }


@pytest.fixture
def model(tmp_path: Path) -> dict[str, Path]:
    return make_models(tmp_path)


def check(name: str, value: Any) -> None:
    """Demand that the schema holds, that it describes every field there is, and that no other may stand anywhere."""
    assert not errors(name, value)
    assert not errors(name, value, closed=True)
    assert not list(find_gaps(name, value))


def find_gaps(name: str, value: Any) -> Iterator[str]:
    """Yield the places in a document at which its closed schema takes a field that nobody knows."""
    copied = deepcopy(value)
    for place, record in iterate_objects(copied, "$"):
        record["a stranger"] = [[None]]
        if FREE.isdisjoint(place.split(".")) and validator(name, closed=True).is_valid(copied):
            yield place
        del record["a stranger"]


FREE = {"options", "config_changes", "receipt", "parent"}
"""Fields that hold what was asked for, and what stands in a file: receipts are as old as their models."""


def iterate_objects(value: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects in a document; of a list the first few, for the others are like them."""
    if isinstance(value, dict):
        yield place, value
        for name, item in list(value.items()):
            yield from iterate_objects(item, f"{place}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value[:3]):
            yield from iterate_objects(item, f"{place}[{index}]")


# --- every command ----------------------------------------------------------------------------------------------------

RUNS = (
    ("analysis", "analyse {adapter} {adapter} --base {base}"),
    ("conversion", "convert {adapter} --to mlx --dry-run"),
    ("conversion", "convert {adapter} --to mlx -o {folder}/mlx --verify"),
    ("made-adapter", "compose {adapter} {adapter}:0.5 --rank 1 -o {folder}/sum.safetensors"),
    ("made-adapter", "resize {adapter} --rank 1 -o {folder}/cut.safetensors"),
    ("made-adapter", "scale {adapter} 0.5 -o {folder}/half.safetensors"),
    ("demo", "demo"),
    ("difference", "diff {adapter} {folder}/cut.safetensors"),
    ("difference", "diff {base} {tuned}"),
    ("reasons", "explain"),
    ("reasons", "explain LF401"),
    ("runtime-export", "export-runtime {onnx} --targets-of {adapter} -o {folder}/rt.onnx --adapters-out {folder}/rt"),
    ("exported-adapter", "export-adapter {folder}/rt.onnx {adapter} -o {folder}/x.onnx_adapter"),
    ("extraction", "extract {tuned} --base {base} --rank 1 -o {folder}/extracted.safetensors"),
    ("initialisation", "init {base} --rank 2 --targets *.q -o {folder}/new.safetensors"),
    ("inspection", "inspect {adapter}"),
    ("inspection", "inspect {onnx}"),
    ("kinds", "kinds"),
    ("plan", "merge {onnx} {adapter} --dry-run"),
    ("receipt", "merge {base} {adapter} -o {folder}/merged.safetensors"),
    ("receipts", "merge {onnx} {adapter} {folder}/cut.safetensors --each -o {folder}/each"),
    ("resolution", "resolve {onnx} {adapter}"),
    ("schemes", "schemes"),
    ("scheme-pairs", "schemes --pairs"),
    ("stamped", "stamp {adapter} --base {base} -o {folder}/stamped.safetensors"),
    ("undone", "unmerge {folder}/merged.safetensors --adapter {adapter} -o {folder}/near.safetensors"),
    ("verdicts", "validate {adapter}"),
    ("verification", "verify {folder}/merged.safetensors --base {base} --adapter {adapter}"),
    ("problems", "resolve {onnx} {folder}/nothing"),
)
"""The name of a schema, and a command whose document is of it; some take what others before them have made."""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of every command of the table."""
    models = make_models(tmp_path_factory.mktemp("printed"))
    return {words: run(*(word.format(**models) for word in words.split()), "--json")[1] for _, words in RUNS}


@pytest.mark.parametrize(("name", "words"), RUNS, ids=[words for _, words in RUNS])
def test_what_a_command_prints_is_of_its_schema(name: str, words: str, printed: dict[str, Any]) -> None:
    check(name, printed[words])


def test_every_command_and_every_schema_has_its_row() -> None:
    context = click.Context(root)
    commands = {name: root.get_command(context, name) for name in root.list_commands(context)}
    printing = {name for name, command in commands.items() if command and "json" in {p.name for p in command.params}}
    assert {words.split()[0] for _, words in RUNS} == printing
    assert {name for name, _ in RUNS} | {"expected", "header", "manifest", "problem"} == set(NAMES)


def test_the_page_for_users_has_the_same_table() -> None:
    """In it a command stands with the options that choose its document, one row for each schema."""
    page = (SPEC.parent / "docs" / "json.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*`|any that fails) \| `([a-z-]+)` \|$", page, re.MULTILINE)
    said = {(name, command) for commands, name in rows for command in re.findall(r"`([a-z-]+)[^`]*`", commands)}
    assert said == {(name, words.split()[0]) for name, words in RUNS if name != "problems"}
    assert ("any that fails", "problems") in rows


def test_a_field_that_a_schema_lacks_is_found(printed: dict[str, Any]) -> None:
    """In any object, at any depth; and a document that lacks one of its fields."""
    document = printed["validate {adapter}"]
    document["verdicts"][0]["mood"] = "good"
    assert not errors("verdicts", document)
    assert errors("verdicts", document, closed=True)
    del document["verdicts"][0]["mood"], document["verdicts"][0]["scheme"]
    assert errors("verdicts", document)


# --- in more depth ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["onnx", "base"])
def test_plans_receipts_and_inspections(base: str, model: dict[str, Path], tmp_path: Path) -> None:
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


def test_plans_and_receipts_of_a_copied_weight(tmp_path: Path) -> None:
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


def test_verifications_and_undone_merges(model: dict[str, Path], tmp_path: Path) -> None:
    output, asked = tmp_path / "merged.safetensors", ("--base", model["base"], "--adapter", model["adapter"])
    run("merge", model["base"], model["adapter"], "-o", output, "--json")
    code, found = run("verify", output, *asked, "--json")
    assert (code, found["holds"], found["weights"]) == (0, True, 3)
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


def test_inspections_of_adapters(model: dict[str, Path]) -> None:
    check("inspection", run("inspect", model["adapter"], "--json")[1])
    for vector in vectors("valid"):
        check("inspection", run("inspect", vector.file, "--json")[1])


def test_inspections_of_bases(model: dict[str, Path]) -> None:
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


def test_failures(model: dict[str, Path], tmp_path: Path) -> None:
    for words, expected in (
        (("inspect", tmp_path / "nothing", "--json"), 3),
        (("merge", model["base"], "--json"), 2),
        (("merge", model["base"], model["adapter"], "-o", model["base"], "--json"), 4),
        (("merge", model["base"], vectors("invalid")[0].file, "--json"), 3),
    ):
        code, printed = run(*words)
        check("problems", printed)
        assert (code, printed["exit_code"]) == (expected, expected)
