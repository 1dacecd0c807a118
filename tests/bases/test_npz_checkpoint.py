"""A numpy archive as a base, written and read by numpy, which checks every checksum."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loraformat
from graphs import Array, dyadic_factors, make_adapter, make_target
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


def test_views_are_counted_when_a_base_is_inspected(tmp_path: Path) -> None:
    open_fortran(tmp_path)
    told = loraformat.inspect(tmp_path / "model.npz").as_json()
    assert (told["tensors"], told["parameters"], told["bytes"]) == (2, 12, 48)
    assert [site["obstacle"] is None for site in told["sites"]] == [False, True]


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_fortran_order_is_put_in_c_order_when_it_is_written_anew(tmp_path: Path, dtype: str | None) -> None:
    """Numbers and integers alike; only the former have another form when that is asked for."""
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(3, 2))
    counts = np.asfortranarray(np.arange(12).reshape(3, 2, 2))
    np.savez(tmp_path / "m.npz", **{"a.weight": array, "counts": counts, "b.weight": np.ones((3, 2), np.float32)})
    adapter = make_adapter(make_target("b", dyadic_factors(np.random.default_rng(1), 3, 2, 1)))
    loraformat.merge(tmp_path / "m.npz", [adapter], tmp_path / "o.safetensors", to="safetensors", dtype=dtype)
    found = load_file(tmp_path / "o.safetensors")
    assert found["a.weight"].dtype == np.dtype(dtype or "float32")
    np.testing.assert_array_equal(found["a.weight"], array)
    np.testing.assert_array_equal(found["counts"], counts)
