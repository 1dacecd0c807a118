"""`loraformat convert` and `loraformat schemes`: what goes where, and how it ends."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from builders import write_tensors

Run = Callable[..., Result]
NAME = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    dice = np.random.default_rng(0)
    arrays = {
        f"{NAME}.lora_down.weight": dice.standard_normal((2, 5)).astype(np.float32),
        f"{NAME}.lora_up.weight": dice.standard_normal((18, 2)).astype(np.float32),
        f"{NAME}.alpha": np.array(1.0, np.float32),
    }
    return write_tensors(tmp_path / "a.safetensors", arrays)


def test_the_path_is_all_that_stdout_gets(run: Run, adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    result = run("convert", adapter, "--to", "diffusers", "-o", output, "--verify")
    assert result.exit_code == 0
    assert result.stdout == f"{output}\n"
    assert "read as kohya: 2 of 3 tensors" in result.stderr
    assert "tensors: 2 converted, 1 carried, 0 refused; targets: 3" in result.stderr
    assert "compared 1 modules in float64; largest relative difference: 0" in result.stderr
    assert output.exists()


def test_a_dry_run_prints_the_operations(run: Run, adapter: Path) -> None:
    result = run("convert", adapter, "--to", "diffusers", "--dry-run", "-v")
    assert result.exit_code == 0
    line = next(line for line in result.stdout.splitlines() if "to_k.lora_B" in line)
    assert line.split("  ")[1:] != []
    assert "rows 6:12" in line
    assert f"{NAME}.lora_up.weight" in line
    grouped = run("convert", adapter, "--to", "kohya", "--dry-run").stdout
    assert "keep" in grouped
    assert "lora_unet_double_blocks_*_img_attn_qkv.lora_up.weight" in grouped


def test_a_dry_run_of_what_cannot_be_done_ends_with_one(run: Run, tmp_path: Path) -> None:
    roles = {"lora_A": (2, 5), "lora_B": (6, 2)}
    names = {f"diffusion_model.strange.0.layer.{role}.weight": shape for role, shape in roles.items()}
    path = write_tensors(tmp_path / "b.safetensors", {name: np.ones(shape, "f") for name, shape in names.items()})
    result = run("convert", path, "--to", "kohya", "--dry-run")
    assert result.exit_code == 1
    assert "LF310" in result.stderr


def test_json(run: Run, adapter: Path, tmp_path: Path) -> None:
    planned = json.loads(run("convert", adapter, "--to", "dotted", "--dry-run", "--json").stdout)
    assert (planned["from"], planned["to"], planned["output"]) == ("kohya", "dotted", None)
    output = tmp_path / "out.safetensors"
    done = json.loads(run("convert", adapter, "--to", "dotted", "-o", output, "--json", "--verify").stdout)
    assert done["proof"] == {"modules": 1, "differing": 0, "largest_relative": 0.0, "worst": None, "missing": []}
    refused = run("convert", adapter, "--to", "nothing", "-o", output, "--json")
    assert (refused.exit_code, json.loads(refused.stdout)["problems"][0]["code"]) == (1, "LF305")


def test_it_must_be_said_where_to_write(run: Run, adapter: Path) -> None:
    result = run("convert", adapter, "--to", "dotted")
    assert result.exit_code == 2
    assert "-o" in result.stderr
    assert run("convert", adapter, "-o", "x").exit_code == 2


def test_the_schemes(run: Run) -> None:
    result = run("schemes")
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
    assert "read, write" in lines["kohya"]
    assert "read, write" not in lines["xlabs"]
    listed = json.loads(run("schemes", "--json").stdout)["schemes"]
    assert {each["name"] for each in listed} == set(lines)
