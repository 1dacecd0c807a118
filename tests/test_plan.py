"""A plan is data: the same wherever it is made, complete in what it complains about, made without reading weights."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import loraformat
from builders import lora_factors, write_peft
from graphs import (
    Array,
    dyadic_factors,
    linear_net,
    make_adapter,
    make_target,
    weigh,
    write_model,
    write_state,
)
from loraformat.adapter import Adapter, ScalingRule, SlotKind
from loraformat.limits import TILE_BYTES
from loraformat.loading import open_base
from loraformat.plan import Plan
from loraformat.plan.weights import as_matrix, count_tile_rows
from loraformat.planning import build_plan, describe_base
from loraformat.problems import Problem
from loraformat.spans import InputFile

OUT, IN, RANK = 70, 50, 2
NAMES = ("model.layers.0.fc", "model.layers.1.fc")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(31)


def make_case(folder: Path, form: str = "onnx", seed: int = 0, times: int = 1) -> tuple[Path, Path]:
    """Write a base and a PEFT folder into `folder`; return their paths."""
    rng = np.random.default_rng(seed)
    rows = OUT * times
    arrays = {name: rng.standard_normal((rows, IN)).astype(np.float32) for name in NAMES}
    folder.mkdir(parents=True, exist_ok=True)
    if form == "safetensors":
        base = write_state(folder / "base.safetensors", {f"{name}.weight": array for name, array in arrays.items()})
    else:
        base = write_model(folder / "base.onnx", linear_net(arrays).model(), "one" if form == "external" else "")
    return base, write_peft(folder / "style", {name: lora_factors(rng, rows, IN, RANK) for name in NAMES})


def plan_of(base: Path, *adapters: Any, **options: Any) -> Plan:
    return loraformat.plan_merge(base, list(adapters), **options)


def refused(base: Path, *adapters: Any, **options: Any) -> loraformat.LoraformatError:
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.plan_merge(base, list(adapters), **options)
    return caught.value


# --- the digest ------------------------------------------------------------------------------------------------------

CHILD = """
import sys, loraformat
for base, adapter, output in zip(*[iter(sys.argv[1:])] * 3):
    print(loraformat.plan_merge(base, [adapter], output).sha256)
