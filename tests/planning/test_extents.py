"""What a change follows from beside its own weight: sizes of all that are merged, and the base's values of another."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loraformat
from builders import MemoryFactor, write_tensors
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target
from loraformat.kinds._torch_random import draw_uniform
from loraformat.strict_json import write_canonical

TORCH = [
    *(-0.5264374017715454, -0.02017030119895935, 0.728492259979248, -0.49739786982536316, 0.12591513991355896),
    *(0.2903987467288971, 0.1827867478132248, -0.817436933517456, 0.15866979956626892),
]
BASES = {"a.weight": (6, 4), "b.weight": (3, 9)}


def make_folder(root: Path, **fields: Any) -> Path:
    dice, arrays = np.random.default_rng(0), {}
    for name, (out, _) in BASES.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        arrays[f"{module}.vera_lambda_b"] = dice.standard_normal(out).astype(np.float32)
        arrays[f"{module}.vera_lambda_d"] = dice.standard_normal(2).astype(np.float32)
    config = {"peft_type": "VERA", "r": 2, "projection_prng_key": 11, "save_projection": False, **fields}
    root.mkdir()
    write_tensors(root / "adapter_model.safetensors", arrays)
    (root / "adapter_config.json").write_bytes(write_canonical(config))
    return root


def make_base(path: Path, *names: str) -> Path:
    dice = np.random.default_rng(1)
    return write_tensors(path, {name: dice.standard_normal(BASES[name]).astype(np.float32) for name in names})


def test_torchs_own_numbers() -> None:
    """Drawn with torch 2.13.0: `uniform_(-0.75, 0.75)` of six, then `uniform_(-1.1, 1.1)` of three, seed 11."""
    first, second = draw_uniform(11, [(6, 0.75), (3, 1.1)])
    assert first.tolist() == TORCH[:6]
    assert second.tolist() == TORCH[6:]


def test_each_takes_its_part_of_the_largest(tmp_path: Path) -> None:
    folder, base = make_folder(tmp_path / "vera"), make_base(tmp_path / "base.safetensors", *BASES)
    down, up = draw_uniform(11, [(2 * 9, np.sqrt(3) * (np.sqrt(2) / np.sqrt(9))), (6 * 2, np.sqrt(3) * 1.0)])
    own = loraformat.save(loraformat.load(folder), tmp_path / "own.safetensors")
    before = load_file(base)
    for adapter in (folder, own):
        loraformat.merge(base, [adapter], tmp_path / "merged.safetensors", force=True)
        merged = load_file(tmp_path / "merged.safetensors")
        for target in loraformat.load(folder).targets:
            rows, columns = BASES[f"{target.name}.weight"]
            left = target.factors["vera_lambda_b"].read()[:, None] * up.reshape(6, 2)[:rows]
            right = target.factors["vera_lambda_d"].read()[:, None] * down.reshape(2, 9)[:, :columns]
            expected = before[f"{target.name}.weight"] + left.astype(np.float64) @ right
            np.testing.assert_allclose(merged[f"{target.name}.weight"], expected, rtol=1e-5, atol=1e-6)


def test_without_all_of_them_there_is_no_size(tmp_path: Path) -> None:
    folder, base = make_folder(tmp_path / "vera"), make_base(tmp_path / "base.safetensors", "a.weight")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [folder], tmp_path / "merged.safetensors", allow_unmatched=["b"])
    assert caught.value.codes == ("LF234",)
    assert "1 of the 2 targets" in str(caught.value)


def test_factors_that_should_have_been_saved(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "vera", save_projection=True)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(make_base(tmp_path / "base.safetensors", *BASES), [folder], tmp_path / "merged.safetensors")
    assert set(caught.value.codes) == {"LF230"}


def make_glora(slot: SlotKind) -> Adapter:
    """Return a target whose bias follows from the weight as well: b + W·C."""
    shapes = {"glora_A.X": (1,), "glora_B.X": (1,), "glora_C.X": (4, 1)}
    dice = np.random.default_rng(5)
    factors = {role: MemoryFactor(role, dice.standard_normal(shape)) for role, shape in shapes.items()}
    return Adapter((Target("m", "glora", slot, factors, 0, Scaling(ScalingRule.MULTIPLIER, 1.0)),))


@pytest.mark.parametrize("slot", [SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED])
def test_a_bias_follows_from_the_weight_of_the_base(tmp_path: Path, slot: SlotKind) -> None:
    """The base's, not the merged one, however it is stored."""
    dice, adapter = np.random.default_rng(6), make_glora(slot)
    weight, bias = dice.standard_normal((6, 4)), dice.standard_normal(6)
    stored = weight.T if slot is SlotKind.LINEAR_TRANSPOSED else weight
    base = write_tensors(tmp_path / "base.safetensors", {"m.weight": stored, "m.bias": bias})
    loraformat.merge(base, [(adapter, 0.5)], tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    column = adapter.targets[0].factors["glora_C.X"].read()
    np.testing.assert_allclose(merged["m.bias"], bias + 0.5 * (weight @ column)[:, 0], rtol=1e-12)
    assert np.abs(merged["m.weight"] - stored).max() > 0.1


def test_not_in_place_where_it_would_be_overwritten_by_then(tmp_path: Path) -> None:
    base = write_tensors(tmp_path / "base.safetensors", {"m.weight": np.ones((6, 4)), "m.bias": np.ones(6)})
    before = base.read_bytes()
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge_into(base, [make_glora(SlotKind.LINEAR)])
    assert caught.value.codes == ("LF237",)
    assert base.read_bytes() == before


def test_not_where_the_weight_is_missing(tmp_path: Path) -> None:
    base = write_tensors(tmp_path / "base.safetensors", {"m.bias": np.ones(6)})
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [make_glora(SlotKind.LINEAR)], tmp_path / "merged.safetensors")
    assert set(caught.value.codes) == {"LF401", "LF418"}
