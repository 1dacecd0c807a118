"""Carrying out a plan: which bytes change, which do not, what may be overwritten, and what is left when it fails."""

import errno
import json
import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import loraformat
from builders import Factors, lora_factors, write_peft
from graphs import (
    Net,
    dyadic,
    dyadic_factors,
    linear_net,
    make_adapter,
    make_target,
    product,
    read_state,
    run,
    same_bits,
    stored_weights,
    torchscript_name,
    write_data_by_hand,
    write_model,
    write_state,
)
from loraformat.bases import BaseModel
from loraformat.loading import open_base
from loraformat.receipt import RECEIPT_KEY

NAMES = ("layers.0.fc", "layers.1.fc", "layers.2.fc")
OUT, IN, RANK = 12, 10, 2
FORMS = ("onnx", "one", "many", "safetensors")


def make_base(folder: Path, form: str, name: str = "base", seed: int = 0) -> Path:
    """Write a base of three linear modules and something else beside them."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {module: dyadic(rng, OUT, IN) for module in NAMES}
    if form == "safetensors":
        state = {f"{module}.weight": array for module, array in arrays.items()} | {"norm.weight": dyadic(rng, 9)}
        return write_state(folder / f"{name}.safetensors", state, {"format": "pt"})
    net = linear_net(arrays)
    net.weight("table", dyadic(rng, 30, 40))
    net.result("table")
    model = net.model()
    model.metadata_props.add(key="author", value="someone")
    return write_model(folder / f"{name}.onnx", model, "" if form == "onnx" else form)


def make_factors(seed: int = 1, modules: tuple[str, ...] = NAMES[:2]) -> dict[str, Factors]:
    rng = np.random.default_rng(seed)
    return {module: dyadic_factors(rng, OUT, IN, RANK) for module in modules}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(tmp_path: Path, form: str) -> Path:
    return make_base(tmp_path, form)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_peft(tmp_path / "style", make_factors(), alpha=RANK)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(*arguments: Any, **options: Any) -> loraformat.LoraformatError:
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(*arguments, **options)
    return caught.value


def outputs_of(output: Path) -> list[Path]:
    """Return the files of a model, the data files of an ONNX model first."""
    return [file.path for file in open_base(output).files][::-1]


# --- which bytes change ----------------------------------------------------------------------------------------------


def test_only_the_targets_change(tmp_path: Path, base: Path, adapter: Path, form: str) -> None:
    output = tmp_path / f"out{base.suffix}"
    loraformat.merge(base, [adapter], output)
    read = read_state if form == "safetensors" else stored_weights
    before, after = read(base), read(output)
    deltas = dict(zip(before, (product(factors) for factors in make_factors().values()), strict=False))
    assert list(before) == list(after)
    for position, (name, weight) in enumerate(before.items()):
        if name in deltas and position < 2:
            turned = deltas[name] if form == "safetensors" else deltas[name].T
            assert same_bits(after[name], (weight + turned).astype(np.float32))
        else:
            assert same_bits(after[name], weight)


def test_every_byte_outside_the_spans_is_the_input_s(tmp_path: Path, base: Path, adapter: Path, form: str) -> None:
    """The whole file, not what a parser sees of it: spans cut out, and the receipt and names of data files put back."""
    output = tmp_path / f"out{base.suffix}"
    plan = loraformat.plan_merge(base, [adapter], output)
    loraformat.merge(base, [adapter], output)
    before, after = open_base(base), open_base(output)
    changed = {weight.name for weight in plan.weights}
    blanked = [_blank(opened, changed) for opened in (before, after)]
    if form == "safetensors":
        data = [content[0][8 + int.from_bytes(content[0][:8], "little") :] for content in blanked]
        assert data[0] == data[1]
        return
    *data_before, model_before = blanked[0]
    *data_after, model_after = blanked[1]
    assert data_before == data_after
    if form == "onnx":
        assert model_after.startswith(model_before)
        entry = onnx.ModelProto.FromString(model_after[len(model_before) :])
        assert [item.key for item in entry.metadata_props] == [RECEIPT_KEY]
        assert entry.ListFields()[0][0].name == "metadata_props"
        assert len(entry.ListFields()) == 1


def _blank(opened: BaseModel, names: set[str]) -> list[bytes]:
    """Return the files of a model with the given tensors overwritten, data files first and in a fixed order."""
    contents = {file.path: bytearray(file.path.read_bytes()) for file in opened.files}
    for tensor in opened.list_tensors():
        if tensor.name in names:
            contents[tensor.span.path][tensor.span.offset : tensor.span.end] = b"\0" * tensor.span.length
    return [bytes(content) for content in list(contents.values())[1:] + list(contents.values())[:1]]


def test_the_graph_is_the_same_but_for_one_entry(tmp_path: Path, adapter: Path) -> None:
    for form in ("onnx", "one", "many"):
        base = make_base(tmp_path / form, form)
        output = tmp_path / form / "out.onnx"
        receipt = loraformat.merge(base, [adapter], output)
        before, after = (onnx.load(str(path), load_external_data=False) for path in (base, output))
        assert list(before.graph.node) == list(after.graph.node)
        assert list(before.graph.input) == list(after.graph.input)
        assert list(before.graph.output) == list(after.graph.output)
        *kept, added = after.metadata_props
        assert kept == list(before.metadata_props)
        assert added.key == RECEIPT_KEY
        assert json.loads(added.value) == json.loads(receipt.embedded_text())
        onnx.checker.check_model(str(output), full_check=True)


def test_offsets_of_a_state_dict_are_kept(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path, "safetensors")
    output = tmp_path / "out.safetensors"
    loraformat.merge(base, [adapter], output)

    def header(path: Path) -> dict[str, Any]:
        data = path.read_bytes()
        return dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))

    before, after = header(base), header(output)
    assert {**before, "__metadata__": None} == {**after, "__metadata__": None}
    assert before["__metadata__"].items() < after["__metadata__"].items()
    assert set(after["__metadata__"]) - set(before["__metadata__"]) == {RECEIPT_KEY}


@pytest.mark.parametrize(
    ("form", "shape"), [("onnx", (2300, 1000)), ("one", (257, 4099)), ("safetensors", (2300, 1000))], ids=str
)
def test_the_same_bytes_for_any_number_of_workers_and_any_memory(
    tmp_path: Path, shape: tuple[int, int], form: str
) -> None:
    """More than one tile and, at nine megabytes, more than one run of tiles; random numbers, so that rounding shows."""
    rng = np.random.default_rng(51)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name in NAMES[:2]}
    if form == "safetensors":
        base = write_state(tmp_path / "base.safetensors", {f"{name}.weight": array for name, array in arrays.items()})
    else:
        base = write_model(tmp_path / "base.onnx", linear_net(arrays, "named").model(), "" if form == "onnx" else form)
    adapters = [make_adapter(*(make_target(name, lora_factors(rng, *shape, 8)) for name in arrays)) for _ in range(2)]
    seen = set()
    for jobs, memory in ((1, 1 << 30), (2, 1 << 30), (8, 1 << 30), (8, 12 << 20)):
        output = tmp_path / f"o-{jobs}-{memory}" / base.name
        output.parent.mkdir()
        loraformat.merge(base, [(adapters[0], 0.3), adapters[1]], output, jobs=jobs, max_memory_bytes=memory)
        seen.add(tuple(path.read_bytes() for path in outputs_of(output)))
        shutil.rmtree(output.parent)
    assert len(seen) == 1


@pytest.mark.parametrize("form", ["onnx", "one", "safetensors"])  # onnx invents names for many data files
def test_the_output_does_not_depend_on_where_things_stand(tmp_path: Path, form: str) -> None:
    seen = set()
    for place in ("a", "another/place"):
        base = make_base(tmp_path / place, form)
        adapter = write_peft(tmp_path / place / "style", make_factors(), alpha=RANK)
        output = tmp_path / place / f"out{base.suffix}"
        loraformat.merge(base, [adapter], output)
        seen.add(tuple(path.read_bytes() for path in outputs_of(output)))
    assert len(seen) == 1


def test_without_hard_links_or_kernel_copies_the_bytes_are_the_same(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems differ in what they can do; the output does not."""
    first, second = tmp_path / "one" / base.name, tmp_path / "two" / base.name
    first.parent.mkdir()
    second.parent.mkdir()
    loraformat.merge(base, [adapter], first)

    def unable(*_: object, **__: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    for name in ("copy_file_range", "link", "posix_fallocate"):
        monkeypatch.setattr(os, name, unable)
    loraformat.merge(base, [adapter], second)
    assert files_below(first.parent) == files_below(second.parent)


def test_inputs_are_left_as_they_were(tmp_path: Path, base: Path, adapter: Path) -> None:
    def state() -> dict[str, tuple[bytes, int]]:
        return {
            str(path): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in tmp_path.rglob("*")
            if path.is_file() and not path.name.startswith("out")
        }

    before = state()
    loraformat.merge(base, [adapter], tmp_path / f"out{base.suffix}")
    assert state() == before


def test_a_weight_at_the_last_byte_and_at_the_first(tmp_path: Path) -> None:
    """Spans that touch each other and the ends of the file leave no piece to copy between them."""
    base = make_base(tmp_path, "one")
    names = list(stored_weights(base))
    assert len(names) == 4
    adapter = make_adapter(*(make_target(name, factors) for name, factors in make_factors(2, NAMES).items()))
    output = tmp_path / "out.onnx"
    loraformat.merge(base, [adapter], output)
    before, after = stored_weights(base), stored_weights(output)
    for name, factors in zip(names[:3], make_factors(2, NAMES).values(), strict=True):
        np.testing.assert_array_equal(after[name], before[name] + product(factors).T)
    np.testing.assert_array_equal(after["table"], before["table"])


# --- the receipt -----------------------------------------------------------------------------------------------------


def test_merging_a_merged_model_keeps_the_old_receipt(tmp_path: Path, base: Path, adapter: Path) -> None:
    once, twice, thrice = (tmp_path / f"{name}{base.suffix}" for name in ("once", "twice", "thrice"))
    first = loraformat.merge(base, [adapter], once)
    second = loraformat.merge(once, [(adapter, 0.5)], twice)
    third = loraformat.merge(twice, [(adapter, 0.25)], thrice)
    assert first.parent is None
    assert second.parent == json.loads(first.embedded_text())
    assert third.parent == json.loads(second.embedded_text())
    assert open_base(thrice).parent_receipt == json.loads(third.embedded_text())
    if base.suffix == ".onnx":
        model = onnx.load(str(thrice), load_external_data=False)
        assert [entry.key for entry in model.metadata_props] == ["author", RECEIPT_KEY]
    if base.suffix == ".safetensors":
        assert open_base(thrice).structure_sha256 == open_base(base).structure_sha256


def test_the_receipt_of_the_model_holds_no_paths(tmp_path: Path, base: Path, adapter: Path) -> None:
    receipt = loraformat.merge(base, [adapter], tmp_path / f"out{base.suffix}")
    assert str(tmp_path) not in receipt.embedded_text()
    assert receipt.output == str(tmp_path / f"out{base.suffix}")


@pytest.mark.parametrize("count", [1, 40])
def test_the_receipt_fits_its_blank_whatever_the_numbers_are(tmp_path: Path, count: int) -> None:
    """Its size is fixed before the numbers are known: tiny, huge and negative ones must fit."""
    rng = np.random.default_rng(52)
    names = [f"layers.{index}.fc" for index in range(count)]
    sizes = 10.0 ** rng.uniform(-30, 15, count)
    state = {
        f"{name}.weight": (dyadic(rng, 6, 5) * size).astype(np.float32) for name, size in zip(names, sizes, strict=True)
    }
    base = write_state(tmp_path / "base.safetensors", state)
    factors = [dyadic_factors(rng, 6, 5, 1) for _ in names]
    targets = [
        make_target(name, pair, scale=10.0 ** rng.uniform(-20, 10)) for name, pair in zip(names, factors, strict=True)
    ]
    receipt = loraformat.merge(base, [make_adapter(*targets)], tmp_path / "out.safetensors", min_retained=-1e9)
    assert open_base(tmp_path / "out.safetensors").parent_receipt == json.loads(receipt.embedded_text())


# --- overwriting -----------------------------------------------------------------------------------------------------


def test_what_exists_is_not_overwritten(tmp_path: Path, base: Path, adapter: Path) -> None:
    output = tmp_path / f"out{base.suffix}"
    output.write_bytes(b"precious")
    before = files_below(tmp_path)
    assert refused(base, [adapter], output).codes == ("LF601",)
    assert files_below(tmp_path) == before
    loraformat.merge(base, [adapter], output, force=True)
    assert output.read_bytes() != b"precious"


def test_a_file_that_appears_during_the_run_is_not_overwritten(tmp_path: Path, base: Path, adapter: Path) -> None:
    output = tmp_path / f"out{base.suffix}"
    before = files_below(tmp_path)
    assert refused(base, [adapter], output, progress=Watcher(lambda: output.write_bytes(b"new"))).codes == ("LF601",)
    assert files_below(tmp_path) == before | {output.name: b"new"}


@pytest.mark.parametrize("way", ["same path", "other spelling", "symlink", "hard link"])
@pytest.mark.parametrize("force", [False, True])
def test_the_output_may_not_be_the_base(tmp_path: Path, base: Path, adapter: Path, way: str, force: bool) -> None:
    output = _name_again(base, way)
    before = files_below(tmp_path)
    assert refused(base, [adapter], output, force=force).codes == ("LF602",)
    assert files_below(tmp_path) == before


def _name_again(path: Path, way: str) -> Path:
    if way == "same path":
        return path
    if way == "other spelling":
        return path.parent / ".." / path.parent.name / path.name
    other = path.with_name(f"again{path.suffix}")
    if way == "symlink":
        other.symlink_to(path)
    else:
        os.link(path, other)
    return other


@pytest.mark.parametrize("way", ["same path", "symlink", "hard link"])
def test_the_output_may_not_be_a_data_file_of_the_base(tmp_path: Path, adapter: Path, way: str) -> None:
    base = make_base(tmp_path, "one")
    output = _name_again(tmp_path / "base.onnx.data", way)
    before = files_below(tmp_path)
    assert refused(base, [adapter], output, force=True).codes == ("LF602",)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("way", ["same path", "symlink", "hard link"])
def test_the_output_may_not_be_an_adapter(tmp_path: Path, base: Path, adapter: Path, way: str) -> None:
    output = _name_again(adapter / "adapter_model.safetensors", way)
    before = files_below(tmp_path)
    assert refused(base, [adapter], output, force=True).codes == ("LF602",)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: path.mkdir(), "LF603"),
        (lambda path: os.mkfifo(path), "LF603"),
        (lambda path: path.symlink_to(path.with_name("nowhere")), "LF603"),
    ],
    ids=["folder", "pipe", "dangling symlink"],
)
@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_file_is_not_written_to(
    tmp_path: Path, base: Path, adapter: Path, make: Callable[[Path], None], code: str, force: bool
) -> None:
    output = tmp_path / f"out{base.suffix}"
    make(output)
    before = files_below(tmp_path)
    assert refused(base, [adapter], output, force=force).codes == (code,)
    assert files_below(tmp_path) == before


