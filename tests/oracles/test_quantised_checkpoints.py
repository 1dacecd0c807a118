"""Quantised weights of checkpoints, against what the packages that made them decode.

Each quantiser makes the tensors of one Linear, which is put into a model folder. Merged with `--on-quantized
dequantize` in float32, the weight must be the package's own decoding plus the delta, to the last bits of float32.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from graphs import dyadic_factors, product, write_peft

torch = pytest.importorskip("torch", reason="the oracle tests need torch")
save_file = pytest.importorskip("safetensors.torch").save_file

OUT, INNER = 96, 256
MODULE = "model.layers.0.self_attn.q_proj"
Made = tuple[Mapping[str, Any], Any, Mapping[str, Any]]
"""Tensors by what follows the module's name, the decoded weight, and the configuration's settings."""


def weight() -> Any:
    return torch.randn(OUT, INNER, generator=torch.Generator().manual_seed(3)) * 0.05


def write_base(folder: Path, tensors: Mapping[str, Any], settings: Mapping[str, Any], **config: Any) -> Path:
    folder.mkdir(parents=True)
    named = {f"{MODULE}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file({**named, "model.norm.weight": torch.ones(INNER)}, folder / "model.safetensors", {"format": "pt"})
    fields = {"model_type": "llama", "dtype": "float32", **config, **settings}
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    return folder


def merge(folder: Path, made: Made, **options: Any) -> tuple[Any, Any, Path]:
    """Return the merged weight, what it should be in float64, and the output."""
    tensors, decoded, settings = made
    base = write_base(folder / "base", tensors, settings)
    rng = np.random.default_rng(5)
    factors = dyadic_factors(rng, OUT, INNER, 3)
    factors = (factors[0] * np.float32(2.0**-7), factors[1] * np.float32(2.0**-3))
    adapter = write_peft(folder / "adapter", {MODULE: factors}, alpha=3.0)
    loraformat.merge(base, [adapter], folder / "merged", **options)
    from safetensors import safe_open

    with safe_open(folder / "merged" / "model.safetensors", "pt") as stream:
        found = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    return found, decoded.double().numpy() + product(factors), folder / "merged"


def bnb4(kind: str, nested: bool) -> Made:
    functional = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes").functional
    codes, state = functional.quantize_4bit(weight(), quant_type=kind, compress_statistics=nested, blocksize=64)
    beside = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    return {"weight": codes, **beside}, functional.dequantize_4bit(codes, state), settings


def bnb8() -> Made:
    functional = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes").functional
    codes, largest, _ = functional.int8_vectorwise_quant(weight().half())
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    tensors = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, functional.int8_vectorwise_dequant(codes, largest), settings


def compressed(form: str, **args: Any) -> Made:
    """Return what compressed-tensors makes, with scales that it computes from the weight."""
    package = pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    w, strategy = weight(), args["strategy"]
    size = args.get("group_size") or INNER
    shaped = w.reshape(OUT, -1, size)
    if strategy == "tensor":
        low, high = w.min().reshape(1), w.max().reshape(1)
    elif strategy == "block":
        tall, wide = args["block_structure"]
        tiles = w.reshape(OUT // tall, tall, INNER // wide, wide)
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    else:
        low, high = shaped.amin(-1), shaped.amax(-1)
    beside = {}
    if strategy == "tensor_group":
        beside["global_scale"] = (448.0 * 6.0 / w.abs().max()).reshape(1).float()
    scales, zeros = calculate_qparams(low, high, arguments, **beside)
    state = {"weight": w, "weight_scale": scales.float()}
    if not args.get("symmetric", True):
        state["weight_zero_point"] = zeros.to(torch.int8)
    if beside:
        state["weight_global_scale"] = beside["global_scale"]
    compressor = BaseCompressor.get_value_from_registry(form)
    made = compressor.compress(state, scheme)
    decoded = compressor.decompress(dict(made), scheme)["weight"]
    if form == "nvfp4-pack-quantized":  # Which it decodes in bfloat16.
        decoded = decode_in_float32(made, arguments)
    config = {"quant_method": "compressed-tensors", "format": form, "version": package.__version__}
    return made, decoded, {"quantization_config": config}


def decode_in_float32(made: Mapping[str, Any], arguments: Any) -> Any:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    numbers = unpack_fp4_from_uint8(made["weight_packed"], OUT, INNER, dtype=torch.float32)
    scales, inner = made["weight_scale"].float(), made["weight_global_scale"]
    return dequantize(numbers, scales, args=arguments, global_scale=inner, dtype=torch.float32)


def mlx(bits: int) -> Made:
    mx = pytest.importorskip("mlx.core", reason="needs mlx")
    w = mx.array(weight().numpy())
    codes, scales, biases = mx.quantize(w, group_size=64, bits=bits)
    decoded = torch.from_numpy(np.array(mx.dequantize(codes, scales, biases, group_size=64, bits=bits)))
    tensors = {"weight": codes, "scales": scales, "biases": biases}
    held = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    return held, decoded, {"quantization": {"group_size": 64, "bits": bits}}


def deepseek() -> Made:
    """Return blocks of 128 x 128 as transformers' own quantiser has them, decoded by torch."""
    tiles = torch.nn.functional.pad(weight(), (0, 0, 0, 128 - OUT)).reshape(1, 128, INNER // 128, 128)
    inverse = tiles.abs().amax((1, 3)) / 448.0
    spread = inverse.repeat_interleave(128, 0)[:OUT].repeat_interleave(128, 1)
    codes = (weight() / spread).to(torch.float8_e4m3fn)
    settings = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    return {"weight": codes, "weight_scale_inv": inverse}, codes.float() * spread, settings


MADE: dict[str, Callable[[], Made]] = {
    "nf4": lambda: bnb4("nf4", nested=False),
    "nf4-nested": lambda: bnb4("nf4", nested=True),
    "fp4": lambda: bnb4("fp4", nested=False),
    "int8": bnb8,
    "ct-int8-channel": lambda: compressed("int-quantized", num_bits=8, strategy="channel"),
    "ct-int8-tensor": lambda: compressed("int-quantized", num_bits=8, strategy="tensor"),
    "ct-int8-zeros": lambda: compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False),
    "ct-float8-channel": lambda: compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "ct-float8-tensor": lambda: compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "ct-float8-block": lambda: compressed(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 64]
    ),
    "ct-int4": lambda: compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
    "ct-int4-zeros": lambda: compressed(
        "pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False
    ),
    "ct-int2": lambda: compressed("pack-quantized", num_bits=2, strategy="group", group_size=64),
    "ct-packed-int8": lambda: compressed("pack-quantized", num_bits=8, strategy="channel"),
    "ct-nvfp4": lambda: compressed(
        "nvfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    ),
    "ct-mxfp4": lambda: compressed(
        "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
    ),
    "mlx4": lambda: mlx(4),
    "mlx8": lambda: mlx(8),
    "mlx2": lambda: mlx(2),
    "deepseek": deepseek,
}


@pytest.mark.parametrize("name", MADE)
def test_a_merge_in_floats_is_the_package_s_decoding_and_the_delta(name: str, tmp_path: Path) -> None:
    found, wanted, output = merge(tmp_path, MADE[name](), on_quantized="dequantize")
    assert set(found) == {f"{MODULE}.weight", "model.norm.weight"}
    merged = found[f"{MODULE}.weight"]
    assert merged.dtype == torch.float32
    np.testing.assert_allclose(merged.double().numpy(), wanted, rtol=3e-7, atol=1e-8)
    config = json.loads((output / "config.json").read_text())
    assert not {"quantization_config", "quantization"} & set(config)
