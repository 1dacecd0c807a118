"""Records go to other processes and come back: workers of a loader have adapters, pools send what functions return."""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from builders import write_tensors
from loraformat.adapter import Adapter
from models import MODULES, make_factors, make_state, write_adapter, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("pickling"), "safetensors")


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    return write_adapter(base.parent / "style")


def numbers_of(adapter: Adapter) -> list[Any]:
    return [
        (target.name, target.kind, target.scale, role, factor.read().tolist())
        for target in adapter.targets
        for role, factor in target.factors.items()
    ]


def list_adapters(base: Path, folder: Path) -> dict[str, Adapter]:
    adapter = loraformat.load(folder)
    turned = {
        f"{name}.lora_{part}.weight": array
        for name, pair in make_factors().items()
        for part, array in zip("AB", pair, strict=True)
    }
    fortran = base.parent / "turned.npz"
    np.savez(fortran, **{name: np.asfortranarray(array) for name, array in turned.items()})
    file = folder / "adapter_model.safetensors"
    return {
        "file": adapter,
        "stamped": loraformat.stamp(adapter, base),
        "sum": adapter + 0.5 * adapter,
        "cut": loraformat.resize(adapter, 1),
        "fortran": loraformat.load(fortran, scale=1.0),
        "bytes": loraformat.load(file.read_bytes(), scale=1.0),
        "arrays": loraformat.load({name: np.array(array) for name, array in turned.items()}, scale=1.0),
        "composed": loraformat.compose([adapter, adapter], "ties", rank=1),
        "made": loraformat.init(base, 2, [MODULES[0]]).adapter,
        "extracted": loraformat.extract(base, write_base(base.parent / "other", "safetensors", seed=3), rank=2).adapter,
    }


def test_adapters_are_copied_and_pickled(base: Path, folder: Path) -> None:
    for name, adapter in list_adapters(base, folder).items():
        expected = numbers_of(adapter)
        for again in (pickle.loads(pickle.dumps(adapter)), deepcopy(adapter), copy(adapter)):
            assert numbers_of(again) == expected, name
            assert (again.metadata, again.provenance, again.problems) == (
                adapter.metadata,
                adapter.provenance,
                adapter.problems,
            )


def test_another_process_reads_what_it_is_sent(base: Path, folder: Path) -> None:
    """One that was started, not forked, as workers are on most systems."""
    code = "import pickle, sys; print(repr(pickle.load(sys.stdin.buffer).targets[0].factors['lora_A.weight'].read()))"
    data = pickle.dumps(loraformat.load(folder))
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    expected = loraformat.load(folder).targets[0].factors["lora_A.weight"].read()
    assert done.stdout.decode().strip() == repr(expected)


def test_what_functions_return_is_pickled(base: Path, folder: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged.safetensors"
    adapter = loraformat.load(folder)
    records = [
        loraformat.plan_merge(base, [adapter], merged),
        loraformat.merge(base, [adapter], merged),
        loraformat.verify(merged, base, [adapter]),
        loraformat.inspect(folder),
        loraformat.inspect(base),
        loraformat.validate(folder, base=base)[0],
        loraformat.resolve_targets(base, folder),
        loraformat.diff(folder, folder),
        loraformat.analyse([folder]),
        loraformat.plan_conversion(folder, "mlx"),
        loraformat.list_schemes()[0],
    ]
    for record in records:
        again = pickle.loads(pickle.dumps(record))
        assert again.as_json() == record.as_json()
    state = loraformat.merge_state_dict(make_state(), [adapter])
    again = pickle.loads(pickle.dumps(state))
    assert all(np.array_equal(again.tensors[name], array) for name, array in state.tensors.items())


def test_threads_share_an_adapter(base: Path, folder: Path) -> None:
    """Also one whose factors are cut from tensors that are kept between readings."""
    for name, adapter in list_adapters(base, folder).items():
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(numbers_of, [adapter] * 4))
        assert found == [numbers_of(adapter)] * 4, name


def test_thousands_of_adapters_are_open_at_once(tmp_path: Path) -> None:
    """More than a process may have descriptors (1024 on most systems)."""
    import resource

    arrays = {"m.lora_A.weight": np.ones((1, 3), np.float32), "m.lora_B.weight": np.ones((2, 1), np.float32)}
    paths = [write_tensors(tmp_path / f"{index}.safetensors", arrays) for index in range(400)]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
    try:
        adapters = [loraformat.load(path, scale=1.0) for path in paths]
        assert all(adapter.targets[0].factors["lora_A.weight"].read().sum() == 3 for adapter in adapters)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
