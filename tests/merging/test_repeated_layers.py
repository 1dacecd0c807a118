"""Layers of a base that an adapter repeats: each in the output for itself, or a reason why not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from builders import write_peft
from folders import read_index, write_model_folder
from graphs import Array, write_state
from loraformat.adapter import BaseBinding

RUNS = [[0, 2], [1, 3]]
SOURCES = [0, 1, 1, 2]
OUT, IN, RANK = 6, 5, 2


def make_state(layers: int = 3) -> dict[str, Array]:
    dice = np.random.default_rng(4)
    state = {"model.embed_tokens.weight": dice.normal(size=(7, IN)).astype(np.float32)}
    for layer in range(layers):
        state[f"model.layers.{layer}.q_proj.weight"] = dice.normal(size=(OUT, IN)).astype(np.float32)
        state[f"model.layers.{layer}.norm.weight"] = np.ones(IN, np.float32)
    return state


def write_base(folder: Path, state: dict[str, Array], shards: int = 2, **config: Any) -> Path:
    fields = {"num_hidden_layers": 3} | config
    return write_model_folder(folder, state, "model.safetensors", shards, write_state, **fields)


def write_adapter(folder: Path, layers: tuple[int, ...] = (1, 2, 3), **fields: Any) -> Path:
    dice = np.random.default_rng(5)
    factors = {
        f"model.layers.{layer}.q_proj": (
            dice.normal(size=(RANK, IN)).astype(np.float32),
            dice.normal(size=(OUT, RANK)).astype(np.float32),
        )
        for layer in layers
    }
    return write_peft(folder, factors, alpha=RANK, **({"layer_replication": RUNS} | fields))


def read_state(folder: Path) -> dict[str, Array]:
    from safetensors.numpy import load_file

    return {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in load_file(path).items()}


def codes(base: Path, adapters: list[Path], output: Path, **options: Any) -> tuple[str, ...]:
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, adapters, output, **options)
    assert not output.exists()
    return tuple(dict.fromkeys(caught.value.codes))


@pytest.mark.parametrize("shards", [0, 2])
def test_each_layer_stands_for_itself(tmp_path: Path, shards: int) -> None:
    state = make_state()
    base, adapter = (
        write_base(tmp_path / "base", state, shards, layer_types=["a", "b", "c"]),
        write_adapter(tmp_path / "a"),
    )
    loraformat.merge(base, adapter, tmp_path / "out")
    expected = {"model.embed_tokens.weight": state["model.embed_tokens.weight"]}
    for place, source in enumerate(SOURCES):
        expected[f"model.layers.{place}.norm.weight"] = state[f"model.layers.{source}.norm.weight"]
        expected[f"model.layers.{place}.q_proj.weight"] = state[f"model.layers.{source}.q_proj.weight"]
    for target in loraformat.load(adapter).targets:
        down, up = (target.factors[f"lora_{side}.weight"].read() for side in "AB")
        name = f"{target.name}.weight"
        expected[name] = expected[name] + up @ down
    found = read_state(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-6, err_msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["layer_types"]) == (4, ["a", "b", "b", "c"])
    assert not loraformat.verify(tmp_path / "out", base, adapter).problems
    if shards:
        places = read_index(tmp_path / "out")["weight_map"]
        assert places.keys() == expected.keys()
        assert places["model.layers.3.q_proj.weight"] == read_index(base)["weight_map"]["model.layers.2.q_proj.weight"]


def test_verification_sees_a_layer_that_was_changed_since(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base", make_state(), 0), write_adapter(tmp_path / "a")
    loraformat.merge(base, adapter, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    place = json.loads(data[8:begin])["model.layers.2.norm.weight"]["data_offsets"][0]
    data[begin + place] ^= 1
    path.write_bytes(data)
    assert [each.code for each in loraformat.verify(tmp_path / "out", base, adapter).problems] == ["LF801"]


def test_another_number_form_too(tmp_path: Path) -> None:
    base, adapter = write_base(tmp_path / "base", make_state()), write_adapter(tmp_path / "a")
    loraformat.merge(base, adapter, tmp_path / "out", dtype="float16")
    found = read_state(tmp_path / "out")
    assert len(found) == 9
    assert {array.dtype.name for array in found.values()} == {"float16"}
    assert not loraformat.verify(tmp_path / "out", base, adapter).problems


def test_a_base_whose_layers_are_repeated_already_is_merged_as_it_is(tmp_path: Path) -> None:
    state = make_state()
    repeated = {name: array for name, array in state.items() if "layers" not in name}
    for place, source in enumerate(SOURCES):
        for role in ("q_proj", "norm"):
            repeated[f"model.layers.{place}.{role}.weight"] = state[f"model.layers.{source}.{role}.weight"]
    adapter, whole = write_adapter(tmp_path / "a"), write_base(tmp_path / "whole", repeated, num_hidden_layers=4)
    loraformat.merge(write_base(tmp_path / "base", state), adapter, tmp_path / "one")
    receipt = loraformat.merge(whole, adapter, tmp_path / "two")
    assert not receipt.problems
    one, two = read_state(tmp_path / "one"), read_state(tmp_path / "two")
    assert all((one[name] == array).all() for name, array in two.items())
    repeated["model.layers.2.q_proj.weight"] = repeated["model.layers.2.q_proj.weight"] + 1
    other = write_base(tmp_path / "other", repeated, num_hidden_layers=4)
    assert codes(other, [adapter], tmp_path / "three") == ("LF246",)


def test_what_cannot_be_repeated_is_refused(tmp_path: Path) -> None:
    state, adapter, plain = (
        make_state(),
        write_adapter(tmp_path / "a"),
        write_adapter(tmp_path / "b", (1,), layer_replication=None),
    )
    base, out = write_base(tmp_path / "base", state), tmp_path / "out"
    assert codes(base, [adapter, plain], out) == ("LF245",)
    assert codes(base, [write_adapter(tmp_path / "c", layer_replication=[[0, 4]])], out) == ("LF245",)
    two = state | {"layers.0.q_proj.weight": state["model.layers.0.q_proj.weight"]}
    assert codes(write_base(tmp_path / "two", two), [adapter], out) == ("LF245",)
    for number, fields in enumerate(
        ({"first_k_dense_replace": 2}, {"num_hidden_layers": 2}, {"mlp_only_layers": [0, 2]})
    ):
        assert codes(write_base(tmp_path / f"odd {number}", state, **fields), [adapter], out) == ("LF245",)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge_state_dict(state, adapter)
    assert caught.value.codes == ("LF245",)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge_into(base, adapter)
    assert not set(caught.value.codes) - {"LF620", "LF621", "LF623"}


def test_layers_that_stand_as_they_are_ask_for_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", make_state())
    receipt = loraformat.merge(base, write_adapter(tmp_path / "a", (1,), layer_replication=[[0, 3]]), tmp_path / "out")
    assert not receipt.problems


@pytest.mark.parametrize("runs", [[[0, 10**9]], [[2, 1]], [[0, 1, 2]], [[-1, 2]], "0-2", [[0, 1.5]]])
def test_runs_that_are_none(tmp_path: Path, runs: Any) -> None:
    adapter = write_adapter(tmp_path / "a", layer_replication=runs)
    assert codes(write_base(tmp_path / "base", make_state()), [adapter], tmp_path / "out") == ("LF213",)


def test_an_adapter_says_its_layers(tmp_path: Path) -> None:
    adapter = loraformat.load(write_adapter(tmp_path / "a"))
    assert adapter.base == BaseBinding("a/base", None, ((0, 2), (1, 3)))
