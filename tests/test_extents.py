"""Random factors that were not saved: as large as the largest of all weights asks for, whichever of them is merged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loraformat
from builders import write_tensors
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
