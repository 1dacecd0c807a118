"""Rows of trained tokens, and a tied head that the base has as a tensor of its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

import loraformat
from builders import MemoryFactor, write_tensors
from graphs import Array, Net, make_adapter, run, write_model
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target

EMBED, HEAD = "model.embed_tokens", "lm_head"
V, D = 24, 10
RNG = np.random.default_rng(5)
TABLE = RNG.standard_normal((V, D)).astype(np.float32)
OTHER = RNG.standard_normal((V, D)).astype(np.float32)
TOKENS = [20, 3]
ROWS = np.asarray(2 * RNG.standard_normal((2, D)), np.float32)
FEEDS = {"ids": np.arange(V).reshape(1, V), "x": RNG.standard_normal((4, D)).astype(np.float32)}
PRODUCTS = ["MatMul", "Gemm", "Gemm turned", "Transpose"]


def tokens(name: str, rows: Array = ROWS, indices: list[int] = TOKENS) -> Target:
    factor = {"trainable_tokens_delta": MemoryFactor("trainable_tokens_delta", rows)}
    scaling = Scaling(ScalingRule.MULTIPLIER, 1.0)
    return Target(name, "tokens", SlotKind.PARAMETER, factor, 0, scaling, options={"token_indices": indices})


def adapter(*more: Target) -> Adapter:
    return make_adapter(tokens(EMBED), *more)


def replaced(table: NDArray[Any], rows: Array = ROWS) -> NDArray[Any]:
    changed = table.copy()
    changed[TOKENS] = rows
    return changed


def start() -> Net:
    net = Net()
    held = net.weight(f"{EMBED}.weight", TABLE)
    net.op("Gather", [held, net.feed("ids", TensorProto.INT64)], net.result("embedded", rank=3), f"/{EMBED}/Gather")
    return net


def write_floats(path: Path, head: NDArray[Any] = TABLE, product: str = "MatMul") -> Path:
    net = start()
    x, y, node = net.feed("x"), net.result("logits"), f"/{HEAD}/{product.split()[0]}"
    if product == "Gemm":
        net.op("Gemm", [x, net.weight("onnx::Gemm_9", head)], y, node, transB=1)
    elif product == "Gemm turned":
        net.op("Gemm", [x, net.weight("onnx::Gemm_9", head.T)], y, node)
    elif product == "Transpose":
        turned = net.op("Transpose", [net.weight(f"{HEAD}.weight", head)], "turned", f"/{HEAD}/Transpose", perm=[1, 0])
        net.op("MatMul", [x, turned], y, f"/{HEAD}/MatMul")
    else:
        net.op("MatMul", [x, net.weight("onnx::MatMul_9", head.T)], y, node)
    return write_model(path, net.model())


def write_codes(path: Path, head: NDArray[Any] = TABLE) -> Path:
    """Write a graph whose head is in codes of 8 bits, a scale for each token."""
    net = start()
    scales = np.asarray(np.abs(head).max(axis=1) / 100, np.float32)
    codes = np.rint(head / scales[:, None]).astype(np.int8)
    inputs = [net.weight("codes", codes.T), net.weight("scales", scales), net.weight("zeros", np.zeros(V, np.int8))]
    net.op("DequantizeLinear", inputs, "head", f"/{HEAD}/DequantizeLinear", axis=1)
    net.op("MatMul", [net.feed("x"), "head"], net.result("logits"), f"/{HEAD}/MatMul")
    return write_model(path, net.model())


def said(found: Any) -> list[tuple[str, str]]:
    return [(problem.code, problem.severity) for problem in found.problems]


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_head_gets_the_rows_of_the_table(tmp_path: Path, product: str) -> None:
    base, merged = write_floats(tmp_path / "base.onnx", product=product), tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, [adapter()], merged)
    assert said(receipt) == [("LF648", "note")]
    assert len(receipt.weights) == 2
    embedded, logits = run(merged, FEEDS)
    np.testing.assert_array_equal(embedded[0], replaced(TABLE))
    np.testing.assert_allclose(logits, FEEDS["x"] @ replaced(TABLE).T, atol=1e-5)
    assert loraformat.verify(merged, base, [adapter()]).holds


def write_one_tensor(path: Path) -> Path:
    net = start()
    turned = net.op("Transpose", [f"{EMBED}.weight"], "turned", f"/{HEAD}/Transpose", perm=[1, 0])
    net.op("MatMul", [net.feed("x"), turned], net.result("logits"), f"/{HEAD}/MatMul")
    return write_model(path, net.model())


def test_one_tensor_for_both_is_changed_once(tmp_path: Path) -> None:
    base, merged = write_one_tensor(tmp_path / "base.onnx"), tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, [adapter()], merged)
    assert (said(receipt), len(receipt.weights)) == ([("LF648", "note")], 1)
    np.testing.assert_allclose(run(merged, FEEDS)[1], FEEDS["x"] @ replaced(TABLE).T, atol=1e-5)
    assert loraformat.verify(merged, base, [adapter()]).holds


@pytest.mark.parametrize("stated", [True, False])
def test_one_tensor_of_tables_that_are_not_tied(tmp_path: Path, stated: bool) -> None:
    """Exporters store equal tensors once: the table gets a copy, as the configuration or the user says."""
    base, merged = write_one_tensor(tmp_path / "base.onnx"), tmp_path / "merged.onnx"
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}' if stated else "{}")
    receipt = loraformat.merge(base, [adapter()], merged, untie=not stated)
    assert said(receipt) == [("LF417", "note")]
    embedded, logits = run(merged, FEEDS)
    np.testing.assert_array_equal(embedded[0], replaced(TABLE))
    np.testing.assert_array_equal(logits, run(base, FEEDS)[1])


def test_a_head_of_other_numbers_is_left(tmp_path: Path) -> None:
    base, merged = write_floats(tmp_path / "base.onnx", OTHER), tmp_path / "merged.onnx"
    assert said(loraformat.merge(base, [adapter()], merged)) == []
    np.testing.assert_array_equal(run(merged, FEEDS)[1], run(base, FEEDS)[1])


@pytest.mark.parametrize("place", ["", "onnx"])
def test_a_configuration_that_does_not_tie_is_heard(tmp_path: Path, place: str) -> None:
    (tmp_path / "model" / place).mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text('{"tie_word_embeddings": false}')
    plan = loraformat.plan_merge(write_floats(tmp_path / "model" / place / "base.onnx"), [adapter()], tmp_path / "out")
    assert (said(plan), len(plan.weights)) == ([], 1)


def test_the_head_is_kept_on_request(tmp_path: Path) -> None:
    base, merged = write_floats(tmp_path / "base.onnx"), tmp_path / "merged.onnx"
    assert said(loraformat.merge(base, [adapter()], merged, untie=True)) == [("LF649", "note")]
    np.testing.assert_array_equal(run(merged, FEEDS)[1], run(base, FEEDS)[1])


def test_a_head_with_rows_of_its_own_gets_these(tmp_path: Path) -> None:
    base, merged = write_floats(tmp_path / "base.onnx"), tmp_path / "merged.onnx"
    assert said(loraformat.merge(base, [adapter(tokens(HEAD, ROWS + 1))], merged)) == []
    embedded, logits = run(merged, FEEDS)
    np.testing.assert_array_equal(embedded[0], replaced(TABLE))
    np.testing.assert_allclose(logits, FEEDS["x"] @ replaced(TABLE, ROWS + 1).T, atol=1e-5)


def test_a_head_that_was_cast_is_known_again(tmp_path: Path) -> None:
    net = start()
    cast = net.op("Cast", [net.weight(f"{HEAD}.weight", TABLE.T.astype(np.float16))], "cast", to=TensorProto.FLOAT)
    net.op("MatMul", [net.feed("x"), cast], net.result("logits"), f"/{HEAD}/MatMul")
    base, merged = write_model(tmp_path / "base.onnx", net.model()), tmp_path / "merged.onnx"
    assert said(loraformat.merge(base, [adapter()], merged)) == [("LF648", "note")]
    np.testing.assert_allclose(run(merged, FEEDS)[1], FEEDS["x"] @ replaced(TABLE).T, atol=1e-2)


def test_a_head_of_codes_gets_the_rows(tmp_path: Path) -> None:
    base, merged = write_codes(tmp_path / "base.onnx"), tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, [adapter()], merged)
    assert ("LF648", "note") in said(receipt)
    before, after = run(base, FEEDS)[1], run(merged, FEEDS)[1]
    expected = FEEDS["x"] @ replaced(TABLE).T
    assert np.abs(after - expected)[:, TOKENS].max() < 0.1 < np.abs(before - expected)[:, TOKENS].max()
    np.testing.assert_array_equal(np.delete(after, TOKENS, 1), np.delete(before, TOKENS, 1))


@pytest.mark.parametrize("tied", [True, False, None])
def test_codes_that_are_only_near(tmp_path: Path, tied: bool | None) -> None:
    """As calibrated quantisers move numbers: the configuration decides, and without one there is a warning."""
    near = TABLE + np.asarray(0.2 * OTHER, np.float32)
    base = write_codes(tmp_path / "base.onnx", near)
    (tmp_path / "config.json").write_text(json.dumps({} if tied is None else {"tie_word_embeddings": tied}))
    plan = loraformat.plan_merge(base, [adapter()], tmp_path / "out.onnx")
    expected = {True: [("LF648", "note")], None: [("LF649", "warning")], False: []}
    assert [each for each in said(plan) if each[0] in ("LF648", "LF649")] == expected[tied]
    assert len(plan.weights) == (2 if tied else 1)


def test_a_head_that_nothing_can_be_merged_into(tmp_path: Path) -> None:
    """One that something else reads cannot change; the table alone can, on request."""
    net = start()
    head = net.weight("onnx::MatMul_9", TABLE.T)
    net.op("MatMul", [net.feed("x"), head], net.result("logits"), f"/{HEAD}/MatMul")
    net.op("Identity", [head], net.result("numbers"), "/Identity")
    base = write_model(tmp_path / "base.onnx", net.model())
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.plan_merge(base, [adapter()], tmp_path / "out.onnx")
    assert set(caught.value.codes) <= {"LF402", "LF649"}
    assert all("--untie" in problem.advice for problem in caught.value.problems)
    assert len(loraformat.plan_merge(base, [adapter()], tmp_path / "out.onnx", untie=True).weights) == 1


@pytest.mark.parametrize("tied", [False, None])
def test_a_checkpoint_with_two_equal_tables(tmp_path: Path, tied: bool | None) -> None:
    path = write_tensors(tmp_path / "model.safetensors", {f"{EMBED}.weight": TABLE, f"{HEAD}.weight": TABLE})
    (tmp_path / "config.json").write_text(json.dumps({} if tied is None else {"tie_word_embeddings": tied}))
    plan = loraformat.plan_merge(path, [adapter()], tmp_path / "out.safetensors")
    assert {weight.name for weight in plan.weights} == {f"{EMBED}.weight", f"{HEAD}.weight"} - (
        set() if tied is None else {f"{HEAD}.weight"}
    )


def test_a_constant_tells_nothing(tmp_path: Path) -> None:
    tables = {f"{name}.weight": np.ones((V, D), np.float32) for name in (EMBED, "model.other_table")}
    path = write_tensors(tmp_path / "model.safetensors", tables)
    assert len(loraformat.plan_merge(path, [adapter()], tmp_path / "out.safetensors").weights) == 1
