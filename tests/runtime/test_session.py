"""Sessions of a base with adapters merged in memory."""

import gc
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import loraformat
import loraformat.runtime
from builders import Factors, lora_factors, write_peft
from graphs import Array, Net, dynamo_scopes, function, linear_net, run, same_bits, write_model, write_state
from loraformat.apply.undo import name_journal
from models import write_adapter, write_base

CPU = ["CPUExecutionProvider"]
SHAPES = {"layers.0.wide": (80, 64), "layers.1.tall": (48, 96), "layers.2.small": (8, 6)}
"""(out, in) of each module: the last one's weight is small enough to stay in the graph's bytes."""


def make_weights(form: str = "float32") -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {module: rng.standard_normal(shape).astype(form) for module, shape in SHAPES.items()}


def make_factors(seed: int, rank: int = 3, modules: Sequence[str] = tuple(SHAPES)) -> dict[str, Factors]:
    rng = np.random.default_rng(seed)
    return {module: lora_factors(rng, *SHAPES[module], rank) for module in modules}


def make_feeds(model: Path | onnx.ModelProto) -> dict[str, Array]:
    """Return the unit matrix for each input, so that outputs are the weights' numbers to the bit."""
    graph = (onnx.load(str(model), load_external_data=False) if isinstance(model, Path) else model).graph
    forms = {each.name: helper.tensor_dtype_to_np_dtype(each.type.tensor_type.elem_type) for each in graph.input}
    return {name: np.eye(SHAPES[name.removeprefix("in.")][1], dtype=form) for name, form in forms.items()}


