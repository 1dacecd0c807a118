"""What a notebook prints of the face's records: one line that says what it is, however many weights it has."""

from pathlib import Path

import numpy as np

import loraformat
from graphs import make_adapter
from loraformat.problems import Problem, count_problems
from models import IN, MODULES, OUT, RANK, make_state, write_adapter, write_base


def test_records_of_a_merge(tmp_path: Path) -> None:
    base, folder = write_base(tmp_path, "safetensors"), write_adapter(tmp_path / "style")
    adapter = loraformat.load(folder)
    source = repr(str(folder))
    expected = (
        f"<Adapter {source}: 2 targets (2 lora of rank {RANK}), {2 * RANK * (IN + OUT)} numbers, peft, for 'a/base'>"
    )
    assert repr(adapter) == expected
    assert repr(adapter.targets[0]).startswith(f"<Target {MODULES[0]!r}: lora on linear, rank {RANK}, scale ")
    factor = adapter.targets[0].factors["lora_A.weight"]
    name = f"base_model.model.{MODULES[0]}.lora_A.weight"
    assert repr(factor) == f"<tensor {name!r}: float32 [{RANK}, {IN}] in adapter_model.safetensors>"
    assert repr(2 * adapter).startswith("<Adapter ")
    merged = tmp_path / "merged.safetensors"
    plan = loraformat.plan_merge(base, [(adapter, 0.5)], merged)
    assert repr(plan) == f"<Plan: 'style' * 0.5 into 2 weights of 'base.safetensors', to {str(merged)!r}; no problems>"
    receipt = loraformat.merge(base, [adapter], merged)
    assert repr(receipt).startswith(f"<Receipt: 'style' merged into 2 weights of {str(merged)!r}; at least 1.000")
    assert "holds; 2 weights" in repr(loraformat.verify(merged, base, [adapter]))
    state = loraformat.merge_state_dict(make_state(), [adapter])
    assert repr(state).startswith(f"<MergedState: {len(make_state())} tensors; <Receipt: 'style' merged into 2 weights")


def test_records_of_a_look(tmp_path: Path) -> None:
    base, folder = write_base(tmp_path, "safetensors"), write_adapter(tmp_path / "style")
    records = [
        loraformat.inspect(folder),
        loraformat.inspect(base),
        loraformat.validate(folder)[0],
        loraformat.resolve_targets(base, folder),
        loraformat.diff(folder, folder),
        loraformat.analyse([folder]),
        loraformat.plan_conversion(folder, "mlx"),
        loraformat.init(base, 2, ["layers.0.fc"]),
    ]
    for record in records:
        text = repr(record)
        assert text.startswith(f"<{type(record).__name__}")
        assert "\n" not in text
        assert len(text) < 400
    assert repr(make_adapter()) == "<Adapter in memory: no targets, 0 numbers, native>"
    assert "of <Adapter" in repr(records[0])
    assert "none; 2 shared" in repr(records[4])


def test_arrays_are_not_printed() -> None:
    adapter = loraformat.load(
        {
            "base_model.model.fc.lora_A.weight": np.ones((1, 500)),
            "base_model.model.fc.lora_B.weight": np.ones((600, 1)),
        },
        alpha=1,
    )
    (target,) = adapter.targets
    assert repr(target.factors["lora_A.weight"]).endswith(": float64 [1, 500]>")


def test_counts_of_problems() -> None:
    problems = [Problem("LF214", "a", "b", severity=each) for each in ("note", "error", "note")]
    assert count_problems(problems) == "1 error, 2 notes"
    assert count_problems([]) == "no problems"