"""


def test_the_digest_does_not_depend_on_folders_or_hash_seeds(tmp_path: Path) -> None:
    expected, asked = [], []
    for form in ("onnx", "external", "safetensors"):
        base, adapter = make_case(tmp_path / form, form)
        expected.append(plan_of(base, adapter).sha256)
        moved = Path(shutil.copytree(tmp_path / form, tmp_path / "a" / "far" / form))
        asked += [moved / base.name, moved / adapter.name, tmp_path / f"{form}.out"]
        assert plan_of(*asked[-3:-1], output=moved / "elsewhere.out").sha256 == expected[-1]
    for seed in ("0", "4711"):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *asked],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == expected


def test_the_digest_is_that_of_what_decides_the_numbers(tmp_path: Path, rng: np.random.Generator) -> None:
    base, adapter = make_case(tmp_path / "one")
    other_base, other_adapter = make_case(tmp_path / "two", seed=1)
    plan = plan_of(base, adapter)
    weight = plan.weights[0]
    different = {
        "again": plan,
        "user's weight": plan_of(base, (adapter, 0.5)),
        "twice": plan_of(base, adapter, adapter),
        "another adapter of the same shapes": plan_of(base, other_adapter),
        "tile": replace(plan, weights=(replace(weight, tile_rows=1), *plan.weights[1:])),
        "a weight less": replace(plan, weights=plan.weights[:1]),
        "left out": replace(plan, unmatched=("x",)),
        "scale": plan_of(base, write_peft(tmp_path / "scaled" / "style", {NAMES[0]: lora_factors(rng, OUT, IN, 2)})),
        "safetensors": plan_of(make_case(tmp_path / "three", "safetensors")[0], adapter),
    }
    assert len({item.sha256 for item in different.values()}) == len(different)
    same_structure = plan_of(other_base, adapter)
    assert same_structure.sha256 == plan.sha256, "numbers of the base are not read"
    assert replace(plan, output=Path("elsewhere"), problems=()).sha256 == plan.sha256
    found_otherwise = tuple(replace(weight, evidence="a map") for weight in plan.weights)
    assert replace(plan, weights=found_otherwise).sha256 == plan.sha256


def test_the_order_of_adapters_is_part_of_it(tmp_path: Path) -> None:
    """Float addition is not associative: another order may give other last bits."""
    base, one = make_case(tmp_path / "one")
    _, other = make_case(tmp_path / "two", seed=1)
    assert plan_of(base, one, other).sha256 != plan_of(base, other, one).sha256


def test_its_json_is_strict_and_complete(tmp_path: Path) -> None:
    base, adapter = make_case(tmp_path)
    plan = plan_of(base, adapter)
    record = json.loads(json.dumps(plan.as_json(), allow_nan=False))
    assert record["sha256"] == plan.sha256
    assert [weight["name"] for weight in record["weights"]] == [weight.name for weight in plan.weights]
    assert record["weights"][0]["changes"][0]["target"] in NAMES
    assert record["weights"][0]["evidence"] == plan.weights[0].evidence != ""


# --- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "weight", "rank"), [(16, 1.0, 2), (3, 0.5, 4), (-8, 2.0, 1), (1, -1.5, 5)])
@pytest.mark.parametrize("rslora", [False, True])
def test_scales_are_alpha_over_rank_times_the_user_s_weight(
    tmp_path: Path, rng: np.random.Generator, alpha: float, weight: float, rank: int, rslora: bool
) -> None:
    base, _ = make_case(tmp_path)
    factors = {NAMES[0]: lora_factors(rng, OUT, IN, rank)}
    adapter = write_peft(tmp_path / "scaled", factors, alpha=alpha, use_rslora=rslora)
    (planned,) = plan_of(base, (adapter, weight)).weights
    assert planned.scales == (pytest.approx(weight * alpha / (rank**0.5 if rslora else rank)),)
    assert planned.ranks == (rank,)
    assert planned.targets == (NAMES[0],)


def test_weights_are_sorted_and_changes_stand_in_the_order_of_adapters(tmp_path: Path) -> None:
    base, one = make_case(tmp_path / "one")
    _, other = make_case(tmp_path / "two", seed=1)
    plan = plan_of(base, other, (one, 0.5))
    assert [weight.name for weight in plan.weights] == sorted(weight.name for weight in plan.weights)
    assert [[change.adapter for change in weight.changes] for weight in plan.weights] == [[0, 1], [0, 1]]
    assert [(item.weight, item.targets) for item in plan.adapters] == [(1.0, 2), (0.5, 2)]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 1), 1),
        ((10, 3), 10),
        ((100_000, 64), TILE_BYTES // (4 * 64)),
        ((5, TILE_BYTES), 1),
        ((7, TILE_BYTES // 4), 1),
        ((7, TILE_BYTES // 8), 2),
        ((1280, 64, 3, 3), TILE_BYTES // (4 * 64 * 9)),
    ],
    ids=str,
)
def test_tiles_are_whole_rows_of_about_the_set_size(shape: tuple[int, ...], expected: int) -> None:
    assert count_tile_rows(as_matrix(shape)) == expected


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([("style", 1.0)], "base-style.onnx"),
        ([("style", 0.5)], "base-style@0.5.onnx"),
        ([("a", -1.0), ("b", 1.0)], "base-a@-1-b.onnx"),
    ],
)
def test_the_output_is_named_after_what_goes_in(tmp_path: Path, items: list[tuple[str, float]], expected: str) -> None:
    base, adapter = make_case(tmp_path)
    copies = [(shutil.copytree(adapter, tmp_path / "named" / name), weight) for name, weight in items]
    assert plan_of(base, *copies).output == base.with_name(expected)


# --- what stands against a merge -------------------------------------------------------------------------------------


def test_every_problem_of_every_adapter_is_collected(tmp_path: Path, rng: np.random.Generator) -> None:
    base, good = make_case(tmp_path)
    broken = dyadic_factors(rng, OUT, IN, RANK)
    broken[0][1, 3] = np.nan
    first = make_adapter(
        make_target(NAMES[0], broken),
        make_target(NAMES[1], dyadic_factors(rng, OUT, IN, RANK), scale=0.0),
    )
    second = make_adapter(
        make_target("absent.one", dyadic_factors(rng, OUT, IN, RANK)),
        make_target(NAMES[0], dyadic_factors(rng, OUT, IN + 1, RANK)),
        make_target("absent.two", dyadic_factors(rng, OUT, IN, RANK)),
    )
    error = refused(base, good, first, (second, float("nan")), (second, 1.0))
    assert sorted(error.codes) == ["LF207", "LF208", "LF401", "LF401", "LF405", "LF501"]
    assert all(problem.severity == "error" for problem in error.problems)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("role", [0, 1])
@pytest.mark.parametrize("form", [np.float32, np.float16, np.float64])
def test_factors_that_are_not_finite_are_placed(
    tmp_path: Path, rng: np.random.Generator, bad: float, role: int, form: Any
) -> None:
    base, _ = make_case(tmp_path)
    factors = tuple(factor.astype(form) for factor in dyadic_factors(rng, OUT, IN, RANK))
    place = (1, 7) if role == 0 else (7, 1)
    factors[role][place] = bad
    factors[role][-1, -1] = bad
    error = refused(base, make_adapter(make_target(NAMES[0], (factors[0], factors[1]))))
    assert error.codes == ("LF501",)
    assert f"{'lora_A.weight' if role == 0 else 'lora_B.weight'}" in error.problems[0].where
    assert NAMES[0] in error.problems[0].where
    assert f"2 of {factors[role].size}" in error.problems[0].found
    assert str(place) in error.problems[0].found


def test_a_factor_of_zeros_is_a_warning(tmp_path: Path, rng: np.random.Generator) -> None:
    base, _ = make_case(tmp_path)
    down, up = dyadic_factors(rng, OUT, IN, RANK)
    plan = plan_of(base, make_adapter(make_target(NAMES[0], (down, np.zeros_like(up)))))
    assert [(problem.code, problem.severity) for problem in plan.problems] == [("LF214", "warning")]
    assert len(plan.weights) == 1


@pytest.mark.parametrize("where", ["target", "user"])
def test_scales_of_zero_are_refused_unless_asked_for(tmp_path: Path, rng: np.random.Generator, where: str) -> None:
    base, _ = make_case(tmp_path)
    scale, weight = (0.0, 1.0) if where == "target" else (1.0, 0.0)
    adapter = make_adapter(make_target(NAMES[0], dyadic_factors(rng, OUT, IN, RANK), scale=scale))
    assert refused(base, (adapter, weight)).codes == ("LF208",)
    assert plan_of(base, (adapter, weight), allow_zero=True).weights[0].scales == (0.0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["target", "user"])
def test_scales_that_are_no_numbers_are_refused(
    tmp_path: Path, rng: np.random.Generator, where: str, bad: float
) -> None:
    base, _ = make_case(tmp_path)
    scale, weight = (bad, 1.0) if where == "target" else (1.0, bad)
    adapter = make_adapter(make_target(NAMES[0], dyadic_factors(rng, OUT, IN, RANK), scale=scale))
    assert refused(base, (adapter, weight), allow_zero=True).codes == ("LF207",)


def test_a_scale_that_overflows_only_as_a_product_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    base, _ = make_case(tmp_path)
    factors = dyadic_factors(rng, OUT, IN, RANK)
    for scale, weight in ((1e300, 1e300), (1e30, 1e30), (1e300, 1.0)):
        adapter = make_adapter(make_target(NAMES[0], factors, scale=scale))
        assert refused(base, (adapter, weight)).codes == ("LF207",)
    plan_of(base, (make_adapter(make_target(NAMES[0], factors, scale=1e300)), 1e-290))


def test_factors_beyond_float32_are_not_finite(tmp_path: Path, rng: np.random.Generator) -> None:
    base, _ = make_case(tmp_path)
    down, up = (factor.astype(np.float64) for factor in dyadic_factors(rng, OUT, IN, RANK))
    down[0, 0] = 1e300
    assert refused(base, make_adapter(make_target(NAMES[0], (down, up)))).codes == ("LF501",)


def test_kinds_that_are_not_merged_are_refused_by_name(tmp_path: Path, rng: np.random.Generator) -> None:
    base, _ = make_case(tmp_path)
    factors = dyadic_factors(rng, OUT, IN, RANK)
    error = refused(base, make_adapter(make_target(NAMES[0], factors, kind="lora of next year")))
    assert error.codes == ("LF209",)
    assert "lora of next year" in str(error)


def test_problems_of_the_reader_of_the_adapter_stand_against_it(tmp_path: Path, rng: np.random.Generator) -> None:
    base, _ = make_case(tmp_path)
    target = make_target(NAMES[0], dyadic_factors(rng, OUT, IN, RANK))
    note = Problem("LF304", "names", "a prefix", severity="note")
    against = Problem("LF215", "config", "PiSSA")
    assert refused(base, make_adapter(target, problems=(note, against))).codes == ("LF215",)
    assert plan_of(base, make_adapter(target, problems=(note,))).problems == (note,)


@pytest.mark.parametrize("form", [np.int8, np.int32, np.uint8])
def test_weights_of_integers_are_refused(tmp_path: Path, rng: np.random.Generator, form: Any) -> None:
    base = write_state(tmp_path / "base.safetensors", {"a.weight": np.ones((OUT, IN), form)})
    error = refused(base, make_adapter(make_target("a", dyadic_factors(rng, OUT, IN, RANK))))
    assert error.codes == ("LF403",)
    assert np.dtype(form).name in str(error)


def test_leaving_out_every_target_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    base, _ = make_case(tmp_path)
    adapter = make_adapter(make_target("absent", dyadic_factors(rng, OUT, IN, RANK)))
    assert refused(base, adapter, allow_unmatched=["*"]).codes == ("LF401",)


def test_what_was_left_out_is_said(tmp_path: Path, rng: np.random.Generator) -> None:
    base, _ = make_case(tmp_path)
    adapter = make_adapter(
        make_target("absent", dyadic_factors(rng, OUT, IN, RANK)),
        make_target(NAMES[0], dyadic_factors(rng, OUT, IN, RANK)),
    )
    plan = plan_of(base, adapter, allow_unmatched=["abs*"])
    assert plan.unmatched == ("absent",)
    assert plan.adapters[0].targets == 1


def test_an_adapter_of_nothing_is_refused(tmp_path: Path) -> None:
    base, _ = make_case(tmp_path)
    assert refused(base, Adapter(())).codes == ("LF401",)


def test_rules_of_scaling_are_applied_once(tmp_path: Path, rng: np.random.Generator) -> None:
    base, _ = make_case(tmp_path)
    factors = dyadic_factors(rng, OUT, IN, 4)
    targets = {rule: make_adapter(make_target(NAMES[0], factors, scale=8.0, rule=rule)) for rule in ScalingRule}
    scales = {rule: plan_of(base, adapter).weights[0].scales[0] for rule, adapter in targets.items()}
    assert scales == {
        ScalingRule.ALPHA_OVER_RANK: 2.0,
        ScalingRule.ALPHA_OVER_SQRT_RANK: 4.0,
        ScalingRule.MULTIPLIER: 8.0,
    }


# --- what it reads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["onnx", "external", "safetensors"])
def test_no_weight_of_the_base_is_read(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = make_case(tmp_path, form, times=100)
    spans = [tensor.span for tensor in open_base(base).list_tensors() if tensor.span.length > 4096]
    assert len(spans) == 2
    reads: list[tuple[Path, int, int]] = []
    read_into = InputFile.read_into

    def noting(self: InputFile, buffer: memoryview | Array, offset: int) -> None:
        view = buffer.cast("B") if isinstance(buffer, memoryview) else buffer.data.cast("B")
        reads.append((self.path, offset, offset + len(view)))
        read_into(self, buffer, offset)

    monkeypatch.setattr(InputFile, "read_into", noting)
    plan_of(base, adapter)
    ours = [(start, end) for path, start, end in reads if path == base]
    assert ours, "the check looks at the wrong function"
    for span in spans:
        inside = [(p, a, b) for p, a, b in reads if p == span.path and a < span.end and span.offset < b]
        read = sum(min(b, span.end) - max(a, span.offset) for _, a, b in inside)
        # The walk over an ONNX file reads by windows, which may reach into the first bytes of a weight.
        assert read <= ((1 << 18) if form == "onnx" else 0)
        assert span.length > 1 << 20


def test_planning_writes_nothing(tmp_path: Path) -> None:
    base, adapter = make_case(tmp_path)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    plan_of(base, adapter, output=tmp_path / "out.onnx")
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_build_plan_takes_opened_things_as_they_are(tmp_path: Path, rng: np.random.Generator) -> None:
    base, _ = make_case(tmp_path, "safetensors")
    adapter = make_adapter(make_target(NAMES[0], dyadic_factors(rng, OUT, IN, RANK), SlotKind.LINEAR))
    plan = build_plan(open_base(base), [weigh(adapter, 2.0, "mine")], tmp_path / "out")
    assert [(item.name, item.weight) for item in plan.adapters] == [("mine", 2.0)]
    assert plan.weights[0].file == "base.safetensors"


def test_data_files_of_one_name_in_two_folders_are_both_told() -> None:
    places = (("a", 1), ("b", 2))
    files = [SimpleNamespace(path=Path("/m") / folder / "w.bin", size_bytes=size) for folder, size in places]
    base = SimpleNamespace(path=Path("/m/base.onnx"), folder_mark="", structure_sha256="0", files=files)
    told = describe_base(cast(Any, base))["files"]
    assert told == [{"name": "a/w.bin", "bytes": 1}, {"name": "b/w.bin", "bytes": 2}]
