"""A merged model beside its base that refers to the base's data files: what it adds, proves and refuses."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import loraformat
import loraformat.runtime
from builders import write_peft
from graphs import (
    Array,
    Net,
    dyadic,
    dyadic_factors,
    linear_net,
    run,
    tensors_of,
    write_data_by_hand,
    write_model,
)

SHAPES = {"model.layers.0.fc": (48, 32), "model.layers.1.fc": (40, 24), "model.layers.2.fc": (36, 56)}
TOUCHED = ("model.layers.0.fc", "model.layers.2.fc")


class Shop:
    """A folder with a base whose weights lie in data files, and an adapter of some of them."""

    def __init__(self, folder: Path, files: str = "one") -> None:
        rng = np.random.default_rng(21)
        self.folder = folder / "shop"
        self.weights = {name: dyadic(rng, *shape) for name, shape in SHAPES.items()}
        model = linear_net(self.weights).model()
        if files == "odd":
            names = [tensor.name for tensor in model.graph.initializer]
            places = {names[0]: ("a.bin", 7), names[1]: ("sub/b.bin", 0), names[2]: ("a.bin", 7 + 48 * 32 * 4 + 3)}
            self.base = write_data_by_hand(self.folder / "base.onnx", model, places)
        else:
            self.base = write_model(self.folder / "base.onnx", model, files)
        factors = {name: dyadic_factors(rng, *SHAPES[name], 2) for name in TOUCHED}
        self.adapter = write_peft(folder / "adapter", factors)
        self.feeds: dict[str, Array] = {f"in.{n}": dyadic(rng, 3, shape[1]) for n, shape in SHAPES.items()}

    def merge(self, name: str = "merged.onnx", **options: Any) -> Path:
        loraformat.merge(self.base, [self.adapter], self.folder / name, external_data="share", **options)
        return self.folder / name

    def list_files(self) -> dict[str, bytes]:
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}

    def verify(self, merged: Path) -> Any:
        return loraformat.verify(merged, self.base, [self.adapter])


@pytest.mark.parametrize("files", ["one", "many", "odd", ""])
def test_it_adds_a_small_model_and_what_differs(tmp_path: Path, files: str) -> None:
    shop = Shop(tmp_path, files)
    before = shop.list_files()
    merged = shop.merge()
    after = shop.list_files()
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"merged.onnx", "merged.onnx.data"}
    touched = sum(4 * np.prod(SHAPES[name]) for name in TOUCHED)
    assert touched <= len(after["merged.onnx.data"]) < touched + 2 * 64
    assert len(after["merged.onnx"]) < len(before["base.onnx"]) + 2500
    loraformat.merge(shop.base, [shop.adapter], tmp_path / "whole.onnx")
    for one, other in zip(run(merged, shop.feeds), run(tmp_path / "whole.onnx", shop.feeds), strict=True):
        np.testing.assert_array_equal(one, other)
    onnx.checker.check_model(str(merged))


def test_what_does_not_change_is_read_from_the_base(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    merged = onnx.load(shop.merge(), load_external_data=False)
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in merged.graph.initializer]
    assert [place["location"] for place in places] == ["merged.onnx.data", "base.onnx.data", "merged.onnx.data"]
    assert all(int(place["offset"]) % 64 == 0 for place in places if place["location"] == "merged.onnx.data")


def test_many_tasks_share_one_base(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    one, other = shop.merge("one.onnx"), shop.merge("other.onnx")
    assert shop.verify(one).holds
    assert shop.verify(other).holds
    assert sum(name.endswith(".data") for name in shop.list_files()) == 3


@pytest.mark.parametrize("files", ["one", "many", "odd", ""])
def test_it_is_proven(tmp_path: Path, files: str) -> None:
    shop = Shop(tmp_path, files)
    merged = shop.merge()
    found = shop.verify(merged)
    assert found.holds
    data = bytearray((shop.folder / "merged.onnx.data").read_bytes())
    data[-5] ^= 1
    (shop.folder / "merged.onnx.data").write_bytes(data)
    (problem,) = shop.verify(merged).problems
    assert problem.code == "LF802"


def test_moved_with_a_copy_of_the_data_it_is_proven_against_the_base(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    shop.merge()
    moved = tmp_path / "elsewhere"
    shutil.copytree(shop.folder, moved)
    assert shop.verify(moved / "merged.onnx").holds
    data = bytearray((moved / "base.onnx.data").read_bytes())
    data[100] ^= 1
    (moved / "base.onnx.data").write_bytes(data)
    assert {problem.code for problem in shop.verify(moved / "merged.onnx").problems} == {"LF801"}


def test_replaced_it_takes_no_data_of_the_base_away(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    shop.merge()
    before = shop.list_files()
    merged = shop.merge(force=True)
    assert shop.list_files()["base.onnx.data"] == before["base.onnx.data"]
    assert sum(name.endswith(".data") for name in shop.list_files()) == 2
    assert shop.verify(merged).holds


@pytest.mark.parametrize("jobs", [1, 3])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, jobs: int) -> None:
    shop = Shop(tmp_path)
    shop.merge("merged.onnx", jobs=2)
    first = shop.list_files()
    shop.merge("merged.onnx", jobs=jobs, force=True)
    names = [name for name in shop.list_files() if name.startswith("merged") and name.endswith(".data")]
    assert [shop.list_files()[name] for name in names] == [first["merged.onnx.data"]]


def refuse(shop: Shop, output: Path, **options: Any) -> None:
    before = shop.list_files()
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(shop.base, [shop.adapter], output, **{"external_data": "share", **options})
    assert caught.value.codes == ("LF444",)
    assert shop.list_files() == before


def test_another_folder_is_refused(tmp_path: Path) -> None:
    refuse(Shop(tmp_path), tmp_path / "merged.onnx")


@pytest.mark.parametrize("name", ["a\\b.onnx", "C:b.onnx", "a\udcff.onnx"])
def test_a_base_whose_name_no_model_may_refer_to_is_refused(tmp_path: Path, name: str) -> None:
    shop = Mixed(tmp_path)
    shop.base = shop.base.rename(shop.folder / name)
    before = shop.list_files()
    with pytest.raises(loraformat.LoraformatError) as caught:
        shop.merge()
    assert caught.value.codes == ("LF608",)
    assert shop.list_files() == before


# --- weights inside the base's own file ------------------------------------------------------------------------------


class Mixed(Shop):
    """A base with weights in its own file: initializers, one of a branch, one of a Constant node, and a small one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "")
        model = onnx.load(str(self.base))
        rng = np.random.default_rng(22)
        extra = {name: dyadic(rng, 40, 32) for name in ("then", "else", "constant")}
        branches = {}
        for name in ("then", "else"):
            inner = Net()
            inner.op("MatMul", ["in.extra", inner.weight(f"w_{name}", extra[name].T)], inner.result(f"out_{name}"))
            branches[f"{name}_branch"] = inner.branch(name)
        net = Net()
        net.feed("in.extra")
        held = net.constant("held", extra["constant"].T)
        picked = net.op("If", [net.feed("flag", TensorProto.BOOL, 0)], "picked", **branches)
        net.op("Add", [net.op("MatMul", ["in.extra", held], "product"), picked], net.result("out.extra"))
        model.graph.node.extend(net.nodes)
        model.graph.input.extend(net.inputs)
        model.graph.output.extend(net.outputs)
        onnx.checker.check_model(model)
        self.base.write_bytes(model.SerializeToString())
        self.feeds |= {"in.extra": dyadic(rng, 3, 32), "flag": np.array(True)}


