"""A small base in every form that merges know, adapters for it, and what is read of a model without our code."""

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from builders import Factors, write_peft
from folders import write_model_folder
from graphs import Array, dyadic, dyadic_factors, linear_net, product, read_state, write_model, write_state
from torch_zips import read_checked, write_torch

MODULES: Final = ("layers.0.fc", "layers.1.fc", "layers.2.fc")
OUT, IN, RANK = 12, 10, 2

GRAPHS: Final = ("onnx", "one", "many")
FOLDERS: Final = ("folder", "torch folder")
STATES: Final = ("safetensors", "torch", "npz", *FOLDERS)
FORMS: Final = (*GRAPHS, *STATES)
OTHERS_FORMAT: Final = ("torch", "npz", "torch folder")
"""Those that `--to safetensors` makes something else of."""

_SUFFIXES: Final = {"safetensors": ".safetensors", "torch": ".pt", "npz": ".npz", "folder": "", "torch folder": ""}


def suffix_of(form: str, *, anew: bool = False) -> str:
    """Return the file name ending of a model."""
    suffix = _SUFFIXES.get(form, ".onnx")
    return ".safetensors" if anew and suffix else suffix


def make_weights(seed: int = 0, form: Any = np.float32) -> dict[str, Array]:
    """Return a matrix `(out, in)` for each module, multiples of 1/8."""
    rng = np.random.default_rng(seed)
    return {module: dyadic(rng, OUT, IN).astype(form) for module in MODULES}


def make_state(seed: int = 0, form: Any = np.float32) -> dict[str, Array]:
    """Return the modules' weights in a state dict, and a vector, whole numbers and an even vector beside them."""
    state = {f"{module}.weight": array for module, array in make_weights(seed, form).items()}
    rng = np.random.default_rng(seed + 1000)
    return state | {
        "norm.weight": dyadic(rng, 9).astype(form),
        "steps": np.arange(6, dtype=np.int64),
        "table.weight": dyadic(rng, 7, 5).astype(form),
    }


def write_base(folder: Path, form: str, name: str = "base", seed: int = 0, number_form: Any = np.float32) -> Path:
    """Write the base in a form; the folders have two or three shards and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{suffix_of(form)}"
    if form in GRAPHS:
        net = linear_net(make_weights(seed, number_form))
        net.weight("table", dyadic(np.random.default_rng(seed + 1000), 30, 4))
        net.result("table")
        return write_model(path, net.model(), "" if form == "onnx" else form)
    state = make_state(seed, number_form)
    if form == "safetensors":
        return write_state(path, state, {"format": "pt"})
    if form == "torch":
        return write_torch(path, state)
    if form == "npz":
        np.savez(path, **state)
        return path
    write, single = (write_state, "model.safetensors") if form == "folder" else (write_torch, "pytorch_model.bin")
    write_model_folder(path, state, single, 3, write, dtype=np.dtype(number_form).name)
    (path / "tokenizer.json").write_text('{"model": {}}\n')
    return path


def copy_base(base: Path, folder: Path) -> Path:
    """Copy a base with all that is in its folder, since names of many data files are drawn by chance."""
    return shutil.copytree(base.parent, folder) / base.name


def make_factors(seed: int = 1, modules: tuple[str, ...] = MODULES[:2]) -> dict[str, Factors]:
    """Return exact factors of rank 2."""
    rng = np.random.default_rng(seed)
    return {module: dyadic_factors(rng, OUT, IN, RANK) for module in modules}


def write_adapter(folder: Path, seed: int = 1, modules: tuple[str, ...] = MODULES[:2]) -> Path:
    """Write a PEFT adapter whose scale is 1."""
    return write_peft(folder, make_factors(seed, modules), alpha=RANK)


def merged_weight(module: str, *adapters: tuple[int, float], seed: int = 0) -> Array:
    """Return a float32 weight `(out, in)` with adapters of these seeds and weights merged into it."""
    total = make_weights(seed)[module].astype(np.float64)
    for adapter_seed, weight in adapters:
        total = total + product(make_factors(adapter_seed)[module], weight)
    return total.astype(np.float32)


def read_model(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return form, shape and bytes of each tensor of a model; archives with their checksums right, folders whole."""
    if path.is_dir():
        shards = [shard for shard in sorted(path.iterdir()) if shard.suffix in {".safetensors", ".bin"}]
        index = json.loads(next(path.glob("*.index.json")).read_text())
        assert set(index["weight_map"].values()) == {shard.name for shard in shards}
        return {name: tensor for shard in shards for name, tensor in read_model(shard).items()}
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in _read_arrays(path).items()}


def _read_arrays(path: Path) -> Mapping[str, Array]:
    if path.suffix == ".safetensors":
        return read_state(path)
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        return dict(np.load(path))
    if path.suffix == ".onnx":
        model = onnx.load(str(path))
        return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return read_checked(path)


def files_below(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by relative name; of links too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    """Return what runs of ours leave when they are killed."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if ".loraformat-" in path.name]
