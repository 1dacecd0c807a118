"""The record that a merged model carries."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import loraformat
from builders import write_peft
from graphs import dyadic_factors, linear_net, write_model
from loraformat.planning.wishes import SettledWishes
from loraformat.problems import Problem
from loraformat.receipt import _OPTIONS, RECEIPT_VERSION, AppliedAdapter, MergedWeight, Receipt
from models import write_adapter, write_base

RECEIPT = Receipt(
    output="/somewhere/out.onnx",
    base={"name": "base.onnx", "structure_sha256": "ab", "files": [{"name": "base.onnx", "bytes": 7}]},
    plan_sha256="cd",
    adapters=(AppliedAdapter("style", "ef", 0.5, 1),),
    weights=(MergedWeight("w", ("a",), (0.25,), 1.0, 0.01, 0.0),),
    unmatched=("b",),
    problems=(Problem("LF504", "w", "half", severity="warning"),),
)


def test_the_embedded_text_is_canonical_json_without_place_or_problems() -> None:
    record = json.loads(RECEIPT.embedded_text())
    assert record == {
        "sha256": hashlib.sha256(_write({name: item for name, item in record.items() if name != "sha256"})).hexdigest(),
        "version": RECEIPT_VERSION,
        "base": {"name": "base.onnx", "structure_sha256": "ab", "files": [{"name": "base.onnx", "bytes": 7}]},
        "plan_sha256": "cd",
        "adapters": [{"name": "style", "sha256": "ef", "weight": 0.5, "targets": 1}],
        "weights": [
            {"name": "w", "targets": ["a"], "scales": [0.25], "retained": 1.0, "relative": 0.01, "error": 0.0},
        ],
        "unmatched": ["b"],
        "room_bytes": 0,
        "options": {},
    }
    assert RECEIPT.embedded_text() == _write(record).decode()


def _write(record: Any) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()


def test_the_printed_record_has_both() -> None:
    record = RECEIPT.as_json()
    assert record["output"] == "/somewhere/out.onnx"
    assert [problem["code"] for problem in record["problems"]] == ["LF504"]
    json.dumps(record, allow_nan=False)


def test_the_parent_is_kept_whole() -> None:
    child = replace(RECEIPT, parent=json.loads(RECEIPT.embedded_text()))
    grandchild = replace(RECEIPT, parent=json.loads(child.embedded_text()))
    record = json.loads(grandchild.embedded_text())
    assert record["parent"]["parent"] == json.loads(RECEIPT.embedded_text())
    assert "parent" not in record["parent"]["parent"]


def test_a_receipt_may_state_each_wish_that_a_plan_can_have() -> None:
    assert _OPTIONS.keys() == SettledWishes.__annotations__.keys()


@pytest.mark.parametrize("relative", [math.inf, math.nan])
def test_a_number_that_json_lacks_is_null(relative: float) -> None:
    receipt = replace(RECEIPT, weights=(replace(RECEIPT.weights[0], relative=relative),))
    assert json.loads(receipt.embedded_text())["weights"][0]["relative"] is None
    assert receipt.as_json()["weights"][0]["relative"] is None


def test_names_may_hold_any_text(tmp_path: Path) -> None:
    """Names of weights come from files; the receipt inside a safetensors header is JSON inside JSON."""
    import numpy as np

    from graphs import make_adapter, make_target, read_state, write_state

    name = 'läyer."0"\\n/é😀'
    rng = np.random.default_rng(0)
    base = write_state(tmp_path / "base.safetensors", {f"{name}.weight": np.ones((6, 5), np.float32)})
    adapter = make_adapter(make_target(name, dyadic_factors(rng, 6, 5, 2)))
    receipt = loraformat.merge(base, [adapter], tmp_path / "out.safetensors")
    assert receipt.weights[0].targets == (name,)
    assert list(read_state(tmp_path / "out.safetensors")) == [f"{name}.weight"]
    found = loraformat.merge(tmp_path / "out.safetensors", [adapter], tmp_path / "again.safetensors")
    assert found.parent == json.loads(receipt.embedded_text())


def test_what_a_merge_returns_is_what_it_did(tmp_path: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    arrays = {f"layers.{index}.fc": rng.standard_normal((6, 5)).astype(np.float32) for index in (0, 1, 2)}
    base = write_model(tmp_path / "base.onnx", linear_net(arrays).model())
    factors = {name: dyadic_factors(rng, 6, 5, 2) for name in list(arrays)[:2]}
    adapter = write_peft(tmp_path / "style", factors | {"gone": dyadic_factors(rng, 6, 5, 2)}, alpha=4)
    plan = loraformat.plan_merge(base, [(adapter, 0.5)], allow_unmatched=["gone"])
    receipt = loraformat.merge(base, [(adapter, 0.5)], allow_unmatched=["gone"])
    assert receipt.output == str(tmp_path / "base-style@0.5.onnx")
    assert receipt.plan_sha256 == plan.sha256
    assert receipt.base == plan.base
    assert receipt.unmatched == ("gone",)
    assert [(a.name, a.weight, a.targets, a.sha256) for a in receipt.adapters] == [
        ("style", 0.5, 2, loraformat.load(adapter).sha256)
    ]
    assert len(receipt.adapters[0].sha256) == 64
    assert sorted(w.targets[0] for w in receipt.weights) == list(arrays)[:2]
    assert {w.scales for w in receipt.weights} == {(1.0,)}


def test_a_parent_with_a_number_that_cannot_be_written_again_is_told(tmp_path: Path) -> None:
    """A merge into a merged model copies its receipt."""
    base, adapter = write_base(tmp_path / "in", "folder"), write_adapter(tmp_path / "style")
    loraformat.merge(base, [adapter], tmp_path / "one")
    receipt = tmp_path / "one" / "merge_receipt.json"
    receipt.write_text(json.dumps(json.loads(receipt.read_text()) | {"room_bytes": 2**53 + 1}))
    with pytest.raises(loraformat.LoraformatError, match="LF104"):
        loraformat.merge(tmp_path / "one", [adapter], tmp_path / "two")
    assert not (tmp_path / "two").exists()
