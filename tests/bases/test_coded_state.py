"""Quantised weights of a state dict: how they are recognised, refused, and taken out of an output in floats."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import loraformat
from folders import write_model_folder
from graphs import Array, dyadic_factors, product, read_state, write_peft, write_state
from loraformat.errors import LoraformatError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
OUT, INNER = 48, 64
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32]}}


def make_fp8(seed: int = 0, suffix: str = "weight_scale_inv") -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    codes = rng.standard_normal((OUT, INNER)).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": codes, suffix: rng.uniform(0.01, 0.02, (3, 2)).astype(np.float32)}


def decode(own: Mapping[str, Array]) -> Array:
    scales = np.repeat(np.repeat(own["weight_scale_inv"].astype(np.float64), 16, 0), 32, 1)
    return np.asarray(own["weight"].astype(np.float64) * scales)


def name(module: str, own: Mapping[str, Array]) -> dict[str, Array]:
    return {f"{module}.{suffix}": array for suffix, array in own.items()}


def merge(folder: Path, base: Path, *modules: str, **options: Any) -> tuple[loraformat.Receipt, Path]:
    rng = np.random.default_rng(9)
    factors = {module: dyadic_factors(rng, OUT, INNER, 2) for module in modules}
    adapter = write_peft(folder / "adapter", factors, alpha=2.0)
    output = folder / f"merged{base.suffix}"
    return loraformat.merge(base, [adapter], output, force=True, **options), output


def delta_of(module: str, *modules: str) -> Array:
    rng = np.random.default_rng(9)
    return {each: product(dyadic_factors(rng, OUT, INNER, 2)) for each in modules}[module]


def test_a_folder_in_floats_has_no_codes_and_no_word_of_them(tmp_path: Path) -> None:
    one, other = make_fp8(1), make_fp8(2)
    plain = np.ones((4, INNER), np.float16)
    arrays = {**name(Q, one), **name(V, other), "model.embed.weight": plain}
    base = write_model_folder(tmp_path / "base", arrays, "model.safetensors", 2, write_state, dtype="float16", **FP8)
    (base / "hf_quant_config.json").write_text("{}")
    receipt, output = merge(tmp_path, base, Q, on_quantized="dequantize")
    found: dict[str, Array] = {}
    for shard in sorted(output.glob("*.safetensors")):
        found |= read_state(shard)
    assert set(found) == {f"{Q}.weight", f"{V}.weight", "model.embed.weight"}
    wanted = (decode(one) + delta_of(Q, Q)).astype(np.float32).astype(np.float16)
    np.testing.assert_array_equal(found[f"{Q}.weight"], wanted)
    np.testing.assert_array_equal(found[f"{V}.weight"], decode(other).astype(np.float32).astype(np.float16))
    config = json.loads((output / "config.json").read_text())
    assert config == {"model_type": "llama", "dtype": "float16"}
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())
    assert not (output / "hf_quant_config.json").exists()
    assert loraformat.verify(output, base, [tmp_path / "adapter"]).holds
    assert 0.99 < min(weight.retained for weight in receipt.weights if weight.retained is not None) <= 1.01


def test_another_form_of_floats_can_be_asked_for(tmp_path: Path) -> None:
    base = write_model_folder(
        tmp_path / "base", name(Q, make_fp8()), "model.safetensors", 0, write_state, dtype="bfloat16", **FP8
    )
    _, output = merge(tmp_path, base, Q, on_quantized="dequantize", dtype="float32")
    found = read_state(output / "model.safetensors")[f"{Q}.weight"]
    np.testing.assert_allclose(found, decode(make_fp8()) + delta_of(Q, Q), rtol=2e-7, atol=1e-8)
    assert json.loads((output / "config.json").read_text())["dtype"] == "float32"
    with pytest.raises(LoraformatError, match="LF440"):
        merge(tmp_path, base, Q, dtype="float32")


def test_a_number_form_is_refused_beside_codes(tmp_path: Path) -> None:
    """An adapter of another module would have them read as numbers."""
    arrays = {**name(Q, make_fp8()), f"{V}.weight": np.ones((OUT, INNER), np.float32)}
    base = write_model_folder(tmp_path / "base", arrays, "model.safetensors", 0, write_state, **FP8)
    with pytest.raises(LoraformatError, match="LF472"):
        merge(tmp_path, base, V, dtype="float16")
    _, output = merge(tmp_path, base, V)
    found = read_state(output / "model.safetensors")
    for suffix, array in name(Q, make_fp8()).items():
        assert found[suffix].tobytes() == array.tobytes()


def test_comfyui_s_file_is_taken_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    codes = rng.standard_normal((OUT, INNER)).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    scale = np.array([0.125], np.float32)
    own = {"weight": codes, "scale_weight": scale, "scale_input": scale}
    arrays = {**name(Q, own), "scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn), "norm.x": np.ones(3, np.float16)}
    base = write_state(tmp_path / "flux.safetensors", arrays)
    with pytest.raises(LoraformatError, match="LF440"):
        merge(tmp_path, base, Q)
    _, output = merge(tmp_path, base, Q, on_quantized="dequantize")
    found = read_state(output)
    assert set(found) == {f"{Q}.weight", "norm.x"}
    wanted = codes.astype(np.float64) * 0.125 + delta_of(Q, Q)
    np.testing.assert_array_equal(found[f"{Q}.weight"], wanted.astype(np.float32).astype(np.float16))


def test_8_bit_floats_without_scales_are_numbers_as_they_are(tmp_path: Path) -> None:
    codes = make_fp8()["weight"]
    base = write_state(tmp_path / "base.safetensors", {f"{Q}.weight": codes})
    _, output = merge(tmp_path, base, Q, min_retained=0)
    wanted = (codes.astype(np.float64) + delta_of(Q, Q)).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    assert read_state(output)[f"{Q}.weight"].tobytes() == wanted.tobytes()


ODD: dict[str, dict[str, Array]] = {
    "scales of other blocks": {"weight": make_fp8()["weight"], "weight_scale_inv": np.ones((5, 7), np.float32)},
    "scales of whole numbers": {"weight": make_fp8()["weight"], "weight_scale": np.ones((OUT, 1), np.int32)},
    "three bits": {
        "qweight": np.ones((INNER * 3 // 32, OUT), np.int32),
        "qzeros": np.ones((2, OUT * 3 // 32), np.int32),
        "scales": np.ones((2, OUT), np.float16),
        "g_idx": np.zeros(INNER, np.int32),
    },
    "zero points of other groups": {
        "qweight": np.ones((INNER // 8, OUT), np.int32),
        "qzeros": np.ones((3, OUT // 8), np.int32),
        "scales": np.ones((2, OUT), np.float16),
    },
    "a state that is no JSON": {
        "weight": np.ones((OUT * INNER // 2, 1), np.uint8),
        "weight.absmax": np.ones(OUT, np.float32),
        "weight.quant_map": np.ones(16, np.float32),
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"{", np.uint8),
    },
    "blocks of other counts": {
        "weight": np.ones((OUT * INNER // 2, 1), np.uint8),
        "weight.absmax": np.ones(7, np.float32),
        "weight.quant_map": np.ones(16, np.float32),
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(
            json.dumps({"shape": [OUT, INNER], "blocksize": 64}).encode(), np.uint8
        ),
    },
    "a shape larger than the file": {
        "weight_packed": np.ones((OUT, INNER // 8), np.int32),
        "weight_scale": np.ones((OUT, 2), np.float32),
        "weight_shape": np.array([2**40, 2**40]),
    },
    "HQQ": {"W_q": np.ones((OUT, INNER), np.uint8), "scale": np.ones(3, np.float16), "zero": np.ones(3, np.float16)},
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("way", [None, "dequantize"])
def test_what_is_not_understood_is_refused_by_name(case: str, way: str | None, tmp_path: Path) -> None:
    arrays = name(Q, ODD[case])
    settings = {"quantization_config": {"quant_method": "hqq"}}
    base = write_model_folder(tmp_path / "base", arrays, "model.safetensors", 0, write_state, **settings)
    with pytest.raises(LoraformatError) as caught:
        merge(tmp_path, base, Q, on_quantized=way)
    assert {problem.code for problem in caught.value.problems} == {"LF470"}
    assert Q in caught.value.problems[0].where
    assert not (tmp_path / "merged").exists()


def test_packed_experts_are_turned_one_by_one(tmp_path: Path) -> None:
    """In panels that end within an expert."""
    experts, out, inner, stem = 2, 1100, 1056, "model.layers.0.mlp.experts.down_proj"
    rng = np.random.default_rng(8)
    blocks = rng.integers(0, 256, (experts, out, inner // 32, 16)).astype(np.uint8)
    scales = rng.integers(120, 130, blocks.shape[:3]).astype(np.uint8)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(experts, out, inner)
    powers = np.ldexp(np.float32(1), scales.astype(np.int32) - 127).repeat(32, axis=2)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * powers
    arrays = {f"{stem}_blocks": blocks, f"{stem}_scales": scales}
    config = {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "float32"}
    base = write_model_folder(tmp_path / "base", arrays, "model.safetensors", 0, write_state, **config)
    factors = dyadic_factors(rng, out, inner, 1)
    adapter = write_peft(tmp_path / "adapter", {f"{stem.replace('experts', 'experts.1')}": factors}, alpha=1.0)
    loraformat.merge(base, [adapter], tmp_path / "merged", on_quantized="dequantize")
    found = read_state(tmp_path / "merged" / "model.safetensors")[stem]
    assert found.shape == (experts, inner, out)
    np.testing.assert_array_equal(found[1].T, values[1] + product(factors).astype(np.float32))
    np.testing.assert_array_equal(found[0].T, values[0])


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"quant_method": "gptq"}, 1),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, 0),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, 1),
        ({"quant_method": "auto-round", "packing_format": "auto_round"}, 0),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:gptqmodel:exllamav2"}, 0),
        ({"quant_method": "auto-round"}, None),
    ],
    ids=lambda each: str(each)[:60],
)
def test_zero_points_of_gptq_count_from_what_the_packer_says(
    tmp_path: Path, settings: dict[str, Any], first: int | None
) -> None:
    """Words of one code and one zero point; a step too many would be in every number."""
    codes, zeros = np.full((INNER // 8, OUT), 0x77777777, np.int32), np.full((1, OUT // 8), 0x33333333, np.int32)
    own = {"qweight": codes, "qzeros": zeros, "scales": np.full((1, OUT), 0.5, np.float16)}
    config = {"quantization_config": {"bits": 4, "group_size": INNER, **settings}}
    base = write_model_folder(
        tmp_path / "base", name(Q, own), "model.safetensors", 0, write_state, dtype="float32", **config
    )
    if first is None:
        with pytest.raises(LoraformatError, match="packing_format"):
            merge(tmp_path, base, Q, on_quantized="dequantize")
        return
    _, output = merge(tmp_path, base, Q, on_quantized="dequantize")
    wanted = (7 - 3 - first) * 0.5 + delta_of(Q, Q)
    np.testing.assert_allclose(read_state(output / "model.safetensors")[f"{Q}.weight"], wanted, rtol=1e-6)


UNREAD = {
    "HQQ": ("W_q", "scale", "zero", "meta"),
    "AQLM": ("codes", "codebooks", "scales"),
    "VPTQ": ("centroids", "indices", "perm"),
    "SpQR": ("dense_weights", "row_offsets", "col_vals"),
    "EXL2": ("q_weight", "q_scale", "q_groups"),
    "EXL3": ("trellis", "suh", "svh"),
    "Marlin": ("B", "s"),
    "SVDQuant": ("qweight", "wscales", "proj_down"),
    "Quanto": ("weight._data._data", "weight._scale", "weight._shift"),
}


@pytest.mark.parametrize("who", UNREAD)
def test_what_is_not_read_is_refused_by_its_makers_name(tmp_path: Path, who: str) -> None:
    """Also of a bare file, which no configuration says anything of."""
    own = {suffix: np.ones((4, 4), np.uint8) for suffix in UNREAD[who]}
    base = write_state(tmp_path / "base.safetensors", {**name(Q, own), "norm.weight": np.ones(3, np.float32)})
    with pytest.raises(LoraformatError, match=who) as caught:
        merge(tmp_path, base, Q)
    assert caught.value.codes == ("LF470",)
    assert "float model" in str(caught.value)
