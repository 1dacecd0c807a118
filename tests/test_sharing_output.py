"""A merged model beside its base that refers to the base's data files: what it adds, proves and refuses."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import loraformat
from builders import write_peft
from graphs import Array, dyadic, dyadic_factors, linear_net, run, write_data_by_hand, write_model

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


@pytest.mark.parametrize("files", ["one", "many", "odd"])
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


@pytest.mark.parametrize("files", ["one", "many", "odd"])
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


def test_weights_inside_the_model_are_refused(tmp_path: Path) -> None:
    shop = Shop(tmp_path, "")
    refuse(shop, shop.folder / "merged.onnx")


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
