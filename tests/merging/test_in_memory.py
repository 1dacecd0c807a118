"""State dicts of numpy in memory: the numbers are those of a merge of the same state dict in a file."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import loraformat
from builders import write_peft
from graphs import Array, dyadic_factors, read_state, same_bits, write_state
from loraformat.arrays import ArrayFile, hold_array
from models import IN, MODULES, OUT, RANK, make_factors, make_state, merged_weight, write_adapter


@pytest.mark.parametrize("form", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, ml_dtypes.float8_e5m2])
def test_as_a_file_gives(tmp_path: Path, form: Any) -> None:
    state = make_state(form=form)
    before = {name: array.copy() for name, array in state.items()}
    adapter = write_adapter(tmp_path / "adapter")
    found = loraformat.merge_state_dict(state, [(adapter, 0.5)], min_retained=0.0)
    base = write_state(tmp_path / "base.safetensors", state)
    loraformat.merge(base, [(adapter, 0.5)], tmp_path / "merged.safetensors", min_retained=0.0)
    written = read_state(tmp_path / "merged.safetensors")
    assert list(found.tensors) == list(state)
    assert all(same_bits(found.tensors[name], array) for name, array in written.items())
    touched = {f"{module}.weight" for module in MODULES[:2]}
    assert {name for name, array in state.items() if found.tensors[name] is not array} == touched
    assert all(same_bits(state[name], array) for name, array in before.items())
    assert {weight.name for weight in found.receipt.weights} == touched


def test_exact_numbers(tmp_path: Path) -> None:
    found = loraformat.merge_state_dict(make_state(), write_adapter(tmp_path / "adapter"))
    np.testing.assert_array_equal(found.tensors[f"{MODULES[0]}.weight"], merged_weight(MODULES[0], (1, 1.0)))


def test_adapter_in_memory_with_its_configuration(tmp_path: Path) -> None:
    arrays = {
        f"base_model.model.{module}.{role}.weight": array
        for module, pair in make_factors().items()
        for role, array in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    folder = write_adapter(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": {"fc"}}  # PEFT has a set.
    adapter, stored = loraformat.load(arrays, config=config), loraformat.load(folder)
    one, other = (loraformat.merge_state_dict(make_state(), each).tensors for each in (adapter, stored))
    assert all(same_bits(array, other[name]) for name, array in one.items())
    assert loraformat.save(adapter, tmp_path / "saved.safetensors").stat().st_size


def test_tied_arrays_stay_tied_and_are_refused_apart(tmp_path: Path) -> None:
    state = make_state()
    state["head.weight"] = state[f"{MODULES[0]}.weight"][:]  # Another view of the same memory.
    adapter = write_adapter(tmp_path / "adapter", modules=MODULES[:1])
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge_state_dict(state, adapter)
    assert caught.value.codes == ("LF402",)
    both = {module: dyadic_factors(np.random.default_rng(2), OUT, IN, RANK) for module in (MODULES[0],)}
    write_peft(tmp_path / "both", both | {"head": both[MODULES[0]]})
    found = loraformat.merge_state_dict(state, tmp_path / "both").tensors
    assert found["head.weight"] is found[f"{MODULES[0]}.weight"]
    assert not same_bits(found["head.weight"], state["head.weight"])


def test_views_that_are_not_in_order(tmp_path: Path) -> None:
    state = make_state()
    name = f"{MODULES[0]}.weight"
    adapter = write_adapter(tmp_path / "adapter", modules=MODULES[:1])
    for view in (np.asfortranarray(state[name]), np.repeat(state[name], 2, axis=1)[:, ::2]):
        with pytest.raises(loraformat.LoraformatError) as caught:
            loraformat.merge_state_dict(state | {name: view}, adapter)
        assert caught.value.codes == ("LF150",)
    backwards = np.ascontiguousarray(state[name][::-1, ::-1])[::-1, ::-1]
    found = loraformat.merge_state_dict(state | {name: backwards}, adapter).tensors[name]
    np.testing.assert_array_equal(found, merged_weight(MODULES[0], (1, 1.0)))
    untouched = state | {"norm.view": np.asfortranarray(state["table.weight"])}
    assert loraformat.merge_state_dict(untouched, adapter).tensors["norm.view"] is untouched["norm.view"]


def test_new_biases_and_values_that_are_no_tensors(tmp_path: Path) -> None:
    factors = make_factors(modules=MODULES[:1])
    folder = write_peft(tmp_path / "adapter", factors, bias="lora_only")
    arrays = read_state(folder / "adapter_model.safetensors")
    bias = np.arange(OUT, dtype=np.float32) / 8
    write_state(folder / "adapter_model.safetensors", arrays | {f"base_model.model.{MODULES[0]}.bias": bias})
    state: dict[str, Any] = {**make_state(form=np.float16), "step": 7, "names": ["a"]}
    found = loraformat.merge_state_dict(state, folder, new_biases=True).tensors
    assert list(found) == [*state, f"{MODULES[0]}.bias"]
    assert found["names"] is state["names"]
    np.testing.assert_array_equal(found[f"{MODULES[0]}.bias"], bias)


def test_configuration_of_the_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    state: dict[str, Array] = {"h.0.attn.c_attn.weight": rng.standard_normal((6, 18)).astype(np.float32)}
    down, up = dyadic_factors(rng, 18, 6, 2)
    folder = write_peft(tmp_path / "adapter", {"h.0.attn.c_attn": (down, up)}, alpha=2, fan_in_fan_out=False)
    with pytest.raises(loraformat.LoraformatError):
        loraformat.merge_state_dict(state, folder)
    found = loraformat.merge_state_dict(state, folder, config={"model_type": "gpt2"}).tensors
    expected = state["h.0.attn.c_attn.weight"] + (up.astype(np.float64) @ down).T
    np.testing.assert_allclose(found["h.0.attn.c_attn.weight"], expected, rtol=1e-6)


def test_no_configuration_is_read_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    (tmp_path / "config.json").write_text("{ not JSON")
    monkeypatch.chdir(tmp_path)
    assert loraformat.merge_state_dict(make_state(), adapter).receipt.weights


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "none a tensor"),
        ({"step": 3}, "'step'"),
        ({"state_dict": make_state(), "epoch": 3}, "under 'state_dict'"),
    ],
)
def test_no_state_dict(tmp_path: Path, state: dict[str, Any], said: str) -> None:
    with pytest.raises(loraformat.InputError, match="LF831") as caught:
        loraformat.merge_state_dict(state, write_adapter(tmp_path / "adapter"))
    assert said in str(caught.value)


@pytest.mark.parametrize("array", [np.ones((2, 3), ">f4"), np.array([["a"]]), np.ones((2, 3), ml_dtypes.int4)])
def test_number_forms_that_cannot_be_had(tmp_path: Path, array: Array) -> None:
    with pytest.raises(loraformat.InputError, match="LF106"):
        loraformat.merge_state_dict(make_state() | {"x.weight": array}, write_adapter(tmp_path / "adapter"))


def test_configuration_of_another_type(tmp_path: Path) -> None:
    with pytest.raises(loraformat.InputError, match="LF832"):
        loraformat.load({"x.lora_A.weight": np.ones((1, 2))}, config="adapter_config.json")
    with pytest.raises(loraformat.InputError, match="LF832"):
        loraformat.load(write_adapter(tmp_path / "adapter"), config={"r": 1})


def test_reading_by_address() -> None:
    whole = np.arange(40, dtype=np.int16)
    held = [hold_array("whole", whole), hold_array("inner", whole[10:12])]  # The inner one begins later, ends sooner.
    file = ArrayFile(Path("state dict"), held)
    assert np.frombuffer(file.read(held[1].address, 20), np.int16).tolist() == list(range(10, 20))
