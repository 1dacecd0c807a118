"""The public face: what it exports, what its functions take, and the file that `save` makes."""

import hashlib
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from pkgutil import iter_modules
from types import FunctionType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

import loraformat
from builders import MemoryFactor, lora_factors, read_onnx, write_onnx, write_peft, write_tensors
from graphs import linear_net, write_model
from loraformat import runtime
from loraformat.adapter import Adapter, BaseBinding, Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.errors import LoraformatError
from loraformat.fingerprint import Fingerprint
from loraformat.loading import open_base

DICE = np.random.default_rng(5)
FACTORS = {"model.q": lora_factors(DICE, 6, 4, 2), "model.v": lora_factors(DICE, 3, 5, 2)}
WEIGHTS = {name: DICE.standard_normal((up.shape[0], down.shape[1])) for name, (down, up) in FACTORS.items()}
WEIGHTS = {name: weight.astype(np.float32) for name, weight in WEIGHTS.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_peft(tmp_path / "style", FACTORS, alpha=4)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "base.onnx", WEIGHTS)


def codes_of(call: Any) -> tuple[str, ...]:
    with pytest.raises(LoraformatError) as caught:
        call()
    return caught.value.codes


def merged(path: str | Path) -> list[Any]:
    """Return the merged weights `(out, in)`, in the order of `WEIGHTS`."""
    return [stored.T for stored in read_onnx(Path(path)).values()]


def expected(scale: float) -> list[Any]:
    return [WEIGHTS[name] + scale * (up @ down) for name, (down, up) in FACTORS.items()]


# --- what is exported ------------------------------------------------------------------------------------------------


def test_the_names_are_sorted_and_all_there() -> None:
    assert sorted(loraformat.__all__) == loraformat.__all__
    assert len(set(loraformat.__all__)) == len(loraformat.__all__)
    for name in loraformat.__all__:
        assert getattr(loraformat, name).__name__ == name
        assert name in dir(loraformat)


def test_the_version_is_that_of_the_distribution() -> None:
    assert loraformat.__version__ == version("loraformat")


def test_every_name_is_documented() -> None:
    for name in loraformat.__all__:
        assert (getattr(loraformat, name).__doc__ or "").strip(), name


def test_nothing_is_exported_from_two_places() -> None:
    for name in loraformat.__all__:
        value = getattr(loraformat, name)
        assert getattr(sys.modules[value.__module__], name) is value


def test_no_module_takes_the_name_of_a_function() -> None:
    """`import loraformat.x` sets `loraformat.x` to the module, whatever `__getattr__` says."""
    modules = {module.name for module in iter_modules(loraformat.__path__)}
    assert not modules & set(loraformat.__all__)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = loraformat.no_such_name  # type: ignore[attr-defined]
    assert not hasattr(loraformat, "load_adapter")


def test_importing_it_is_cheap() -> None:
    heavy = "numpy", "onnx", "onnxruntime", "safetensors", "ml_dtypes", "rich", "click"
    code = f"import loraformat, sys; sys.exit(' '.join(set({heavy}) & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


# --- load, save ------------------------------------------------------------------------------------------------------


OPTIONS: dict[str, tuple[Any, int]] = {
    "merge": (loraformat.merge, 2),
    "plan_merge": (loraformat.plan_merge, 2),
    "merge_each": (loraformat.merge_each, 3),
    "merge_into": (loraformat.merge_into, 2),
    "merge_state_dict": (loraformat.merge_state_dict, 2),
    "merge_model": (loraformat.merge_model, 2),
    "resolve_targets": (loraformat.resolve_targets, 2),
    "verify": (loraformat.verify, 3),
    "unmerge": (loraformat.unmerge, 1),
    "session": (runtime.session, 2),
    "export_runtime": (runtime.export_runtime, 3),
    "export_adapter": (runtime.export_adapter, 3),
    "adapter_feeds": (runtime.adapter_feeds, 2),
}
"""Functions whose options are a record, and how many paths they take."""


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_is_misspelled_is_no_option(name: str) -> None:
    """Nothing is opened before: there is nothing at these paths."""
    function, paths = OPTIONS[name]
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected .* 'schem'; did you mean 'scheme'"):
        function(*["nothing"] * paths, schem="x")


