"""Alphas and factors in every form of numbers that files have: what they mean, and that they come back as they were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import loraformat
from builders import write_tensors
from loraformat.base_facts import NO_FACTS
from loraformat.loading import load_adapter, open_base
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes.dotted import SCHEME as DOTTED
from loraformat.schemes.kohya import SCHEME as KOHYA
from schemes import modules as m

RANK, SHAPE = 4, (6, 5)
FLOAT8 = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
FORMS = (np.float16, m.BFLOAT16, *FLOAT8, np.float32, np.float64, np.int64)
SCHEMES: dict[str, tuple[Any, str]] = {
    "kohya": (KOHYA, "lora_unet_double_blocks_0_txt_attn_proj"),
    "dotted": (DOTTED, "diffusion_model.double_blocks.0.txt_attn.proj"),
}


def factors() -> dict[str, np.ndarray]:
    """Return A and B of whole numbers and quarters, which every form of floats holds."""
    sizes = {"lora_down.weight": (RANK, SHAPE[1]), "lora_up.weight": (SHAPE[0], RANK)}
    return {role: (np.arange(np.prod(size)) % 3 / 4 + 1).reshape(size) for role, size in sizes.items()}


def bundle_of(module: str, dtype: Any, **more: np.ndarray) -> Bundle:
    arrays = {role: array.astype(dtype) for role, array in factors().items()} | more
    return Bundle(Path("a.safetensors"), m.tensors({f"{module}.{role}": array for role, array in arrays.items()}))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1 element"])
@pytest.mark.parametrize("dtype", FORMS, ids=lambda dtype: np.dtype(dtype).name)
def test_an_alpha_is_a_number_in_any_form(name: str, shape: tuple[int, ...], dtype: Callable[..., Any]) -> None:
    scheme, module = SCHEMES[name]
    bundle = bundle_of(module, np.float32, alpha=np.full(shape, 6).astype(dtype))
    adapter = scheme.read(bundle, NOT_STATED)
    assert [target.scale for target in adapter.targets] == [6 / RANK]
    written = scheme.write(adapter, NO_FACTS).tensors[f"{module}.alpha"]
    stored = bundle.tensors[f"{module}.alpha"]
    assert (written.dtype, written.shape) == (stored.dtype, shape)
    assert written.read().tobytes() == stored.read().tobytes()


@pytest.mark.parametrize("dtype", FLOAT8, ids=lambda dtype: np.dtype(dtype).name)
def test_factors_of_8_bits_are_merged_and_kept(dtype: Any, tmp_path: Path) -> None:
    module = "double_blocks.0.txt_attn.proj"
    stored = {f"diffusion_model.{module}.{role}": array.astype(dtype) for role, array in factors().items()}
    adapter = write_tensors(tmp_path / "adapter.safetensors", stored)
    base = write_tensors(tmp_path / "base.safetensors", {f"{module}.weight": np.zeros(SHAPE, np.float32)})
    loraformat.merge(base, adapter, tmp_path / "merged.safetensors", scale=0.5)
    (merged,) = open_base(tmp_path / "merged.safetensors").list_tensors()
    np.testing.assert_array_equal(merged.read(), 0.5 * factors()["lora_up.weight"] @ factors()["lora_down.weight"])
    loraformat.convert(adapter, "kohya", tmp_path / "kohya.safetensors", scale=0.5)
    (target,) = load_adapter(tmp_path / "kohya.safetensors").targets
    for role, name in (("lora_A.weight", "lora_down.weight"), ("lora_B.weight", "lora_up.weight")):
        factor = target.factors[role]
        assert factor.dtype.numpy() == np.dtype(dtype)
        np.testing.assert_array_equal(factor.read().astype(np.float64), factors()[name])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(
    ("role", "mended"),
    [
        ("scale_weight", "Multiply"),
        ("lora_up.scale_weight", "Multiply"),
        ("other_weight", "Nothing is dropped in silence"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_what_it_does(name: str, role: str, mended: str) -> None:
    scheme, module = SCHEMES[name]
    adapter = scheme.read(bundle_of(module, FLOAT8[0], **{role: np.ones(2, np.float32)}), NOT_STATED)
    (problem,) = (problem for problem in adapter.problems if problem.severity == "error")
    assert (problem.code, problem.where) == ("LF202", f"{module}.{role}")
    assert mended in problem.advice