def compute(session: onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> list[Array]:
    return [np.asarray(output) for output in session.run(None, dict(feeds))]


def all_same(ones: Sequence[Array], others: Sequence[Array]) -> bool:
    return len(ones) == len(others) and all(map(same_bits, ones, others))


def list_tree(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def write_adapters(folder: Path) -> tuple[Path, Path]:
    """Return one adapter of all modules and one of two of them."""
    few = make_factors(2, 5, list(SHAPES)[1:])
    return write_peft(folder / "a", make_factors(1)), write_peft(folder / "b", few)


def in_constants(form: str = "float32") -> onnx.ModelProto:
    net = Net()
    for position, (module, weight) in enumerate(make_weights(form).items()):
        x, y = net.feed(f"in.{module}"), net.result(f"out.{module}")
        net.op("MatMul", [x, net.constant(f"c{position}", weight.T)], y, f"m{position}", dynamo_scopes(module))
    return net.model()


def in_functions() -> onnx.ModelProto:
    net = Net()
    for position, (module, weight) in enumerate(make_weights().items()):
        x, y = net.feed(f"in.{module}"), net.result(f"out.{module}")
        body = Net()
        held = body.constant("w", weight.T)
        body.op("MatMul", ["x", held], "y", f"m{position}", dynamo_scopes(module))
        net.functions.append(function(f"f{position}", ["x"], ["y"], body.nodes))
        net.op(f"f{position}", [x], y, f"call{position}", domain="own")
    return net.model()


def in_branches() -> onnx.ModelProto:
    net = Net()
    for position, (module, weight) in enumerate(make_weights().items()):
        x, y = net.feed(f"in.{module}"), net.result(f"out.{module}")
        branches = []
        for side in ("then", "else"):
            body = Net()
            held = body.weight(f"w{position}_{side}", weight.T)
            body.op("MatMul", [x, held], f"{side}{position}", f"m{position}", dynamo_scopes(module))
            body.result(f"{side}{position}")
            branches.append(body.branch(side))
        yes = net.weight(f"yes{position}", np.array(position != 1))
        net.op("If", [yes], y, f"if{position}", then_branch=branches[0], else_branch=branches[1])
    return net.model()


def behind_casts() -> onnx.ModelProto:
    """Return float16 weights, which onnxruntime casts once, when it optimises."""
    net = Net()
    for position, (module, weight) in enumerate(make_weights("float16").items()):
        x, y = net.feed(f"in.{module}"), net.result(f"out.{module}")
        cast = net.op("Cast", [net.weight(f"w{position}", weight.T)], f"c{position}", to=TensorProto.FLOAT)
        net.op("MatMul", [x, cast], y, f"m{position}", dynamo_scopes(module))
    return net.model()


def with_typed_numbers() -> onnx.ModelProto:
    """Return a graph with a large tensor whose numbers are no run of bytes; every output is a sum with it."""
    net = Net()
    table = helper.make_tensor("table", TensorProto.INT64, [2000], list(range(1000, 3000)))
    assert not table.raw_data
    for position, (module, weight) in enumerate(make_weights().items()):
        x, y = net.feed(f"in.{module}"), net.result(f"out.{module}")
        product = net.op(
            "MatMul", [x, net.weight(f"w{position}", weight.T)], f"p{position}", f"m{position}", dynamo_scopes(module)
        )
        index = net.weight(f"i{position}", np.array(1500 + position))
        number = net.op("Cast", [net.op("Gather", ["table", index], f"g{position}")], f"n{position}", to=1)
        net.op("Add", [product, number], y)
    net.initializers.append(table)
    return net.model()


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "folded": lambda: linear_net(make_weights()).model(),
    "unfolded": lambda: linear_net(make_weights(), "dynamo-unfolded").model(),
    "float16": lambda: linear_net(make_weights("float16"), "dynamo").model(),
    "double": lambda: linear_net(make_weights("float64"), "named").model(),
    "casts": behind_casts,
    "constants": in_constants,
    "functions": in_functions,
    "branches": in_branches,
    "typed": with_typed_numbers,
}


CASES = [*((name, "") for name in MODELS), ("unfolded", "one"), ("float16", "many"), ("constants", "one")]


@pytest.mark.parametrize(("name", "files"), CASES)
def test_a_session_is_what_merge_writes(tmp_path: Path, name: str, files: str) -> None:
    """Wherever the weights stand, and to the bit; A, B and A again gives the first outputs; no file is written."""
    base = write_model(tmp_path / "base.onnx", MODELS[name](), files)
    first, second = write_adapters(tmp_path)
    feeds, before = make_feeds(base), list_tree(tmp_path)
    session = loraformat.runtime.session(base, [(first, 0.8)], providers=CPU)
    assert isinstance(session, loraformat.runtime.AdaptedSession)
    assert isinstance(session, onnxruntime.InferenceSession)
    outputs = compute(session, feeds)
    both = compute(session.switch([first, (second, -0.5)]), feeds)
    plain = compute(session.switch(), feeds)
    again = compute(session.switch([second]).switch([(first, 0.8)]), feeds)
    assert list_tree(tmp_path) == before
    assert all_same(again, outputs)
    assert all_same(plain, run(base, feeds))
    loraformat.merge(base, [(first, 0.8)], tmp_path / "one.onnx")
    loraformat.merge(base, [first, (second, -0.5)], tmp_path / "two.onnx")
    assert all_same(outputs, run(tmp_path / "one.onnx", feeds))
    assert all_same(both, run(tmp_path / "two.onnx", feeds))
    assert not any(map(same_bits, outputs, plain))


@pytest.mark.parametrize("form", ["int8", "uint8"])
def test_quantised_weights_and_their_scales(tmp_path: Path, form: str) -> None:
    net, rng = Net(), np.random.default_rng(4)
    for position, (module, (out, inner)) in enumerate(SHAPES.items()):
        x, y = net.feed(f"in.{module}"), net.result(f"out.{module}")
        codes = rng.integers(1, 100, (inner, out)).astype(form)
        parts = [
            net.weight(f"{position}_codes", codes),
            net.weight(f"{position}_scale", np.full(out, 0.05, np.float32)),
        ]
        real = net.op("DequantizeLinear", parts, f"{position}_real", axis=1)
        net.op("MatMul", [x, real], y, f"m{position}", dynamo_scopes(module))
    base = write_model(tmp_path / "base.onnx", net.model())
    first, _ = write_adapters(tmp_path)
    session = loraformat.runtime.session(base, [first], providers=CPU)
    loraformat.merge(base, [first], tmp_path / "merged.onnx")
    feeds = make_feeds(base)
    outputs = compute(session, feeds)
    assert all_same(outputs, run(tmp_path / "merged.onnx", feeds))
    assert not any(map(same_bits, outputs, run(base, feeds)))


def shared_in_the_graph(shape: tuple[int, int]) -> Net:
    """Return two modules that read one Transpose of one weight."""
    net, weight = Net(), np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    turned = net.op("Transpose", [net.weight("w", weight)], "t", "turn", perm=[1, 0])
    for module in ("a", "b"):
        net.op("MatMul", [net.feed(f"x_{module}"), turned], net.result(f"y_{module}"), f"/{module}/MatMul")
    return net


def shared_with_a_branch(shape: tuple[int, int]) -> Net:
    """Return a module in the graph and another one in a branch that read one weight."""
    net, weight = Net(), np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    held, inside = net.weight("w", weight.T), Net()
    net.op("MatMul", [net.feed("x_b"), held], net.result("y_b"), "/b/MatMul")
    net.feed("x_a")
    inside.op("MatMul", ["x_a", held], inside.result("inner"), "/a/MatMul")
    other = Net()
    other.op("Identity", ["x_a"], other.result("same"))
    branches = {"then_branch": inside.branch("then"), "else_branch": other.branch("else")}
    net.op("If", [net.weight("yes", np.array(True))], net.result("y_a"), "/If", **branches)
    return net


@pytest.mark.parametrize("module", ["a", "b"])
@pytest.mark.parametrize("shape", [(80, 64), (8, 6)])
@pytest.mark.parametrize("build", [shared_in_the_graph, shared_with_a_branch])
def test_a_weight_that_others_read_is_one_of_their_own(
    tmp_path: Path, build: Callable[[tuple[int, int]], Net], shape: tuple[int, int], module: str
) -> None:
    base = write_model(tmp_path / "base.onnx", build(shape).model())
    adapter = write_peft(tmp_path / "adapter", {module: lora_factors(np.random.default_rng(6), *shape, 2)})
    before = list_tree(tmp_path)
    session = loraformat.runtime.session(base, [adapter], providers=CPU)
    feeds = dict.fromkeys(("x_a", "x_b"), np.eye(shape[1], dtype=np.float32))
    outputs = compute(session, feeds)
    assert list_tree(tmp_path) == before
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    assert all_same(outputs, run(tmp_path / "merged.onnx", feeds))
    plain = run(base, feeds)
    assert [same_bits(*pair) for pair in zip(outputs, plain, strict=True)].count(False) == 1
    assert all_same(compute(session.switch(), feeds), plain)


@pytest.mark.parametrize("operator", ["MatMulNBits", "DequantizeLinear"])
def test_floats_in_the_place_of_codes(tmp_path: Path, operator: str) -> None:
    """The graph of the session has other nodes then, as that of the merged file."""
    out, inner = 96, 64
    rng, net = np.random.default_rng(7), Net()
    x, y = net.feed("x"), net.result("y")
    if operator == "MatMulNBits":
        codes = rng.integers(0, 255, (out, inner // 32, 16)).astype(np.uint8)
        inputs = [x, net.weight("w_Q4", codes), net.weight("s", np.full((out, inner // 32), 0.05, np.float32))]
        net.op(operator, inputs, y, "/a/MatMul", domain="com.microsoft", bits=4, K=inner, N=out, block_size=32)
    else:
        codes = rng.integers(-100, 100, (inner, out)).astype(np.int8)
        parts = [net.weight("w", codes), net.weight("s", np.full(out, 0.05, np.float32))]
        net.op("MatMul", [x, net.op(operator, parts, "real", axis=1)], y, "/a/MatMul")
    base = write_model(tmp_path / "base.onnx", net.model(check=False))
    adapter = write_peft(tmp_path / "adapter", {"a": lora_factors(rng, out, inner, 2)})
    session = loraformat.runtime.session(base, [adapter], providers=CPU, on_quantized="dequantize")
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", on_quantized="dequantize")
    feeds = {"x": np.eye(inner, dtype=np.float32)}
    outputs = compute(session, feeds)
    assert all_same(outputs, run(tmp_path / "merged.onnx", feeds))
    assert all_same(compute(session.switch(), feeds), run(base, feeds))
    assert all_same(compute(session.switch([adapter]), feeds), outputs)
    if operator == "MatMulNBits":
        assert refuse(base, [adapter]) == ("LF440",)


def test_four_bits_with_the_numbers_of_a_checkpoint(tmp_path: Path) -> None:
    out, inner = 96, 64
    rng, net = np.random.default_rng(8), Net()
    weight = rng.standard_normal((out, inner)).astype(np.float32)
    blocks = weight.reshape(out, inner // 32, 32)
    scales = np.abs(blocks).max(axis=2) / 7
    codes = (np.clip(np.round(blocks / scales[..., None]), -8, 7) + 8).astype(np.uint8)
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    inputs = [net.feed("x"), net.weight("w_Q4", packed), net.weight("s", scales)]
    net.op(
        "MatMulNBits",
        inputs,
        net.result("y"),
        "/a/MatMul",
        domain="com.microsoft",
        bits=4,
        K=inner,
        N=out,
        block_size=32,
    )
    base = write_model(tmp_path / "base.onnx", net.model(check=False))
    checkpoint = write_state(tmp_path / "base.safetensors", {"a.weight": weight})
    adapter = write_peft(tmp_path / "adapter", {"a": lora_factors(rng, out, inner, 2)})
    options = {"base_checkpoint": checkpoint, "any_rounding": True}
    session = loraformat.runtime.session(base, [adapter], providers=CPU, **options)
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", **options)
    feeds = {"x": np.eye(inner, dtype=np.float32)}
    outputs = compute(session, feeds)
    assert all_same(outputs, run(tmp_path / "merged.onnx", feeds))
    assert not all_same(outputs, run(base, feeds))


def test_onnxruntime_would_replace_too_late_by_itself(tmp_path: Path) -> None:
    """The trap that the sessions avoid: were it gone, `add_initializer` would be the simpler way."""
    weights = make_weights()
    base = write_model(tmp_path / "base.onnx", linear_net(weights, "dynamo-unfolded").model(), "one")
    options, held = (
        onnxruntime.SessionOptions(),
        onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((80, 64), np.float32)),
    )
    options.add_initializer("layers.0.wide.weight", held)
    session = onnxruntime.InferenceSession(str(base), options, providers=CPU)
    assert np.any(compute(session, make_feeds(base))[0])


def test_what_sessions_have_in_common_is_computed_once(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.onnx", linear_net(make_weights()).model())
    first, second = write_adapters(tmp_path)
    session = loraformat.runtime.session(base, [first], providers=CPU, keep_merged=True)
    assert (session.cost.weights, session.cost.computed_weights) == (3, 3)
    assert session.cost.computed_bytes == sum(4 * out * inner for out, inner in SHAPES.values())
    same = session.switch([loraformat.load(first)])
    assert (same.cost.weights, same.cost.computed_weights, same.cost.computed_bytes) == (3, 0, 0)
    both = session.switch([first, second])
    assert (both.cost.weights, both.cost.computed_weights) == (3, 2)
    assert session.switch([(first, 0.5)]).cost.computed_weights == 3
    assert 0 < both.cost.planning_seconds + both.cost.merging_seconds + both.cost.loading_seconds <= both.cost.seconds
    session = same = both = session.switch()
    gc.collect()
    assert session.switch([first]).cost.computed_weights == 3
    careless = loraformat.runtime.session(base, [first], providers=CPU)
    assert careless.switch([first]).cost.computed_weights == 3


def test_an_adapter_made_in_memory_is_computed_anew(tmp_path: Path) -> None:
    """It has no digest that would tell it from another one."""
    base = write_model(tmp_path / "base.onnx", linear_net(make_weights()).model())
    first, second = (loraformat.load(path) for path in write_adapters(tmp_path))
    session = loraformat.runtime.session(base, [first + first], providers=CPU, keep_merged=True)
    other = session.switch([second + second])
    feeds = make_feeds(base)
    assert session.switch([first + first]).cost.computed_weights == 3
    loraformat.merge(base, [second + second], tmp_path / "merged.onnx")
    assert all_same(compute(other, feeds), run(tmp_path / "merged.onnx", feeds))


def test_options_of_one_file_and_two_configurations(tmp_path: Path) -> None:
    """The factors' file is the same: only the configuration says how strongly they act."""
    base = write_model(tmp_path / "base.onnx", linear_net(make_weights()).model())
    adapter, _ = write_adapters(tmp_path)
    session = loraformat.runtime.session(base, [adapter], providers=CPU, keep_merged=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4}))
    feeds, later = make_feeds(base), session.switch([adapter])
    assert later.cost.computed_weights == 3
    assert all_same(compute(later, feeds), compute(session.switch([(loraformat.load(adapter), 1.0)]), feeds))
    assert not all_same(compute(later, feeds), compute(session, feeds))


@pytest.mark.parametrize("prepacking", ["0", "1"])
def test_onnxruntime_has_weights_of_its_own(tmp_path: Path, prepacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours go when the session is made: what the memory holds then must not matter."""
    held: list[Array] = []
    wrap = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type

    def remember(array: Array, form: int) -> onnxruntime.OrtValue:
        held.append(array)
        return wrap(array, form)

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy_with_onnx_type", remember)
    base = write_model(tmp_path / "base.onnx", linear_net(make_weights()).model())
    first, _ = write_adapters(tmp_path)
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.disable_prepacking", prepacking)
    session = loraformat.runtime.session(base, [first], providers=CPU, session_options=settings)
    feeds = make_feeds(base)
    outputs = compute(session, feeds)
    assert len(held) == 2
    for array in held:
        array[...] = 0
    assert all_same(compute(session, feeds), outputs)
    session.set_providers(CPU)
    assert all_same(compute(session, feeds), outputs)


@pytest.mark.parametrize("as_function", [False, True])
def test_settings_are_copied(tmp_path: Path, as_function: bool) -> None:
    base = write_model(tmp_path / "base.onnx", linear_net(make_weights()).model(), "one")
    first, second = write_adapters(tmp_path)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.add_session_config_entry("session.disable_prepacking", "1")
    settings.enable_profiling, settings.profile_file_prefix = True, str(tmp_path / "profile")

    def make() -> onnxruntime.SessionOptions:
        made = onnxruntime.SessionOptions()
        made.intra_op_num_threads = 1
        made.add_session_config_entry("session.disable_prepacking", "1")
        made.enable_profiling, made.profile_file_prefix = True, str(tmp_path / "profile")
        return made

    given = make if as_function else settings
    session = loraformat.runtime.session(base, [first], providers=CPU, session_options=given)
    sessions = [session, session.switch([second])]
    profiles = {each.end_profiling() for each in sessions}
    assert sorted(map(str, tmp_path.glob("profile*"))) == sorted(profiles)
    for each in sessions:
        used = each.get_session_options()
        assert used.intra_op_num_threads == 1
        assert used.get_session_config_entry("session.disable_prepacking") == "1"
    assert settings.enable_profiling
    settings.enable_profiling = False
    plain = onnxruntime.InferenceSession(str(base), settings, providers=CPU)  # Nothing was added to them.
    assert all_same(compute(plain, make_feeds(base)), run(base, make_feeds(base)))


@pytest.mark.parametrize("files", ["", "one"])
def test_links_of_a_hub_cache_are_followed(tmp_path: Path, files: str) -> None:
    """The model and its data are links out of the folder, which onnxruntime alone would not follow for data."""
    written = write_model(tmp_path / "blobs" / "base.onnx", linear_net(make_weights()).model(), files)
    first, _ = write_adapters(tmp_path)
    loraformat.merge(written, [first], tmp_path / "merged.onnx")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for path in list(written.parent.iterdir()):
        digits = path.with_name(f"{len(path.name):064x}")
        path.rename(digits)
        os.symlink(os.path.relpath(digits, snapshot), snapshot / path.name)
    session = loraformat.runtime.session(snapshot / "base.onnx", [first], providers=CPU)
    feeds = make_feeds(tmp_path / "merged.onnx")
    assert all_same(compute(session, feeds), run(tmp_path / "merged.onnx", feeds))


def test_the_receipt_is_that_of_the_merge(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.onnx", linear_net(make_weights("float16")).model())
    first, _ = write_adapters(tmp_path)
    session = loraformat.runtime.session(base, [(first, 0.5)], providers=CPU)
    written = loraformat.merge(base, [(first, 0.5)], tmp_path / "merged.onnx")
    assert session.receipt is not None
    assert (session.receipt.weights, session.receipt.adapters) == (written.weights, written.adapters)
    assert (session.receipt.problems, session.receipt.plan_sha256) == (written.problems, written.plan_sha256)
    assert session.receipt.output == ""
    assert session.switch().receipt is None


def refuse(base: Path, adapters: Sequence[Path], **options: float) -> tuple[str, ...]:
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.runtime.session(base, adapters, providers=CPU, **options)
    return caught.value.codes


def test_refusals_of_merges_are_refusals_here(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.onnx", linear_net(make_weights("float16")).model())
    weak = write_peft(tmp_path / "weak", {m: (d * 1e-4, u * 1e-3) for m, (d, u) in make_factors(1).items()})
    assert set(refuse(base, [weak])) == {"LF504"}
    assert loraformat.runtime.session(base, [weak], providers=CPU, min_retained=0.0).receipt is not None
    strange = write_peft(tmp_path / "strange", {"layers.7.gone": lora_factors(np.random.default_rng(0), 8, 6, 2)})
    assert set(refuse(base, [strange])) == {"LF401"}
    session = loraformat.runtime.session(base, providers=CPU)
    with pytest.raises(loraformat.LoraformatError):
        session.switch([strange])
    name_journal(base).write_bytes(b"")
    assert refuse(base, []) == ("LF621",)


def test_a_base_of_another_format_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "in", "safetensors")
    assert refuse(base, [write_adapter(tmp_path / "style")]) == ("LF810",)


@pytest.mark.parametrize("change", ["rewritten", "replaced", "gone"])
def test_a_base_that_changes_is_refused(tmp_path: Path, change: str) -> None:
    base = write_model(tmp_path / "base.onnx", linear_net(make_weights()).model(), "one")
    data = tmp_path / "base.onnx.data"
    session = loraformat.runtime.session(base, providers=CPU)
    if change == "rewritten":
        os.utime(data, ns=(1, 1))
    elif change == "replaced":
        other = tmp_path / "other"
        other.write_bytes(data.read_bytes())
        other.replace(data)
    else:
        data.rename(tmp_path / "elsewhere")
    with pytest.raises(loraformat.LoraformatError) as caught:
        session.switch()
    assert set(caught.value.codes) <= {"LF906", "LF100"}


def test_an_adapter_that_was_loaded_stays_what_it_was(tmp_path: Path) -> None:
    """Another one is put in its place, as a training run does: the open file is the old one."""
    base = write_model(tmp_path / "base.onnx", linear_net(make_weights()).model())
    first, second = (write_peft(tmp_path / name, make_factors(seed)) for seed, name in enumerate("ab"))
    held, feeds = loraformat.load(first), make_feeds(base)
    session = loraformat.runtime.session(base, [held], providers=CPU)
    (second / "adapter_model.safetensors").replace(first / "adapter_model.safetensors")
    assert all_same(compute(session.switch([held]), feeds), compute(session, feeds))
    assert not all_same(compute(session.switch([loraformat.load(first)]), feeds), compute(session, feeds))


def test_a_graph_too_large_to_hand_over_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in functions must be in the bytes; those of the main graph need not."""
    first, _ = write_adapters(tmp_path)
    monkeypatch.setattr("loraformat.runtime._served_graph.MAX_PROTOBUF_BYTES", 20_000)
    inside = write_model(tmp_path / "inside.onnx", in_functions())
    assert refuse(inside, [first]) == ("LF812",)
    outside = write_model(tmp_path / "outside.onnx", in_constants())
    assert loraformat.runtime.session(outside, [first], providers=CPU).cost.weights == 3


def test_without_onnxruntime_or_with_an_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model(tmp_path / "base.onnx", linear_net(make_weights()).model())
    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    assert refuse(base, []) == ("LF811",)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert refuse(base, []) == ("LF811",)


def test_settings_with_devices_are_refused(tmp_path: Path) -> None:
    if not hasattr(onnxruntime, "get_ep_devices"):
        pytest.skip("an onnxruntime that knows no devices")
    base = write_model(tmp_path / "base.onnx", linear_net(make_weights()).model())
    device = next(each for each in onnxruntime.get_ep_devices() if each.ep_name == CPU[0])

    def make() -> onnxruntime.SessionOptions:
        settings = onnxruntime.SessionOptions()
        settings.add_provider_for_devices([device], {})
        return settings

    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.runtime.session(base, session_options=make())
    assert caught.value.codes == ("LF813",)
    feeds = make_feeds(base)
    assert all_same(compute(loraformat.runtime.session(base, session_options=make), feeds), run(base, feeds))