def test_what_the_face_returns_can_be_named() -> None:
    """Records that functions return are exported beside them."""
    for face in (loraformat, runtime):
        functions = [getattr(face, name) for name in face.__all__]
        stated = [str(each.__annotations__["return"]) for each in functions if isinstance(each, FunctionType)]
        named = {word for text in stated for word in re.findall(r"\b[A-Z]\w+", text)} - {"Any", "Array", "Path"}
        assert named <= {*face.__all__, *loraformat.__all__}


def test_a_path_may_be_text(folder: Path) -> None:
    assert loraformat.load(str(folder)).sha256 == loraformat.load(folder).sha256


def test_load_takes_a_scale_and_a_scheme(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    assert codes_of(lambda: loraformat.load(folder)) == ("LF211",)
    assert loraformat.load(folder, alpha=1.0).targets[0].scale == 0.5
    assert loraformat.load(folder, scale=0.25, scheme="peft").targets[0].scale == 0.25


def test_saved_and_loaded_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    adapter = loraformat.load(folder)
    path = loraformat.save(adapter, tmp_path / "a.safetensors")
    again = loraformat.load(path)
    assert (again.scheme, again.source) == ("native", str(path))
    assert again.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (again.base, again.provenance, again.problems) == (adapter.base, adapter.provenance, ())
    assert_same_targets(again, adapter)


def assert_same_targets(one: Adapter, other: Adapter) -> None:
    assert len(one.targets) == len(other.targets)
    for ours, theirs in zip(one.targets, other.targets, strict=True):
        assert replace(ours, factors={}) == replace(theirs, factors={})
        assert sorted(ours.factors) == sorted(theirs.factors)
        for role, factor in ours.factors.items():
            expected = theirs.factors[role]
            assert (factor.dtype, factor.shape) == (expected.dtype, expected.shape)
            assert factor.read().tobytes() == expected.read().tobytes()


def make_adapter(form: Any = np.float32, bits: int = 1) -> Adapter:
    def factor(name: str, *shape: int) -> MemoryFactor:
        noise = np.random.default_rng(bits).integers(0, 256, size=(*shape, np.dtype(form).itemsize), dtype=np.uint8)
        array = noise.view(form)[..., 0]
        with np.errstate(over="ignore", invalid="ignore"):
            return MemoryFactor(name, np.where(np.isfinite(array.astype(np.float32)), array, form(1)))

    def target(name: str, slot: SlotKind, *roles: str) -> Target:
        factors: dict[str, Factor] = {roles[0]: factor("A", 2, 5), roles[1]: factor("B", 7, 2)}
        print_ = Fingerprint((7, 5), tuple(float(number) for number in range(16)))
        return Target(name, "lora", slot, factors, 2, Scaling(ScalingRule.ALPHA_OVER_SQRT_RANK, 3.0), print_)

    return Adapter(
        targets=(
            target("m.embed", SlotKind.EMBEDDING, "lora_embedding_A", "lora_embedding_B"),
            target("m.q", SlotKind.LINEAR, "lora_A.weight", "lora_B.weight"),
        ),
        base=BaseBinding("some/base", "r1"),
        metadata={"x.b": "2", "x.a": "Grüße"},
        provenance={"tool": {"z": 1, "a": [0.5, None]}},
    )


FORMS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_bit_is_kept(tmp_path: Path, form: Any) -> None:
    """Random bits, subnormals and all."""
    adapter = make_adapter(form)
    again = loraformat.load(loraformat.save(adapter, tmp_path / "a.safetensors"))
    assert_same_targets(again, adapter)
    assert (again.base, again.metadata, again.provenance) == (adapter.base, adapter.metadata, adapter.provenance)


def test_numbers_that_no_merge_takes_are_not_saved(tmp_path: Path) -> None:
    """They would pass for an adapter that can be merged; every tensor is named, and nothing is left behind."""
    adapter = make_adapter()
    factors = {role: np.array(factor.read()) for role, factor in adapter.targets[1].factors.items()}
    factors["lora_A.weight"][1, 3], factors["lora_B.weight"][4] = np.nan, -np.inf
    broken = {role: MemoryFactor(role, array) for role, array in factors.items()}
    targets = (adapter.targets[0], replace(adapter.targets[1], factors=broken))
    with pytest.raises(LoraformatError) as caught:
        loraformat.save(replace(adapter, targets=targets), tmp_path / "a.safetensors")
    assert sorted(problem.found for problem in caught.value.problems) == [
        "1 of 10 numbers, the first at (1, 3)",
        "2 of 14 numbers, the first at (4, 0)",
    ]
    assert caught.value.codes == ("LF501", "LF501")
    assert list(tmp_path.iterdir()) == []


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    adapter = make_adapter()
    turned = replace(
        adapter,
        targets=tuple(
            replace(target, factors=dict(reversed(target.factors.items()))) for target in reversed(adapter.targets)
        ),
        metadata=dict(reversed(adapter.metadata.items())),
        provenance={"tool": {"a": [0.5, None], "z": 1}},
        source="elsewhere",
        scheme="peft",
        sha256="00",
    )
    one = loraformat.save(adapter, tmp_path / "a.safetensors").read_bytes()
    assert one == loraformat.save(adapter, tmp_path / "b.safetensors").read_bytes()
    assert one == loraformat.save(turned, tmp_path / "c.safetensors").read_bytes()
    assert one == loraformat.save(loraformat.load(tmp_path / "a.safetensors"), tmp_path / "d.safetensors").read_bytes()
    assert one != loraformat.save(make_adapter(bits=2), tmp_path / "e.safetensors").read_bytes()


def test_the_bytes_are_those_of_the_day_they_were_fixed(tmp_path: Path) -> None:
    """The digest is an adapter's identity: a change of it is a change of the format."""
    path = loraformat.save(make_adapter(np.float16), tmp_path / "a.safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "acea118396d271c6312ea18fc0300b60ea0d2816ace9451cfb73f9ca25a37f70"


@pytest.mark.parametrize("form", [np.float32, np.float16], ids=lambda form: form.__name__)
def test_others_can_open_the_file(tmp_path: Path, form: Any) -> None:
    adapter = make_adapter(form)
    path = loraformat.save(adapter, tmp_path / "a.safetensors")
    with safetensors.safe_open(str(path), framework="numpy") as opened:
        assert set(opened.metadata()) == {"loraformat"}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    assert set(tensors) == {
        "m.embed.lora_embedding_A",
        "m.embed.lora_embedding_B",
        "m.q.lora_A.weight",
        "m.q.lora_B.weight",
    }
    for target in adapter.targets:
        for role, factor in target.factors.items():
            assert tensors[f"{target.name}.{role}"].tobytes() == factor.read().tobytes()


NAMES = st.from_regex(r"[a-zé_]{1,6}(\.[a-z0-9_]{1,6}){0,3}", fullmatch=True)


@given(
    names=st.lists(NAMES, min_size=1, max_size=4, unique=True),
    rank=st.integers(1, 3),
    alpha=st.floats(-1e6, 1e6).map(lambda value: value + 0.0),
)
def test_any_names_come_back(tmp_path: Path, names: list[str], rank: int, alpha: float) -> None:
    dice = np.random.default_rng(rank)
    targets = []
    for name in sorted(names):
        down, up = lora_factors(dice, 4, 3, rank)
        factors: dict[str, Factor] = {"lora_A.weight": MemoryFactor("A", down), "lora_B.weight": MemoryFactor("B", up)}
        scaling = Scaling(ScalingRule.ALPHA_OVER_RANK, alpha)
        targets.append(Target(name, "lora", SlotKind.LINEAR, factors, rank, scaling))
    adapter = Adapter(tuple(targets))
    path = loraformat.save(adapter, tmp_path / "a.safetensors", force=True)
    assert_same_targets(loraformat.load(path), adapter)


def test_what_exists_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    adapter = loraformat.load(folder)
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"precious")
    assert codes_of(lambda: loraformat.save(adapter, path)) == ("LF601",)
    assert path.read_bytes() == b"precious"
    loraformat.save(adapter, path, force=True)
    assert loraformat.load(path).targets


def test_an_adapter_is_not_written_over_its_own_source(folder: Path, tmp_path: Path) -> None:
    source = folder / "adapter_model.safetensors"
    before = source.read_bytes()
    for adapter in (loraformat.load(folder), loraformat.load(source)):
        assert codes_of(lambda adapter=adapter: loraformat.save(adapter, source, force=True)) == ("LF602",)
    native = loraformat.save(loraformat.load(folder), tmp_path / "a.safetensors")
    assert codes_of(lambda: loraformat.save(loraformat.load(native), native, force=True)) == ("LF602",)
    assert source.read_bytes() == before


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    adapter = make_adapter()
    torn = {**adapter.targets[0].factors, "lora_embedding_B": MemoryFactor("B", np.ones((7, 2)), sealed=True)}
    with pytest.raises(AssertionError, match="was read"):
        loraformat.save(Adapter((replace(adapter.targets[0], factors=torn),)), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value", "code"), [("init_lora_weights", "pissa", "LF215"), ("layer_replication", [[0, 1]], "LF245")]
)
def test_saving_does_not_launder(tmp_path: Path, field: str, value: Any, code: str) -> None:
    """The manifest has no field for these: saved, the adapter would pass for one that can be merged."""
    adapter = loraformat.load(write_peft(tmp_path / "a", FACTORS, **{field: value}))
    assert codes_of(lambda: loraformat.save(adapter, tmp_path / "n.safetensors")) == (code,)
    assert not (tmp_path / "n.safetensors").exists()


def test_a_note_does_not_stand_against_saving(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "a", FACTORS, prefix="module.base_model.model.")
    adapter = loraformat.load(folder)
    assert [problem.code for problem in adapter.problems] == ["LF304"]
    again = loraformat.load(loraformat.save(adapter, tmp_path / "n.safetensors"))
    assert [target.name for target in again.targets] == sorted(FACTORS)
    assert not again.problems


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_tells_adapters_from_bases(folder: Path, base: Path, tmp_path: Path) -> None:
    native = loraformat.save(loraformat.load(folder), tmp_path / "a.safetensors")
    for path in (folder, str(folder / "adapter_model.safetensors"), native):
        assert isinstance(loraformat.inspect(path), loraformat.AdapterInspection)
    assert isinstance(loraformat.inspect(base), loraformat.BaseInspection)
    output = loraformat.merge(base, [folder]).output
    assert isinstance(loraformat.inspect(output), loraformat.BaseInspection)


def test_inspect_takes_a_scale_and_a_scheme(folder: Path, base: Path) -> None:
    (folder / "adapter_config.json").unlink()
    inspection = loraformat.inspect(folder, scale=0.25, scheme="peft")
    assert isinstance(inspection, loraformat.AdapterInspection)
    assert inspection.evidence == "named by the user"
    assert {target.scale for target in inspection.targets} == {0.25}
    assert codes_of(lambda: loraformat.inspect(base, scheme="native")) == ("LF122",)


# --- merge -----------------------------------------------------------------------------------------------------------


def test_adapters_by_path_by_record_and_with_a_weight(folder: Path, base: Path, tmp_path: Path) -> None:
    loaded = loraformat.load(folder)
    for index, (argument, weight) in enumerate(
        [(folder, 1.0), (str(folder), 1.0), (loaded, 1.0), ((folder, 0.5), 0.5), ((loaded, -0.25), -0.25)]
    ):
        receipt = loraformat.merge(base, [argument], tmp_path / f"{index}.onnx")
        assert receipt.output == str(tmp_path / f"{index}.onnx")
        assert [adapter.weight for adapter in receipt.adapters] == [weight]
        assert [adapter.name for adapter in receipt.adapters] == ["style"]
        for found, wanted in zip(merged(receipt.output), expected(2.0 * weight), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_an_adapter_made_in_memory_merges(base: Path, tmp_path: Path) -> None:
    adapter = Adapter(
        tuple(
            Target(
                name,
                "lora",
                SlotKind.LINEAR,
                {"lora_A.weight": MemoryFactor("A", down), "lora_B.weight": MemoryFactor("B", up)},
                2,
                Scaling(ScalingRule.MULTIPLIER, 0.5),
            )
            for name, (down, up) in FACTORS.items()
        )
    )
    receipt = loraformat.merge(base, [adapter])
    assert Path(receipt.output).name == "base-adapter.onnx"
    for found, wanted in zip(merged(receipt.output), expected(0.5), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_native_and_peft_give_the_same_model(folder: Path, base: Path, tmp_path: Path) -> None:
    native = loraformat.save(loraformat.load(folder), tmp_path / "style.safetensors")
    outputs = [loraformat.merge(base, [path], tmp_path / f"{path.name}.onnx").output for path in (folder, native)]
    for one, other in zip(*map(merged, outputs), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_default_output_is_named_after_what_went_in(folder: Path, base: Path, tmp_path: Path) -> None:
    native = loraformat.save(loraformat.load(folder), tmp_path / "my.style.safetensors")
    cases: list[tuple[list[Any], str]] = [
        ([folder], "base-style.onnx"),
        ([folder / "adapter_model.safetensors"], "base-style.onnx"),
        ([native], "base-my.style.onnx"),
        ([(folder, 0.7)], "base-style@0.7.onnx"),
        ([(folder, 1)], "base-style.onnx"),
        ([folder, (native, -2)], "base-style-my.style@-2.onnx"),
        ([loraformat.load(folder)], "base-style.onnx"),
        ([loraformat.load(folder / "adapter_model.safetensors")], "base-style.onnx"),
    ]
    for adapters, name in cases:
        assert loraformat.plan_merge(base, adapters).output == tmp_path / name


def test_a_relative_folder_has_a_name(folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert loraformat.plan_merge(base, ["."]).output.name == "base-style.onnx"
    assert loraformat.plan_merge(base, ["adapter_model.safetensors"]).output.name == "base-style.onnx"


def test_a_repository_in_a_hubs_cache_is_named_by_its_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is merged has the repository's name, not the revision's, and does not go into the cache."""
    revision = "9f3b"
    for owner in ("models--org--base", "models--org--lora"):
        (tmp_path / owner / "snapshots" / revision).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    weights = {f"{name}.weight": weight for name, weight in WEIGHTS.items()}
    write_tensors(tmp_path / "models--org--base/snapshots" / revision / "model.safetensors", weights)
    folder.replace(tmp_path / "models--org--lora/snapshots" / revision)
    model, lora = Path("models--org--base"), Path("models--org--lora")
    for below in ("", f"snapshots/{revision}"):
        plan = loraformat.plan_merge(model / below, lora / below)
        assert (plan.output, plan.adapters[0].name) == (tmp_path / "base-lora", "lora")
    assert loraformat.inspect(model).as_json()["kind"] == "base"
    (model / "snapshots" / "0001").mkdir()
    assert codes_of(lambda: loraformat.inspect(model)) == ("LF121",)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)
    assert loraformat.inspect(model).as_json()["kind"] == "base"


def test_a_name_that_says_another_format(folder: Path, base: Path, tmp_path: Path) -> None:
    for name in ("merged.safetensors", "merged.pt"):
        assert codes_of(lambda name=name: loraformat.merge(base, folder, tmp_path / name)) == ("LF837",)
        assert codes_of(lambda name=name: loraformat.plan_merge(base, folder, tmp_path / name)) == ("LF837",)
        assert not (tmp_path / name).exists()
    loraformat.merge(base, folder, tmp_path / "merged.v2")
    assert codes_of(lambda: loraformat.save(loraformat.load(folder), tmp_path / "style.onnx")) == ("LF837",)


def test_one_adapter_twice_is_said(folder: Path, base: Path) -> None:
    def repeated(*adapters: Any) -> list[str]:
        return [problem.where for problem in loraformat.plan_merge(base, adapters).problems if problem.code == "LF838"]

    assert repeated(folder, (folder / "adapter_model.safetensors", 0.5)) == ["style"]
    assert repeated(folder) == []


def test_a_model_and_an_adapter_in_each_others_place(folder: Path, base: Path, tmp_path: Path) -> None:
    weights = {f"{name}.weight": weight for name, weight in WEIGHTS.items()}
    tuned = write_tensors(tmp_path / "tuned.safetensors", weights)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    native = loraformat.save(loraformat.load(folder), tmp_path / "native.safetensors")
    for model in (base, tuned, tmp_path / "model"):
        assert codes_of(lambda model=model: loraformat.merge(base, model)) == ("LF835",)
    (tmp_path / "some.onnx_adapter").write_bytes(bytes(64))
    for adapter in (folder, folder / "adapter_model.safetensors", native, tmp_path / "some.onnx_adapter"):
        assert codes_of(lambda adapter=adapter: loraformat.merge(adapter, folder)) == ("LF836",)


@pytest.mark.parametrize("style", ["torchscript", "dynamo", "named"])
def test_a_graph_is_a_model_whatever_its_modules_are_called(tmp_path: Path, style: str) -> None:
    """One with adapters as inputs names no others, where an optimiser took the names of its layers."""
    names = {f"model.layers.0.q_proj.lora_{side}": np.ones((4, 3), np.float32) for side in "AB"}
    write_model(tmp_path / "model" / "base.onnx", linear_net(names, style).model())
    for path in (tmp_path / "model" / "base.onnx", tmp_path / "model"):
        assert len(open_base(path).sites) == 2


def test_a_plan_writes_nothing(folder: Path, base: Path) -> None:
    before = sorted(base.parent.iterdir())
    plan = loraformat.plan_merge(base, [folder])
    assert isinstance(plan, loraformat.Plan)
    assert sorted(base.parent.iterdir()) == before


def test_the_plan_is_that_of_the_merge(folder: Path, base: Path) -> None:
    assert loraformat.plan_merge(base, [folder]).sha256 == loraformat.merge(base, [folder]).plan_sha256


def test_scale_and_alpha_reach_the_adapters(folder: Path, base: Path) -> None:
    (folder / "adapter_config.json").unlink()
    assert codes_of(lambda: loraformat.plan_merge(base, [folder])) == ("LF211",)
    plan = loraformat.plan_merge(base, [(folder, 2.0)], alpha=3.0)
    assert {scale for weight in plan.weights for scale in weight.scales} == {3.0}
    plan = loraformat.plan_merge(base, [folder], scale=-0.5, scheme="peft")
    assert {scale for weight in plan.weights for scale in weight.scales} == {-0.5}


def test_zero_is_refused_unless_allowed(tmp_path: Path, base: Path) -> None:
    folder = write_peft(tmp_path / "zero", FACTORS, alpha=0)
    assert set(codes_of(lambda: loraformat.plan_merge(base, [folder]))) == {"LF208"}
    assert loraformat.plan_merge(base, [folder], allow_zero=True).weights
    assert loraformat.plan_merge(base, [folder], alpha=4.0).weights


def test_a_merge_does_not_replace_an_adapter_of_it(folder: Path, base: Path, tmp_path: Path) -> None:
    native = loraformat.save(loraformat.load(folder), tmp_path / "style.safetensors")
    peft = folder / "adapter_model.safetensors"
    cases: list[tuple[Any, Path]] = [(folder, peft), (peft, peft), (native, native), (folder, base), (native, base)]
    for source, output in cases:
        before = output.read_bytes()
        for argument in (source, loraformat.load(source)):
            with pytest.raises(loraformat.RefusedError) as caught:
                loraformat.merge(base, [argument], output, force=True)
            assert caught.value.codes == ("LF602",)
        assert output.read_bytes() == before


def test_errors_are_those_of_the_public_face(tmp_path: Path) -> None:
    with pytest.raises(loraformat.InputError) as caught:
        loraformat.load(tmp_path / "absent")
    assert isinstance(caught.value, loraformat.LoraformatError)
    assert isinstance(caught.value.problems[0], loraformat.Problem)