def test_the_base_s_own_file_is_a_data_file(tmp_path: Path) -> None:
    shop = Mixed(tmp_path)
    size = shop.base.stat().st_size
    merged = shop.merge()
    loraformat.merge(shop.base, [shop.adapter], tmp_path / "whole.onnx")
    for flag in (True, False):
        feeds = shop.feeds | {"flag": np.array(flag)}
        for one, other in zip(run(merged, feeds), run(tmp_path / "whole.onnx", feeds), strict=True):
            np.testing.assert_array_equal(one, other)
    tensors = list(tensors_of(onnx.load(str(merged), load_external_data=False)))
    places = {t.name: {e.key: e.value for e in t.external_data}.get("location") for t in tensors}
    assert places["w_then"] == places["w_else"] == "base.onnx"
    assert sorted(str(place) for place in places.values()).count("merged.onnx.data") == len(TOUCHED)
    assert merged.stat().st_size + (shop.folder / "merged.onnx.data").stat().st_size < size
    assert shop.verify(merged).holds
    onnx.checker.check_model(str(merged))


def test_a_thin_model_is_a_base_as_well(tmp_path: Path) -> None:
    """Merged once more, thin or whole, it still has its numbers from where they are."""
    shop = Shop(tmp_path, "")
    shop.merge()
    loraformat.merge(shop.folder / "merged.onnx", [shop.adapter], shop.folder / "again.onnx", external_data="share")
    for name in ("direct", "elsewhere"):
        (tmp_path / name).mkdir()
    loraformat.merge(shop.folder / "merged.onnx", [shop.adapter], tmp_path / "elsewhere" / "again.onnx")
    loraformat.merge(shop.base, [shop.adapter, shop.adapter], tmp_path / "direct" / "twice.onnx")
    found = run(shop.folder / "again.onnx", shop.feeds), run(tmp_path / "elsewhere" / "again.onnx", shop.feeds)
    for twice in found:
        for one, other in zip(twice, run(tmp_path / "direct" / "twice.onnx", shop.feeds), strict=True):
            np.testing.assert_array_equal(one, other)


