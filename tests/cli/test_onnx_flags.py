"""Flags of merges into ONNX models, from the command line to the bytes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from click.testing import Result

from builders import lora_factors, write_peft, write_tensors
from graphs import Net, dyadic, dyadic_factors, linear_net, stored_weights, write_model
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


def make_few_bits(folder: Path) -> tuple[Path, Path, Path]:
    """Return a graph of 4 bits, an adapter for it, and the checkpoint that its codes were made of."""
    rng = np.random.default_rng(33)
    weight = rng.standard_normal((24, 32)).astype(np.float32)
    scales = (np.abs(weight).max(axis=1, keepdims=True) / 7).astype(np.float32)
    codes = (np.rint(weight / scales) + 8).astype(np.uint8).reshape(24, 1, 32)
    net = Net()
    inputs = [net.feed("x"), net.weight("w_Q4", codes[..., 0::2] | codes[..., 1::2] << 4), net.weight("w_s", scales)]
    sizes = {"bits": 4, "K": 32, "N": 24, "block_size": 32}
    net.op("MatMulNBits", inputs, net.result("y"), "/model/a/MatMul", domain="com.microsoft", **sizes)
    base = write_model(folder / "base.onnx", net.model(check=False))
    adapter = write_peft(folder / "adapter", {"model.a": lora_factors(rng, 24, 32, 2)})
    return base, adapter, write_tensors(folder / "model.safetensors", {"model.a.weight": weight})


def test_weights_of_four_bits(tmp_path: Path, run: Callable[..., Result]) -> None:
    base, adapter, checkpoint = make_few_bits(tmp_path)
    words = ["merge", base, adapter, "-o", tmp_path / "merged.onnx"]
    refused = run(*words)
    assert refused.exit_code == 1
    assert "--base-checkpoint" in refused.stderr
    assert "--on-quantized dequantize" in refused.stderr
    checked = ["verify", tmp_path / "merged.onnx", "--base", base, "--adapter", adapter]
    assert run(*words, "--base-checkpoint", checkpoint, "--any-rounding").exit_code == 0
    assert run(*checked, "--base-checkpoint", checkpoint).exit_code == 0
    assert run(*words, "--on-quantized", "dequantize", "--force").exit_code == 0
    assert run(*checked).exit_code == 0
    assert (tmp_path / "merged.onnx").stat().st_size > base.stat().st_size + 2000


def test_calibration_data_for_a_graph_without_ranges(tmp_path: Path, run: Callable[..., Result]) -> None:
    base, adapter = make(tmp_path)
    np.savez(tmp_path / "data.npz", x=np.zeros((1, 1, 16)))
    result = run("merge", base, adapter, "-o", tmp_path / "m.onnx", "--calibration", tmp_path / "data.npz")
    assert result.exit_code == 1
    assert "LF628" in result.stderr
    assert "no measured ranges" in result.stderr
