"""export-runtime and export-adapter, from the command line to the bytes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from click.testing import Result

import graphs
from builders import write_peft
from graphs import dyadic, dyadic_factors, linear_net, write_model
from loraformat import runtime


def make(folder: Path) -> tuple[Path, Path, Path]:
    rng = np.random.default_rng(31)
    model = linear_net({"model.a": dyadic(rng, 24, 16), "model.b": dyadic(rng, 40, 32)}).model()
    one = write_peft(folder / "one", {"model.a": dyadic_factors(rng, 24, 16, 2)})
    other = write_peft(folder / "other", {"model.b": dyadic_factors(rng, 40, 32, 3)})
    return write_model(folder / "base.onnx", model, "one"), one, other


def test_a_model_and_its_adapters(tmp_path: Path, run: Callable[..., Result]) -> None:
    base, one, other = make(tmp_path)
    model, folder = tmp_path / "model.onnx", tmp_path / "out"
    words = ["--targets-of", one, "--targets-of", other, "-o", model, "--external-data", "share"]
    result = run("export-runtime", base, *words, "--adapters-out", folder)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split() == [str(model), *(str(folder / f"{n}.onnx_adapter") for n in ("one", "other"))]
    assert "2 pairs of inputs" in result.stderr
    later = run("export-adapter", model, f"{one}:0.5", other, "-o", folder / "both.onnx_adapter", "--json")
    assert json.loads(later.stdout)["ranks"] == {"model.a": 2, "model.b": 3}
    assert run("export-adapter", model, one, "-o", folder / "both.onnx_adapter").exit_code == 4
    x = {f"in.{name}": dyadic(np.random.default_rng(1), 3, size) for name, size in (("model.a", 16), ("model.b", 32))}
    half, whole = (runtime.adapter_feeds(model, [(one, weight)]) for weight in (0.5, 1.0))
    before, weak, strong = (graphs.run(model, x | feeds)[0] for feeds in ({}, half, whole))
    np.testing.assert_allclose(2 * (weak - before), strong - before, atol=1e-5)


def test_slots(tmp_path: Path, run: Callable[..., Result]) -> None:
    base, one, other = make(tmp_path)
    model = tmp_path / "batched.onnx"
    result = run("export-runtime", base, "--targets-of", one, "-o", model, "--batched", "2", "--json")
    found = json.loads(result.stdout)
    assert (found["batched"], [each["name"] for each in found["branches"]]) == (2, ["model.a"])
    result = run("export-adapter", model, one, other, "-o", tmp_path / "stack.onnx_adapter")
    assert (result.exit_code, "LF830" in result.stderr, "model.b" in result.stderr) == (1, True, True)
    words = ["-o", tmp_path / "stack.onnx_adapter", "--allow-unmatched", "model.b"]
    result = run("export-adapter", model, one, *words)
    assert result.stdout.strip() == str(tmp_path / "stack.onnx_adapter")
