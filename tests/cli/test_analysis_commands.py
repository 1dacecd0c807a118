"""extract, analyse and init from the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

import loraformat
from builders import write_peft, write_tensors

Run = Callable[..., Result]


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    base = {f"m.{i}.q.weight": rng.standard_normal((40, 24)).astype("f4") for i in range(2)}
    change = (rng.standard_normal((40, 2)) @ rng.standard_normal((2, 24))).astype("f4")
    tuned = base | {"m.0.q.weight": base["m.0.q.weight"] + change}
    return write_tensors(tmp_path / "tuned.safetensors", tuned), write_tensors(tmp_path / "base.safetensors", base)


def test_extract(run: Run, models: tuple[Path, Path], tmp_path: Path) -> None:
    tuned, base = models
    output = tmp_path / "a.safetensors"
    result = run("extract", tuned, "--base", base, "-o", output, "-v")
    assert result.exit_code == 0
    assert result.stdout == f"{output}\n"
    assert "1 exact, 1 unchanged" in result.stderr
    assert "m.0.q.weight" in result.stderr
    assert [(target.name, target.rank) for target in loraformat.load(output).targets] == [("m.0.q", 2)]
    shown = json.loads(run("extract", tuned, "--base", base, "-o", output, "--force", "--json", "--rank", "1").stdout)
    assert shown["counts"]["truncated"] == 1
    assert 0 < shown["error"] < 1
    assert shown["output"] == str(output)


def test_extract_ends_with_the_reason(run: Run, models: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("extract", models[1], "--base", models[1], "-o", tmp_path / "a.safetensors")
    assert result.exit_code == 1
    assert "LF720" in result.stderr
    both = run("extract", *models, "-o", tmp_path / "a.safetensors", "--energy", "0.5", "--max-error", "0.1")
    assert both.exit_code == 2


def test_init(run: Run, models: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "new.safetensors"
    result = run("init", models[1], "--rank", "4", "--targets", "*.q", "-o", output)
    assert (result.exit_code, result.stdout) == (0, f"{output}\n")
    assert "leaves the base as it is" in result.stderr
    changed = run(
        "init", models[1], "--rank", "4", "--targets", "*.q", "--method", "pissa", "-o", output, "--force", "--json"
    )
    assert json.loads(changed.stdout)["changes_base"] is True
    assert "LF729" in changed.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "covariance"],
        ["--stats", "seen.npz"],
        ["--smoothness", "1"],
        ["--method", "covariance", "--stats", "seen.npz", "--smoothness", "1", "--sparsity", "0.5"],
        ["--alpha", "0"],
        ["--method", "best"],
    ],
)
def test_words_that_do_not_go_together(words: list[str], run: Run, models: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "new.safetensors"
    assert run("init", models[1], "--rank", "4", "--targets", "*.q", "-o", output, *words).exit_code == 2
    assert not output.exists()


def test_init_by_covariance(run: Run, models: tuple[Path, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "seen.npz", **{f"m.{i}.q": rng.standard_normal((60, 24)) for i in range(2)})
    words: list[Any] = ["init", models[1], "--rank", "4", "--targets", "*.q", "--method", "covariance"]
    words += ["--stats", tmp_path / "seen.npz", "--sparsity", "0.2", "-o", tmp_path / "new.safetensors"]
    assert run(*words).exit_code == 0
    adapter = loraformat.load(tmp_path / "new.safetensors")
    assert adapter.provenance["initialised"] == {"method": "covariance", "seed": 0, "sparsity": 0.2}
    assert not all(target.factors["lora_A.weight"].read().all() for target in adapter.targets)


def test_analyse(run: Run, models: tuple[Path, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    names = [f"m.{i}.q" for i in range(2)]
    folders = [
        write_peft(
            tmp_path / name,
            {n: (rng.standard_normal((r, 24)).astype("f4"), rng.standard_normal((40, r)).astype("f4")) for n in names},
        )
        for name, r in (("one", 2), ("two", 3))
    ]
    result = run("analyse", *folders, "--base", models[1], "--html", tmp_path / "page.html", "-v")
    assert result.exit_code == 0
    for expected in ("one: 2 targets", "amplified", "one and two: 2 targets in common", "phi(r,r)", "m.1.q"):
        assert expected in result.stdout
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    again = run("analyse", *folders, "--html", tmp_path / "page.html")
    assert again.exit_code == 4
    shown = json.loads(run("analyse", folders[0], "--json").stdout)
    assert [target["name"] for target in shown["adapters"][0]["targets"]] == names