def test_replacing_a_thin_model_leaves_the_base_that_it_reads(tmp_path: Path) -> None:
    """`m-base.onnx` begins with the stem of `m.onnx`, but is a model of its own."""
    shop = Shop(tmp_path, "")
    shop.base = shop.base.rename(shop.folder / "m-base.onnx")
    shop.merge("m.onnx")
    other = Shop(tmp_path / "other", "")
    loraformat.merge(other.base, [other.adapter], shop.folder / "m.onnx", force=True)
    assert shop.base.exists()


@pytest.mark.parametrize("files", ["one", ""])
def test_a_cache_of_symbolic_links_is_refused_as_data(tmp_path: Path, files: str) -> None:
    """As the hub's are: onnxruntime loads the base, but follows no link out of the folder from a model beside it."""
    shop = Shop(tmp_path, files)
    for number, path in enumerate(list(shop.folder.iterdir())):
        path.symlink_to(path.rename(tmp_path / f"blob-{number}"))
    run(shop.base, shop.feeds)
    refuse(shop, shop.folder / "merged.onnx")


def test_a_link_that_stays_in_the_folder_is_data(tmp_path: Path) -> None:
    shop = Shop(tmp_path, "")
    shop.base.symlink_to(shop.base.rename(shop.folder / "version-1.onnx"))
    merged = shop.merge()
    run(merged, shop.feeds)
    assert shop.verify(merged).holds


def test_the_base_itself_is_refused(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    refuse(shop, shop.base, force=True)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    refuse(shop, shop.folder / "merged.onnx", keep_undo=True)
    refuse(shop, shop.folder / "merged.onnx", external_data="borrow")


def test_a_checkpoint_is_refused(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    from safetensors.numpy import save_file

    save_file({f"{n}.weight": w for n, w in shop.weights.items()}, shop.folder / "base.safetensors")
    shop.base = shop.folder / "base.safetensors"
    refuse(shop, shop.folder / "merged.safetensors")


def test_a_model_with_inputs_for_adapters_reads_the_base_s_own_file(tmp_path: Path) -> None:
    shop = Shop(tmp_path, "")
    output = shop.folder / "runtime.onnx"
    loraformat.runtime.export_runtime(shop.base, [shop.adapter], output, external_data="share")
    assert output.stat().st_size < shop.base.stat().st_size - 4 * sum(np.prod(SHAPES[name]) for name in TOUCHED) + 8192
    tensors = onnx.load(str(output), load_external_data=False).graph.initializer
    places = [entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"]
    assert places == ["base.onnx"] * len(TOUCHED)
    for one, other in zip(run(output, shop.feeds), run(shop.base, shop.feeds), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["base.onnx", "merged.onnx"])
def test_neither_is_merged_into_in_place(tmp_path: Path, name: str) -> None:
    """Each reads the other's file: that its numbers change would be seen by nobody."""
    shop = Shop(tmp_path)
    shop.merge()
    before = shop.list_files()
    other = write_peft(tmp_path / "other", {"model.layers.1.fc": dyadic_factors(np.random.default_rng(3), 40, 24, 2)})
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge_into(shop.folder / name, [other])
    assert caught.value.codes == ("LF638",)
    assert shop.list_files() == before