def test_a_missing_folder_is_not_made(tmp_path: Path, base: Path, adapter: Path) -> None:
    before = files_below(tmp_path)
    assert refused(base, [adapter], tmp_path / "absent" / f"out{base.suffix}").codes == ("LF605",)
    assert not (tmp_path / "absent").exists()
    assert files_below(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_closed_folder_is_an_error(tmp_path: Path, base: Path, adapter: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert refused(base, [adapter], closed / f"out{base.suffix}").codes == ("LF605",)


def test_a_name_too_long_is_an_error(tmp_path: Path, base: Path, adapter: Path) -> None:
    for length in (230, 300):  # the second is one that the system does not even look for
        assert refused(base, [adapter], tmp_path / ("x" * length + base.suffix)).codes == ("LF608",)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_an_adapter_whose_name_is_no_text(tmp_path: Path, base: Path, adapter: Path) -> None:
    odd = adapter.rename(adapter.with_name(os.fsdecode(b"style\xfe") + adapter.suffix))
    output = tmp_path / f"out{base.suffix}"
    assert loraformat.merge(base, [odd], output).adapters[0].name == r"style\udcfe"
    assert loraformat.verify(output, base=base, adapters=[odd]).problems == ()


def test_mode_bits_of_a_replaced_file_are_kept(tmp_path: Path, base: Path, adapter: Path) -> None:
    output = tmp_path / f"out{base.suffix}"
    output.write_bytes(b"old")
    output.chmod(0o640)
    loraformat.merge(base, [adapter], output, force=True)
    assert stat.S_IMODE(output.stat().st_mode) == 0o640


# --- external data ---------------------------------------------------------------------------------------------------


def names_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_data_files_take_the_output_s_name(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path, "one")
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    assert names_of(tmp_path) >= {"merged.onnx", "merged.onnx.data"}
    locations = {
        entry.value
        for tensor in onnx.load(str(tmp_path / "merged.onnx"), load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert locations == {"merged.onnx.data"}


def test_in_another_folder_under_the_same_name_the_graph_is_untouched(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path, "many")
    (tmp_path / "out").mkdir()
    loraformat.merge(base, [adapter], tmp_path / "out" / "base.onnx")
    data = base.read_bytes()
    assert (tmp_path / "out" / "base.onnx").read_bytes().startswith(data)
    assert len(names_of(tmp_path / "out")) == 5


def test_sub_folders_of_data_are_made_and_go_again_on_failure(tmp_path: Path) -> None:
    net = linear_net({"a": np.ones((OUT, IN), np.float32)}, "named")
    path = write_data_by_hand(tmp_path / "m.onnx", net.model(), {"a.weight": ("deep/er/w.bin", 64)})
    rng = np.random.default_rng(53)
    good = make_adapter(make_target("a", dyadic_factors(rng, OUT, IN, RANK)))
    huge = make_adapter(make_target("a", (np.full((1, IN), 1e30), np.full((OUT, 1), 1e30))))
    output = tmp_path / "out" / "m.onnx"
    output.parent.mkdir()
    assert refused(path, [huge], output).codes == ("LF503",)
    assert list(output.parent.iterdir()) == []
    loraformat.merge(path, [good], output)
    assert names_of(output.parent) == {"m.onnx", "deep/er/w.bin"}
    assert (output.parent / "deep/er/w.bin").read_bytes()[:64] == b"\xaa" * 64
    before = files_below(output.parent)
    assert refused(path, [good], output).codes == ("LF601",)
    assert files_below(output.parent) == before


def test_a_file_in_the_place_of_a_sub_folder_is_an_error(tmp_path: Path) -> None:
    net = linear_net({"a": np.ones((OUT, IN), np.float32)}, "named")
    path = write_data_by_hand(tmp_path / "m.onnx", net.model(), {"a.weight": ("deep/w.bin", 0)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "deep").write_bytes(b"a file")
    good = make_adapter(make_target("a", dyadic_factors(np.random.default_rng(0), OUT, IN, RANK)))
    assert refused(path, [good], tmp_path / "out" / "m.onnx").codes == ("LF605",)
    assert names_of(tmp_path / "out") == {"deep"}


def test_an_adapter_alone_need_not_be_in_a_list(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path, "one")
    whole = loraformat.merge(base, [adapter], tmp_path / "whole.onnx")
    for given in (adapter, str(adapter), loraformat.load(adapter)):
        receipt = loraformat.merge(base, given, tmp_path / "merged.onnx", force=True)
        assert receipt.adapters == whole.adapters
        assert not loraformat.verify(receipt.output, base, given).problems


def test_data_names_that_are_taken_are_left_alone(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path, "one")
    (tmp_path / "merged.onnx.data").write_bytes(b"someone else's")
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx")
    assert (tmp_path / "merged.onnx.data").read_bytes() == b"someone else's"
    (fresh,) = {name for name in names_of(tmp_path) if name.startswith("merged-")}
    assert fresh.endswith(".onnx.data")
    run(tmp_path / "merged.onnx", {f"in.{name}": np.ones((1, IN), np.float32) for name in NAMES})


def test_replacing_a_model_replaces_its_data_and_nothing_else(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path, "one")
    output = tmp_path / "merged.onnx"
    loraformat.merge(base, [(adapter, 2.0)], output)
    for name in ("merged.onnx.data.bak", "merged-notes.txt", "mergedx.onnx.data", ".hidden"):
        (tmp_path / name).write_bytes(b"mine")
    before = names_of(tmp_path)
    for weight in (1.0, 0.5, 1.0):
        loraformat.merge(base, [(adapter, weight)], output, force=True)
        after = names_of(tmp_path)
        data = {name for name in after if name.startswith("merged") and name.endswith(".data")} - {"mergedx.onnx.data"}
        assert len(data) == 1, "one data file, the old one gone"
        assert after - data == before - {"merged.onnx.data"}
        expected = stored_weights(base)
        found = stored_weights(output)
        for name, factors in zip(list(expected)[:2], make_factors().values(), strict=True):
            np.testing.assert_array_equal(found[name], expected[name] + product(factors, weight).T)


def test_data_that_the_base_shares_with_the_old_output_is_kept(tmp_path: Path, adapter: Path) -> None:
    """`base-fixed.onnx`, saved by a tool that changed the graph alone, still reads `base.onnx.data`."""
    make_base(tmp_path, "one")
    fixed = tmp_path / "fixed.onnx"
    shutil.copy(tmp_path / "base.onnx", fixed)
    before = stored_weights(fixed)
    loraformat.merge(fixed, [adapter], tmp_path / "base.onnx", force=True)
    after = stored_weights(fixed)
    assert all(same_bits(before[name], after[name]) for name in before)
    assert not same_bits(next(iter(stored_weights(tmp_path / "base.onnx").values())), next(iter(before.values())))


def test_data_files_are_placed_before_the_model(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens the model while it is being replaced finds the data that it names."""
    base = make_base(tmp_path, "many")
    output = tmp_path / "merged.onnx"
    loraformat.merge(base, [(adapter, 2.0)], output)
    placed: list[str] = []
    real = os.replace

    def noting(source: Any, target: Any, **more: Any) -> None:
        stored_weights(output)
        placed.append(Path(target).name)
        real(source, target, **more)
        stored_weights(output)

    monkeypatch.setattr(os, "replace", noting)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    loraformat.merge(base, [adapter], output, force=True)
    assert placed[-1] == "merged.onnx"
    assert len(placed) == 5


def test_a_model_and_its_data_land_together_or_not_at_all(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path, "many")
    before = files_below(tmp_path)
    real = os.link

    def link(source: Any, target: Any, **more: Any) -> None:
        if str(target).endswith("merged.onnx"):
            raise FileExistsError
        real(source, target, **more)

    monkeypatch.setattr(os, "link", link)
    assert refused(base, [adapter], tmp_path / "merged.onnx").codes == ("LF601",)
    assert files_below(tmp_path) == before


# --- progress, memory, interference ----------------------------------------------------------------------------------


class Watcher:
    """A progress that adds up and, once, does something in the middle."""

    def __init__(self, act: Callable[[], object] = lambda: None) -> None:
        self.total = 0
        self.done = 0
        self.steps = 0
        self.starts = 0
        self._act = act
        self._lock = threading.Lock()

    def start(self, total_bytes: int) -> None:
        self.starts += 1
        self.total = total_bytes

    def advance(self, done_bytes: int) -> None:
        with self._lock:
            self.done += done_bytes
            self.steps += 1
            first = self.steps == 1
        assert done_bytes > 0
        if first:
            self._act()


@pytest.mark.parametrize("jobs", [1, 4])
def test_progress_adds_up_to_the_size_of_the_output_but_for_the_receipt(
    tmp_path: Path, base: Path, adapter: Path, jobs: int
) -> None:
    watcher = Watcher()
    output = tmp_path / "out" / base.name
    output.parent.mkdir()
    receipt = loraformat.merge(base, [adapter], output, jobs=jobs, progress=watcher)
    written = sum(path.stat().st_size for path in outputs_of(output))
    assert watcher.starts == 1
    assert watcher.total == watcher.done
    blank = written - watcher.done  # The receipt is written when all numbers are known, the bar at its end.
    assert len(receipt.embedded_text()) <= blank <= 2 * len(receipt.embedded_text()) + 100


@pytest.mark.parametrize("victim", ["model", "data"])
@pytest.mark.parametrize("form", ["onnx", "one", "safetensors"])
def test_an_input_that_changes_during_the_merge_is_noticed(
    tmp_path: Path, adapter: Path, form: str, victim: str
) -> None:
    base = make_base(tmp_path, form)
    path = base if victim == "model" else tmp_path / "base.onnx.data"
    if not path.exists():
        pytest.skip("the model has no data file")
    before = names_of(tmp_path)
    error = refused(base, [adapter], tmp_path / f"out{base.suffix}", progress=Watcher(lambda: os.utime(path)))
    assert error.codes == ("LF906",)
    assert str(path) in error.problems[0].where
    assert names_of(tmp_path) == before


def test_an_input_that_is_cut_off_during_the_merge_is_noticed(tmp_path: Path, base: Path, adapter: Path) -> None:
    before = names_of(tmp_path)
    error = refused(base, [adapter], tmp_path / f"out{base.suffix}", progress=Watcher(lambda: os.truncate(base, 50)))
    assert error.codes == ("LF906",)
    assert names_of(tmp_path) == before


@pytest.mark.parametrize("budget", [0, 1, 4096])
def test_a_tiny_memory_budget_is_refused(tmp_path: Path, budget: int) -> None:
    rng = np.random.default_rng(54)
    base = write_state(tmp_path / "base.safetensors", {"a.weight": rng.standard_normal((400, 300)).astype(np.float32)})
    adapter = make_adapter(make_target("a", lora_factors(rng, 400, 300, 4)))
    error = refused(base, [adapter], tmp_path / "out.safetensors", max_memory_bytes=budget)
    assert error.codes == ("LF607",)
    assert names_of(tmp_path) == {"base.safetensors"}
    needed = int(error.problems[0].expected.removeprefix("at least ").removesuffix(" bytes"))
    loraformat.merge(base, [adapter], tmp_path / "out.safetensors", max_memory_bytes=needed)


@pytest.mark.parametrize("name", ["pwrite", "posix_fallocate", "copy_file_range", "link"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_a_failing_disk_leaves_nothing(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    base = make_base(tmp_path, "one")
    before = files_below(tmp_path)
    left = [3]

    real = getattr(os, name)

    def failing(*arguments: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] <= 0 or name in {"link", "posix_fallocate"}:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **more)

    monkeypatch.setattr(os, name, failing)
    if name == "link":  # Taken for a file system without hard links: the output is moved instead.
        loraformat.merge(base, [adapter], tmp_path / "out.onnx")
        return
    if name == "copy_file_range":
        left[0] = 1
    error = refused(base, [adapter], tmp_path / "out.onnx")
    space = number in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    assert set(error.codes) == {"LF604" if space else "LF605"}
    assert error.exit_code == 5
    assert files_below(tmp_path) == before


def test_an_error_in_a_worker_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error is raised, the pool is gone, and no descriptor stays open."""
    rng = np.random.default_rng(55)
    state = {f"layers.{index}.weight": rng.standard_normal((300, 200)).astype(np.float32) for index in range(20)}
    base = write_state(tmp_path / "base.safetensors", state)
    targets = [make_target(f"layers.{index}", lora_factors(rng, 300, 200, 2)) for index in range(20)]

    def broken() -> None:
        raise RuntimeError("in the middle")

    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(RuntimeError, match="in the middle"):
        loraformat.merge(base, [make_adapter(*targets)], tmp_path / "out.safetensors", jobs=4, progress=Watcher(broken))
    assert names_of(tmp_path) == {"base.safetensors"}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loraformat")]
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_durable_output_is_synced_before_it_is_placed(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("fsync", "link"):
        real = getattr(os, name)

        def noting(*arguments: Any, name: str = name, real: Any = real) -> Any:
            order.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, noting)
    loraformat.merge(base, [adapter], tmp_path / f"out{base.suffix}", durable=True)
    assert order[0] == "fsync"
    assert order.index("fsync") < order.index("link")
    assert order[-1] == "fsync"
    order.clear()
    loraformat.merge(base, [adapter], tmp_path / f"out2{base.suffix}")
    assert "fsync" not in order


def test_a_weight_in_a_constant_node_is_patched_in_place(tmp_path: Path) -> None:
    """Inside a node's attribute, inside the graph's message: the lengths around it stay."""
    rng = np.random.default_rng(56)
    weight, factors = dyadic(rng, 40, 50), dyadic_factors(rng, 40, 50, 2)
    net = Net()
    net.op("MatMul", [net.feed("x"), net.constant("w", weight.T)], net.result("y"), torchscript_name("a", "MatMul"))
    base = write_model(tmp_path / "base.onnx", net.model())
    loraformat.merge(base, [make_adapter(make_target("a", factors))], tmp_path / "out.onnx")
    after = onnx.load(str(tmp_path / "out.onnx"))
    (tensor,) = [attribute.t for node in after.graph.node for attribute in node.attribute if attribute.HasField("t")]
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), (weight + product(factors)).T)
