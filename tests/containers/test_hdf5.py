"""Our index of HDF5 files against h5py's own reading of their numbers, and files that lead elsewhere."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from laws.container_laws import ContainerLaws, read_all, same_bits
from loraformat.containers.hdf5 import CONTAINER
from loraformat.errors import LoraformatError

h5py = pytest.importorskip("h5py", reason="needs h5py, which the extra `keras` installs")


def arrays_of() -> dict[str, NDArray[Any]]:
    dice = np.random.default_rng(0)
    return {
        "lora/9/vars/lora_kernel_a": dice.standard_normal((5, 4, 2)).astype(np.float32),
        "lora/9/vars/lora_kernel_b": dice.standard_normal((2, 7)).astype(np.float16),
        "lora/vars/rank": np.array(2),
    }


class TestHdf5(ContainerLaws):
    container = CONTAINER

    def write_example(self, folder: Path) -> tuple[Path, dict[str, NDArray[Any]]]:
        path, arrays = folder / "adapter.lora.h5", arrays_of()
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
        return path, arrays


def test_bfloat16_is_what_its_attribute_says(tmp_path: Path) -> None:
    numbers = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", data=numbers.view(np.uint16)).attrs["dtype"] = "bfloat16"
        file["b"] = np.arange(3, dtype=np.uint16)
    found = read_all(CONTAINER.open(tmp_path / "a.h5"))
    assert same_bits(found["a"], numbers)
    assert found["b"].dtype == np.uint16


@pytest.mark.parametrize(
    ("write", "code"),
    [
        (lambda file: file.__setitem__("a", h5py.ExternalLink("/etc/hostname", "/a")), "LF334"),
        (lambda file: file.__setitem__("a", h5py.SoftLink("/b")), "LF334"),
        (lambda file: file.__setitem__("a", file["/"]), "LF110"),
        (lambda file: file.create_dataset("a", data=np.ones((4, 4)), compression="gzip"), "LF334"),
        (lambda file: file.create_dataset("a", (4,), "f4", external=[("/etc/hostname", 0, 16)]), "LF334"),
        (lambda file: file.create_dataset("a", (1 << 40,), "f4"), "LF114"),
        (lambda file: file.create_dataset("a", data=np.ones(2, ">f4")), "LF112"),
        (lambda file: file.create_dataset("a", data="text"), "LF106"),
        (lambda file: file.create_dataset("a", data=h5py.Empty("f4")), "LF106"),
        (lambda file: file.create_dataset("\x1b[1m", data=np.ones(2)), "LF301"),
    ],
)
def test_what_is_no_array_in_this_file(tmp_path: Path, write: Any, code: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write(file)
    with pytest.raises(LoraformatError) as caught:
        CONTAINER.open(tmp_path / "a.h5")
    assert caught.value.codes == (code,)
