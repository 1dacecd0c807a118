"""Adapters for models with run-time inputs: ranks and targets that differ, sums, files, what fits and what does not."""

import errno
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import loraformat
from graphs import (
    Array,
    ArrayFactor,
    dyadic,
    dyadic_factors,
    linear_net,
    make_adapter,
    make_target,
    product,
    run,
    write_model,
)
from loraformat import runtime
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target
from loraformat.containers.onnx_adapter import CONTAINER
from models import files_below

SHAPES = {"model.a": (12, 10), "model.b": (7, 9), "model.c": (5, 8)}
WEIGHTS = {name: dyadic(np.random.default_rng(1), *shape) for name, shape in SHAPES.items()}
FEEDS: dict[str, Array] = {f"in.{n}": dyadic(np.random.default_rng(2), 4, s[1]) for n, s in SHAPES.items()}


def adapter(seed: int, scale: float = 1.0, **ranks: int) -> Adapter:
    rng = np.random.default_rng(seed)
    targets = (
        make_target(f"model.{name}", dyadic_factors(rng, *SHAPES[f"model.{name}"], rank), scale=scale)
        for name, rank in ranks.items()
    )
    return make_adapter(*targets)


def changes(*adapters: tuple[Adapter, float]) -> list[Array]:
    """Return what adapters add to each output, in float64."""
    found = {name: np.zeros((4, shape[0])) for name, shape in SHAPES.items()}
    for each, weight in adapters:
        for target in each.targets:
            down, up = (target.factors[role].read() for role in ("lora_A.weight", "lora_B.weight"))
            found[target.name] += FEEDS[f"in.{target.name}"] @ product((down, up), target.scale * weight).T
    return list(found.values())


ONE, OTHER = adapter(3, 0.5, a=1, b=4), adapter(4, 2.0, b=2, c=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "base.onnx", linear_net(WEIGHTS).model())


@pytest.fixture(scope="module")
def model(base: Path) -> Path:
    path = base.with_name("base.lora.onnx")
    runtime.export_runtime(base, [ONE, OTHER], path)
    return path


def assert_adds(model: Path, feeds: dict[str, Array], base: Path, wanted: list[Array]) -> None:
    for found, before, change in zip(run(model, {**FEEDS, **feeds}), run(base, FEEDS), wanted, strict=True):
        np.testing.assert_allclose(found, before + change, rtol=0, atol=1e-5)


def test_ranks_and_targets_may_differ(model: Path, base: Path) -> None:
    for each in (ONE, OTHER):
        feeds = runtime.adapter_feeds(model, [each])
        assert {name.rpartition(".lora_")[0] for name in feeds} == {target.name for target in each.targets}
        assert_adds(model, feeds, base, changes((each, 1.0)))


def test_several_add_up(model: Path, base: Path) -> None:
    feeds = runtime.adapter_feeds(model, [(ONE, 0.5), (OTHER, -2.0)])
    assert feeds["model.b.lora_A.weight"].shape == (9, 6)
    assert_adds(model, feeds, base, changes((ONE, 0.5), (OTHER, -2.0)))


