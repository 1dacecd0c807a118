"""Tables of codes whose scale stands where the looked-up codes are read, as QOperator graphs have them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper

import loraformat
from builders import write_peft, write_tensors
from graphs import Array, Net, run, stored_weights, write_model

ROWS, COLUMNS = 11, 6
MICROSOFT = {"domain": "com.microsoft"}
CODES = np.random.default_rng(1).integers(60, 200, (ROWS, COLUMNS)).astype(np.uint8)
STEP, ZERO = np.array(0.02, np.float32), np.array(120, np.uint8)
IDS = {"ids": np.arange(ROWS, dtype=np.int64)[None]}
ACCEPTED: Any = {"accept_ranges": True}


def look_up(net: Net, module: str = "embed") -> list[str]:
    if not any(each.name == "codes" for each in net.initializers):
        for name, values in {"codes": CODES, "step": STEP, "zero": ZERO, "wide": np.array(0.05, np.float32)}.items():
            net.initializers.append(numpy_helper.from_array(values, name))  # Scalars stay scalars.
        net.feed("ids", TensorProto.INT64)
    return [net.op("Gather", ["codes", "ids"], f"{module}_rows", f"/{module}/Gather_quant"), "step", "zero"]


def result(net: Net, value: str, name: str = "y") -> None:
    net.op("DequantizeLinear", [value, "wide", "zero"], net.result(name, rank=3), f"dequantise_{name}")


def doubled(net: Net, rows: list[str], made: str = "sum") -> str:
    return net.op("QLinearAdd", [*rows, *rows, "wide", "zero"], made, f"/{made}/Add", **MICROSOFT)


def adapt(folder: Path, module: str = "embed") -> tuple[Path, Array]:
    rng = np.random.default_rng(2)
    down, up = (rng.standard_normal(shape).astype(np.float32) * 0.4 for shape in ((2, ROWS), (COLUMNS, 2)))
    write_peft(folder, {}, r=2, alpha=2)
    arrays = {
        f"base_model.model.{module}.lora_embedding_{part}": each for part, each in zip("AB", (down, up), strict=True)
    }
    write_tensors(folder / "adapter_model.safetensors", arrays)
    return folder, (up @ down).T


def merge(folder: Path, net: Net) -> loraformat.Receipt:
    base = write_model(folder / "base.onnx", net.model(check=False))
    return loraformat.merge(base, [adapt(folder / "adapter")[0]], folder / "merged.onnx", **ACCEPTED)


def refusal(folder: Path, net: Net) -> tuple[str, ...]:
    with pytest.raises(loraformat.LoraformatError) as caught:
        merge(folder, net)
    return caught.value.codes


def test_every_reader_gets_the_new_scale(tmp_path: Path) -> None:
    net = Net()
    rows = look_up(net)
    flat = net.op("Squeeze", rows[:1], "flat", "squeeze")
    result(net, doubled(net, rows))
    net.op("DequantizeLinear", [flat, *rows[1:]], net.result("z"), "dequantise")
    receipt = merge(tmp_path, net)
    assert {problem.code for problem in receipt.problems} <= {"LF441"}
    after = stored_weights(tmp_path / "merged.onnx")
    assert after["step"] != STEP
    wanted = (CODES.astype(np.float64) - ZERO) * STEP + adapt(tmp_path / "again")[1]
    _, z = run(tmp_path / "merged.onnx", IDS)
    np.testing.assert_allclose(z, wanted, atol=float(after["step"]) * 0.51)
    verified = loraformat.verify(
        tmp_path / "merged.onnx", tmp_path / "base.onnx", [tmp_path / "adapter"], run=True, sizes={"ids_0": 1}
    )
    assert verified.holds
    assert {each.output for each in verified.runs} == {"y", "z"}


def test_one_of_two_tables_of_the_same_codes_gets_its_own(tmp_path: Path) -> None:
    net = Net()
    for module, name in (("embed", "y"), ("other", "z")):
        rows = look_up(net, module)
        result(net, doubled(net, rows, f"sum_{name}"), name)
    merge(tmp_path, net)
    before, after = run(tmp_path / "base.onnx", IDS), run(tmp_path / "merged.onnx", IDS)
    np.testing.assert_array_equal(before[1], after[1])
    change = (after[0] - before[0])[0] / 2
    np.testing.assert_allclose(change, adapt(tmp_path / "again")[1], atol=0.06)
    paths = (tmp_path / "merged.onnx", tmp_path / "base.onnx")
    assert loraformat.verify(*paths, [tmp_path / "adapter"], run=True, sizes={"ids_0": 1}).holds


def test_a_bias_in_steps_of_the_scale_keeps_it(tmp_path: Path) -> None:
    net = Net()
    rows = look_up(net)
    flat = net.op("Squeeze", rows[:1], "flat", "squeeze")
    weight = net.weight("w", np.random.default_rng(3).integers(-60, 60, (COLUMNS, 5)).astype(np.int8))
    held = [
        net.weight("w_scale", STEP),
        net.weight("w_zero", np.array(0, np.int8)),
        net.weight("b", np.arange(5, dtype=np.int32)),
    ]
    made = net.op("QGemm", [flat, *rows[1:], weight, *held, "wide", "zero"], "made", "/fc/Gemm", **MICROSOFT)
    net.op("DequantizeLinear", [made, "wide", "zero"], net.result("y"), "dequantise")
    (kept,) = [each for each in merge(tmp_path, net).problems if each.code == "LF442"]
    assert "'b'" in kept.found
    assert stored_weights(tmp_path / "merged.onnx")["step"] == STEP


def test_readers_that_take_the_codes_otherwise_are_refused(tmp_path: Path) -> None:
    net = Net()
    rows = look_up(net)
    result(net, doubled(net, rows))
    result(net, rows[0], "z")  # With the scale `wide`.
    assert refusal(tmp_path, net) == ("LF403",)


def test_codes_that_leave_the_graph_are_refused(tmp_path: Path) -> None:
    net = Net()
    rows = look_up(net)
    result(net, doubled(net, rows))
    net.op("Identity", rows[:1], net.result("z", TensorProto.UINT8, rank=3), "out")
    assert refusal(tmp_path, net) == ("LF403",)
