"""A numpy archive as a base, written and read by numpy, which checks every checksum."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from graphs import Array
from laws.base_laws import StateDictLaws
from loraformat.bases import BaseModel
from loraformat.bases.npz_checkpoint import BASE
from loraformat.loading import open_base


class TestNpzCheckpointLaws(StateDictLaws):
    base = BASE
    forms = ("float64", "float32", "float16")

    def write(self, folder: Path, arrays: Mapping[str, Array]) -> Path:
        folder.mkdir(parents=True)
        np.savez(folder / "model.npz", **arrays)
        return folder / "model.npz"

    def read(self, path: Path) -> dict[str, Array]:
        with np.load(path) as theirs:
            return dict(theirs)


def open_fortran(folder: Path) -> BaseModel:
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(3, 2))
    np.savez(folder / "model.npz", **{"a.weight": array, "b.weight": np.ones((3, 2), np.float32)})
    return open_base(folder / "model.npz")


def test_fortran_order_is_an_obstacle_that_says_how_to_mend_it(tmp_path: Path) -> None:
    sites = {site.id: site for site in open_fortran(tmp_path).sites}
    assert sites["a.weight"].weight is None
    obstacle = sites["a.weight"].obstacle
    assert obstacle is not None
    assert obstacle.code == "LF150"
    assert "ascontiguousarray" in obstacle.advice
    assert sites["b.weight"].weight is not None


def test_fortran_order_is_computed_when_rewritten(tmp_path: Path) -> None:
    """It has no bytes to copy; the engine reads and writes it."""
    base = open_fortran(tmp_path)
    assert base.rewriter is not None
    tensors = base.rewriter.output_tensors()
    assert [(tensor.name, tensor.is_copied) for tensor in tensors] == [("a.weight", False), ("b.weight", True)]
    (image,) = base.rewriter.describe_rewritten(tmp_path / "out.safetensors", 10, tensors, {}, {})
    assert image.locate_fresh("a.weight") is not None
    assert image.locate_fresh("b.weight") is None