def test_onnxruntime_takes_the_file(model: Path, base: Path, tmp_path: Path) -> None:
    """With one session both adapters, one after the other, and none between them."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    expected = {"one": changes((ONE, 1.0)), "other": changes((OTHER, 1.0)), "none": changes()}
    for name in ("one", "none", "other", "one"):
        settings = onnxruntime.RunOptions()
        if name != "none":
            path = tmp_path / f"{name}.onnx_adapter"
            done = runtime.export_adapter(model, [{"one": ONE, "other": OTHER}[name]], path, force=True)
            assert CONTAINER.open(path).tensors.keys() == {
                f"{pair}.lora_{side}.weight" for pair in done.ranks for side in "AB"
            }
            loaded = onnxruntime.LoraAdapter()
            loaded.Load(str(path))
            settings.add_active_adapter(loaded)
        found = session.run(None, FEEDS, settings)
        for values, before, change in zip(found, run(base, FEEDS), expected[name], strict=True):
            np.testing.assert_allclose(values, before + change, rtol=0, atol=1e-5)


def test_both_are_made_at_once(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    named = [loraformat.save(each, tmp_path / f"{name}.safetensors") for name, each in (("x", ONE), ("y", OTHER))]
    done = runtime.export_runtime(base, named, path, adapters_out=tmp_path / "adapters")
    assert [Path(each.output).name for each in done.adapters] == ["x.onnx_adapter", "y.onnx_adapter"]
    for each, source in zip(done.adapters, named, strict=True):
        later = runtime.export_adapter(path, [source], tmp_path / "later.onnx_adapter", force=True)
        assert Path(later.output).read_bytes() == Path(each.output).read_bytes()
        assert later.ranks == each.ranks


def test_a_full_disk_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    named = loraformat.save(ONE, tmp_path / "x.safetensors")
    before = files_below(tmp_path)
    monkeypatch.setattr("loraformat.runtime.export.put_image", fill)
    with pytest.raises(loraformat.LoraformatError) as caught:
        runtime.export_runtime(base, [named], tmp_path / "model.onnx", adapters_out=tmp_path / "adapters")
    assert caught.value.codes == ("LF604",)
    assert files_below(tmp_path) == before
    assert not (tmp_path / "adapters").exists()


def test_a_target_without_an_input_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    runtime.export_runtime(base, [ONE], path)
    with pytest.raises(loraformat.FindingError) as caught:
        runtime.export_adapter(path, [OTHER], tmp_path / "a.onnx_adapter")
    assert [(problem.code, problem.where) for problem in caught.value.problems] == [("LF830", "model.c")]
    assert not (tmp_path / "a.onnx_adapter").exists()
    done = runtime.export_adapter(path, [OTHER], tmp_path / "a.onnx_adapter", allow_unmatched=["model.c"])
    assert (done.left_out, set(done.ranks)) == (("model.c",), {"model.b"})


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    net = linear_net({"a": dyadic(np.random.default_rng(5), 6, 4).astype(np.float16)})
    base, path = write_model(tmp_path / "base.onnx", net.model()), tmp_path / "model.onnx"
    large = make_adapter(make_target("a", dyadic_factors(np.random.default_rng(6), 6, 4, 2), scale=1e6))
    runtime.export_runtime(base, [large], path)
    with pytest.raises(loraformat.FindingError) as caught:
        runtime.export_adapter(path, [large], tmp_path / "a.onnx_adapter")
    assert caught.value.codes == ("LF503",)
    assert list(tmp_path.glob("*.onnx_adapter*")) == []


def test_a_model_without_inputs_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(loraformat.FindingError) as caught:
        runtime.adapter_feeds(base, [ONE])
    assert caught.value.codes == ("LF823",)


@pytest.mark.parametrize("text", ["{}", "[]", '{"version":2}', '{"version":1,"batched":-1,"branches":[]}'])
def test_an_annotation_that_is_not_sound_is_refused(tmp_path: Path, text: str) -> None:
    model = linear_net(WEIGHTS).model()
    model.metadata_props.add(key="loraformat.runtime", value=text)
    with pytest.raises(loraformat.InputError) as caught:
        runtime.adapter_feeds(write_model(tmp_path / "m.onnx", model), [ONE])
    assert caught.value.codes[0] in {"LF104", "LF827"}


def test_what_convert_writes_fits_where_names_do(model: Path, tmp_path: Path) -> None:
    """An `.onnx_adapter` made without the model, of targets that are called as its inputs are."""
    source, output = loraformat.save(ONE, tmp_path / "one.safetensors"), tmp_path / "one.onnx_adapter"
    loraformat.convert(source, "onnx_adapter", output)
    tensors = CONTAINER.open(output).tensors
    feeds = runtime.adapter_feeds(model, [ONE])
    assert tensors.keys() == feeds.keys()
    for name, array in feeds.items():
        np.testing.assert_allclose(tensors[name].read(), array, rtol=1e-6)


def test_other_kinds_that_are_products_are_served(tmp_path: Path) -> None:
    """loralib's MergedLinear: some slices of a fused matrix, expanded to a product of all its rows."""
    rng = np.random.default_rng(8)
    down, up = dyadic(rng, 4, 5), dyadic(rng, 6, 2)
    options = {"enable_lora": [True, False, True], "sizes": [2, 3, 4]}
    factors = {"lora_A.weight": ArrayFactor("a", down), "lora_B.weight": ArrayFactor("b", up)}
    scaling = Scaling(ScalingRule.MULTIPLIER, 0.5)
    target = Target("qkv", "merged_linear", SlotKind.LINEAR, factors, 2, scaling, options=options)
    weight = dyadic(rng, 9, 5)
    base, path = write_model(tmp_path / "base.onnx", linear_net({"qkv": weight}).model()), tmp_path / "model.onnx"
    runtime.export_runtime(base, [make_adapter(target)], path)
    x = {"in.qkv": dyadic(rng, 3, 5)}
    (found,), (before,) = (run(path, x | f) for f in (runtime.adapter_feeds(path, [make_adapter(target)]), {}))
    change = np.zeros((9, 5))
    change[:2], change[5:] = 0.5 * up[:2] @ down[:2], 0.5 * up[2:] @ down[2:]
    np.testing.assert_allclose(found - before, x["in.qkv"] @ change.T, rtol=0, atol=1e-5)


def test_a_model_with_inputs_is_a_model(model: Path) -> None:
    """Its inputs are called as the tensors of an adapter are."""
    found = loraformat.inspect(model)
    assert found.as_json()["kind"] == "base"
    with pytest.raises(loraformat.LoraformatError, match="LF423"):
        loraformat.merge(model, [ONE], model.with_name("merged.onnx"))


def test_no_adapter_at_all_is_refused(model: Path, base: Path, tmp_path: Path) -> None:
    assert runtime.adapter_feeds(model, []) == {}
    for call in (runtime.export_adapter, runtime.export_runtime):
        with pytest.raises(loraformat.FindingError, match="LF401"):
            call(model if call is runtime.export_adapter else base, [], tmp_path / "out")
