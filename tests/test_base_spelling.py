"""An adapter of a diffusion model under the original repository's names, and a base under diffusers', or both."""

from pathlib import Path

import numpy as np
import pytest

import loraformat
from builders import write_tensors
from loraformat.base_spelling import spell_for_base
from loraformat.loading import load_adapter, open_base
from loraformat.schemes import StatedScale

ORIGINAL, DIFFUSERS = "double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0"
RNG = np.random.default_rng(4)
WEIGHT, DOWN, UP = (RNG.standard_normal(shape).astype(np.float32) for shape in ((6, 4), (2, 4), (6, 2)))


def write_base(folder: Path, *modules: str) -> Path:
    return write_tensors(folder / "base.safetensors", {f"{module}.weight": WEIGHT for module in modules})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    factors = {f"diffusion_model.{ORIGINAL}.lora_{name}.weight": array for name, array in (("A", DOWN), ("B", UP))}
    return write_tensors(tmp_path / "style.safetensors", factors)


def test_it_takes_the_names_of_the_base_and_says_so(adapter: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path, DIFFUSERS)
    receipt = loraformat.merge(base, adapter, tmp_path / "merged.safetensors", scale=0.5)
    assert [record.targets for record in receipt.weights] == [(f"transformer.{DIFFUSERS}",)]
    assert [problem.severity for problem in receipt.problems if problem.code == "LF325"] == ["note"]
    merged = open_base(tmp_path / "merged.safetensors").list_tensors()[0].read()
    np.testing.assert_allclose(merged, WEIGHT + 0.5 * UP.astype(np.float64) @ DOWN, rtol=1e-6)


@pytest.mark.parametrize("modules", [(ORIGINAL,), (ORIGINAL, DIFFUSERS), ("blocks.0.other",)], ids=str)
def test_it_stays_as_it_is_where_the_base_has_its_names_or_none(
    adapter: Path, tmp_path: Path, modules: tuple[str, ...]
) -> None:
    read = load_adapter(adapter, stated=StatedScale(multiplier=1.0))
    assert spell_for_base(read, open_base(write_base(tmp_path, *modules))) is read


@pytest.mark.parametrize(
    "modules",
    [
        pytest.param(("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_out.0"), id="the same names"),
        pytest.param(("blocks.0.self_attn.q_proj", "blocks.0.self_attn.output_proj"), id="Cosmos-Predict2"),
        pytest.param(("blocks.0.attn.qkv_x", "blocks.0.attn.proj_x"), id="Mochi"),
        pytest.param(
            tuple(f"model.diffusion_model.transformer_blocks.0.attn1.to_{name}" for name in ("q", "out.0")),
            id="LTX-Video, a whole pipeline",
        ),
    ],
)
def test_the_base_tells_names_that_several_models_have(tmp_path: Path, modules: tuple[str, ...]) -> None:
    """A conversion asks for the model (LF316); a merge has it."""
    names = ("to_q", "to_out.0")
    factors = {
        f"transformer.transformer_blocks.0.attn1.{name}.lora_{role}.weight": array
        for name in names
        for role, array in (("A", DOWN), ("B", UP))
    }
    adapter = write_tensors(tmp_path / "attention.safetensors", factors)
    rows = {modules[0]: 3 * len(WEIGHT) if "qkv" in modules[0] else len(WEIGHT), modules[1]: len(WEIGHT)}
    weights = {f"{module}.weight": np.zeros((count, WEIGHT.shape[1]), np.float32) for module, count in rows.items()}
    base = write_tensors(tmp_path / "base.safetensors", weights)
    loraformat.merge(base, adapter, tmp_path / "merged.safetensors", scale=1.0)
    merged = {each.name: each.read() for each in open_base(tmp_path / "merged.safetensors").list_tensors()}
    for module, count in rows.items():
        expected = np.zeros((count, WEIGHT.shape[1]))
        expected[: len(WEIGHT)] = UP.astype(np.float64) @ DOWN
        np.testing.assert_allclose(merged[f"{module}.weight"], expected, rtol=1e-6)
