"""Flags of merges into ONNX models, from the command line to the bytes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from click.testing import Result

from builders import write_peft
from graphs import dyadic, dyadic_factors, linear_net, stored_weights, write_model
from stacks import NAMES, RANK, SHAPES, Stack


def make(folder: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(31)
    model = linear_net({"model.a": dyadic(rng, 24, 16), "model.b": dyadic(rng, 40, 32)}).model()
    adapter = write_peft(folder / "adapter", {"model.a": dyadic_factors(rng, 24, 16, 2)})
    return write_model(folder / "base.onnx", model, "one"), adapter


def test_a_sharing_merge_is_run_and_proven(tmp_path: Path, run: Callable[..., Result]) -> None:
    base, adapter = make(tmp_path)
    merged = tmp_path / "merged.onnx"
    assert run("merge", base, adapter, "-o", merged, "--external-data", "share").exit_code == 0
    assert (tmp_path / "merged.onnx.data").stat().st_size == 24 * 16 * 4
    words = ["verify", merged, "--base", base, "--adapter", adapter, "--run"]
    sizes = ["--size", "in.model.a_1=16", "--size", "in.model.b_1=32"]
    result = run(*words, *sizes)
    assert result.exit_code == 0
    assert "output out.model.a: 100.0000% of the change" in result.stderr
    found = json.loads(run(*words, *sizes, "--json").stdout)
    assert [each["output"] for each in found["runs"]] == ["out.model.a", "out.model.b"]
    assert run(*words).exit_code == 1  # Sizes that do not fit.


def test_another_folder_cannot_share(tmp_path: Path, run: Callable[..., Result]) -> None:
    base, adapter = make(tmp_path)
    (tmp_path / "other").mkdir()
    result = run("merge", base, adapter, "-o", tmp_path / "other" / "merged.onnx", "--external-data", "share")
    assert result.exit_code == 4
    assert "LF444" in result.stderr


def test_layers_without_names_are_found_on_request(tmp_path: Path, run: Callable[..., Result]) -> None:
    rng, stack = np.random.default_rng(32), Stack(layers=1)
    names = {f"model.layers.0.{NAMES[role]}": SHAPES[role] for role in stack.roles()}
    adapter = write_peft(tmp_path / "adapter", {n: dyadic_factors(rng, *shape, RANK) for n, shape in names.items()})
    base, merged = write_model(tmp_path / "base.onnx", stack.net.model()), tmp_path / "merged.onnx"
    assert run("merge", base, adapter, "-o", merged).exit_code == 1
    assert run("merge", base, adapter, "-o", merged, "--resolve", "structure").exit_code == 0
    words = ["verify", merged, "--base", base, "--adapter", adapter]
    assert run(*words).exit_code == 1
    assert run(*words, "--resolve", "structure").exit_code == 0
    table = run("resolve", base, adapter, "--resolve", "structure")
    assert "gate of layer 0" in table.stdout
    (tmp_path / "map.json").write_text(run("resolve", base, adapter, "--resolve", "structure", "--json").stdout)
    mapped = tmp_path / "mapped.onnx"
    assert run("merge", base, adapter, "-o", mapped, "--map", tmp_path / "map.json").exit_code == 0
    one, other = (stored_weights(path) for path in (merged, mapped))
    assert all((one[name] == other[name]).all() for name in one)
