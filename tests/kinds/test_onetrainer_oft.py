"""OneTrainer's OFT against its layers' own arithmetic: what is turned before a linear layer, and kernels."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import loraformat
from kind_examples import draw_factors, make_target, mapped
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import SlotKind, Target
from loraformat.kinds.onetrainer_oft import KIND
from loraformat.loading import load_adapter

ROLE = "oft_R.weight"


def turn(entries: NDArray[Any], size: int, scaled: bool) -> NDArray[np.float64]:
    """Return R of one block, term by term."""
    skew = np.zeros((size, size))
    skew[np.triu_indices(size, 1)] = entries.astype(np.float64) / (2 * math.sqrt(size - 1) if scaled else 1)
    skew = skew - skew.T
    square = skew @ skew
    return np.asarray(np.eye(size) + 2 * skew + 2 * square + 2 * square @ skew + square @ square)


def spread(entries: NDArray[Any], size: int, columns: int, scaled: bool) -> NDArray[np.float64]:
    """Return D; one row of entries is for every block."""
    whole = np.zeros((columns, columns))
    for place in range(columns // size):
        lines = slice(place * size, (place + 1) * size)
        whole[lines, lines] = turn(entries[place if len(entries) > 1 else 0], size, scaled)
    return whole


@st.composite
def oft_examples(draw: st.DrawFn) -> MapExample:
    size, blocks, shared, scaled = (draw(each) for each in (st.integers(2, 4), st.integers(1, 3), *2 * [st.booleans()]))
    columns, is_kernel = size * blocks, draw(st.booleans())
    rows = draw(st.integers(1, 9).filter(lambda n: n != columns))
    arrays = draw_factors(draw, {ROLE: (1 if shared else blocks, size * (size - 1) // 2)})
    slot = SlotKind.CONV if is_kernel else SlotKind.LINEAR
    target = make_target("onetrainer_oft", slot, arrays, options={"scaled": scaled})

    def formula(arrays: Any, base: Any) -> Any:
        whole = spread(arrays[ROLE], size, columns, scaled)
        return base @ (whole if is_kernel else whole.T)

    return mapped(draw, target, (rows, columns, 1, 1) if is_kernel else (rows, columns), formula)


class TestOneTrainerOft(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return oft_examples()

    def needs(self, target: Target) -> list[str]:
        return list(target.factors)


DICE = np.random.default_rng(5)
H, W = 12, 8
"""Inputs of a block of 4, and outputs."""
ENTRIES = (0.1 * DICE.standard_normal((3, 6))).astype(np.float32)


def test_a_layer_turns_what_it_is_given(tmp_path: Path) -> None:
    """x turned, then the layer: the same as the merged layer; in a file that ComfyUI's names are in."""
    module = "double_blocks.0.img_attn.proj"
    base = {f"{module}.weight": DICE.standard_normal((W, H)).astype(np.float32)}
    save_file(base, tmp_path / "base.safetensors")
    tensors = {
        f"diffusion_model.{module}.{ROLE}": ENTRIES,
        f"diffusion_model.{module}.oft_R.scaled_oft": np.array(True),
    }
    save_file(tensors, tmp_path / "oft.safetensors")
    loraformat.merge(tmp_path / "base.safetensors", tmp_path / "oft.safetensors", tmp_path / "out.safetensors")
    x = DICE.standard_normal((5, H))
    turned = np.concatenate([x[:, 4 * n : 4 * n + 4] @ turn(ENTRIES[n], 4, True) for n in range(3)], axis=1)
    merged = load_file(tmp_path / "out.safetensors")[f"{module}.weight"].astype(np.float64)
    np.testing.assert_allclose(x @ merged.T, turned @ base[f"{module}.weight"].T.astype(np.float64), atol=1e-5)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
def test_a_kernel_is_turned_as_a_whole(tmp_path: Path, kernel: tuple[int, int]) -> None:
    inner = H // math.prod(kernel)
    weight = DICE.standard_normal((W, inner, *kernel)).astype(np.float32)
    name = "down_blocks.0.resnets.0.conv1"
    save_file({f"{name}.weight": weight}, tmp_path / "base.safetensors")
    save_file({f"lora_unet_{name.replace('.', '_')}.{ROLE}": ENTRIES}, tmp_path / "oft.safetensors")
    loraformat.merge(tmp_path / "base.safetensors", tmp_path / "oft.safetensors", tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")[f"{name}.weight"]
    expected = weight.reshape(W, H).astype(np.float64) @ spread(ENTRIES, 4, H, False)
    np.testing.assert_allclose(merged.reshape(W, H), expected, atol=1e-6)


@pytest.mark.parametrize("form", [np.bool_, np.float16])
def test_a_file_is_written_back_as_it_was(tmp_path: Path, form: Any) -> None:
    tensors = {
        f"lora_unet_double_blocks_0_img_attn_qkv.{ROLE}": ENTRIES,
        "lora_unet_double_blocks_0_img_attn_qkv.oft_R.scaled_oft": np.array(1, form),
    }
    save_file(tensors, tmp_path / "oft.safetensors")
    loraformat.convert(tmp_path / "oft.safetensors", "native", tmp_path / "native.safetensors")
    loraformat.convert(tmp_path / "native.safetensors", "kohya", tmp_path / "again.safetensors")
    found = load_file(tmp_path / "again.safetensors")
    assert set(found) == set(tensors)
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        np.testing.assert_array_equal(found[key], tensor)


def test_parts_of_a_fused_weight_are_turned_alike(tmp_path: Path) -> None:
    """The base has q, k and v apart, and gets the same turn in each."""
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    base = {f"{name}.weight": DICE.standard_normal((W, H)).astype(np.float32) for name in names}
    base["single_transformer_blocks.0.proj_out.weight"] = DICE.standard_normal((W, H)).astype(np.float32)
    save_file(base, tmp_path / "base.safetensors")
    modules = ("double_blocks_0_img_attn_qkv", "single_blocks_0_linear2")
    tensors = {f"lora_unet_{module}.{ROLE}": ENTRIES for module in modules}
    save_file(tensors, tmp_path / "oft.safetensors")
    assert len(load_adapter(tmp_path / "oft.safetensors").targets) == len(tensors)
    loraformat.merge(tmp_path / "base.safetensors", tmp_path / "oft.safetensors", tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    whole = spread(ENTRIES, 4, H, False)
    for name, weight in base.items():
        np.testing.assert_allclose(merged[name], weight.astype(np.float64) @ whole.T, atol=1e-6)
