"""Quantised weights of checkpoints, against what the packages that made them decode.

Each quantiser makes the tensors of one Linear, which is put into a model folder. Merged with `--on-quantized
dequantize` in float32, the weight must be the package's own decoding plus the delta, to the last bits of float32.
"""

import importlib.util
import json
import sys
import types
import warnings
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


def load_alone(package: str, module: str) -> Any:
    """Import a module of a package whose own import asks for other versions of other packages."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs {package}")
    path = Path(spec.origin).parent.joinpath(*module.split(".")).with_suffix(".py")
    own = importlib.util.spec_from_file_location(f"alone_{module.rpartition('.')[2]}", path)
    assert own is not None
    assert own.loader is not None
    loaded = importlib.util.module_from_spec(own)
    own.loader.exec_module(loaded)
    return loaded


def gptq(bits: int, *, moved: bool = False) -> Made:
    """Return what AutoGPTQ packs, decoded by its layer: the identity goes in."""
    layers = load_alone("auto_gptq", "nn_modules.qlinear.qlinear_cuda")
    rng, most = torch.Generator().manual_seed(7), (1 << bits) - 1
    linear = torch.nn.Linear(INNER, OUT, bias=False)
    linear.weight.data = weight()
    size = 64
    order = torch.randperm(INNER, generator=rng) // size if moved else torch.arange(INNER) // size
    scales = torch.rand(OUT, INNER // size, generator=rng) * 0.2 / most + 0.1 / most
    zeros = torch.randint(1, most + 1, scales.shape, generator=rng).float()
    codes = torch.clamp(torch.round(weight() / scales[:, order] + zeros[:, order]), 0, most)
    linear.weight.data = (codes - zeros[:, order]) * scales[:, order]
    layer = layers.QuantLinear(bits, size, INNER, OUT, bias=False, kernel_switch_threshold=0)
    layer.pack(linear, scales, zeros, g_idx=order)
    layer.scales = layer.scales.half()
    made = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    layer.scales = layer.scales.float()
    settings = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": moved}
    return made, layer(torch.eye(INNER)).T, {"quantization_config": settings}


def awq() -> Made:
    """Return words of every pattern, decoded by AutoAWQ."""
    packing = load_alone("awq", "utils.packing_utils")
    rng, size = torch.Generator().manual_seed(8), 64
    qweight = torch.randint(-(2**31), 2**31, (INNER, OUT // 8), generator=rng).int()
    qzeros = torch.randint(-(2**31), 2**31, (INNER // size, OUT // 8), generator=rng).int()
    scales = (torch.rand(INNER // size, OUT, generator=rng) * 0.02).half()
    decoded = packing.dequantize_gemm(qweight, qzeros, scales.double(), 4, size).T
    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}, decoded, {"quantization_config": settings}


def torchao(config: str, **options: Any) -> Made:
    """Return what torchao stores of a tensor of its own."""
    spec = importlib.util.find_spec("torchao")
    if spec is None:
        pytest.skip("needs torchao")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao import quantization
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        whole = torch.nn.Sequential(torch.nn.Linear(INNER, OUT, bias=False))
        whole[0].weight.data = weight()
        quantization.quantize_(whole, getattr(quantization, config)(**options))
        tensors, _ = flatten_tensor_state_dict(whole.state_dict())
        decoded = whole[0].weight.dequantize()
    return (
        {name.removeprefix("0."): each for name, each in tensors.items()},
        decoded.float(),
        {"quantization_config": {"quant_method": "torchao"}},
    )


def quanto(form: str) -> Made:
    """Return what Quanto saves; its part for transformers asks for an older one."""
    if importlib.util.find_spec("optimum") is None or importlib.util.find_spec("optimum.quanto") is None:
        pytest.skip("needs optimum-quanto")
    sys.modules.setdefault("optimum.quanto.models", types.ModuleType("optimum.quanto.models"))
    from optimum import quanto

    whole = torch.nn.Sequential(torch.nn.Linear(INNER, OUT, bias=False))
    whole[0].weight.data = weight()
    quanto.quantize(whole, weights=getattr(quanto, form))
    quanto.freeze(whole)
    tensors = {name.removeprefix("0."): tensor.detach() for name, tensor in whole.state_dict().items()}
    return tensors, whole[0].weight.detach().dequantize(), {"quantization_config": {"quant_method": "quanto"}}


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
    "ct-int4-zeros": lambda: compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
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
    "gptq4": lambda: gptq(4),
    "gptq8": lambda: gptq(8),
    "gptq2": lambda: gptq(2),
    "gptq4-moved": lambda: gptq(4, moved=True),
    "awq": awq,
    "torchao-int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao-float8": lambda: torchao("Float8WeightOnlyConfig"),
    "quanto-int8": lambda: quanto("qint8"),
    "quanto-float8": lambda: quanto("qfloat8"),
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


IN_PLACE = (
    *("int8", "ct-int8-channel", "ct-int8-tensor", "ct-int8-zeros", "ct-packed-int8"),
    *("torchao-int8", "quanto-int8"),
)


@pytest.mark.parametrize("name", IN_PLACE)
def test_codes_of_8_bits_are_merged_in_place(name: str, tmp_path: Path) -> None:
    tensors, decoded, settings = MADE[name]()
    base = write_base(tmp_path / "again", tensors, settings)
    found, wanted, _ = merge(tmp_path, (tensors, decoded, settings))
    assert {key: (each.dtype, each.shape) for key, each in found.items()} == {
        key: (each.dtype, each.shape) for key, each in read(base).items()
    }
    decode = decode_of(name)
    own = {key.removeprefix(f"{MODULE}."): each for key, each in found.items()}
    apart = decode(own).double().numpy() - wanted
    delta = wanted - decoded.double().numpy()
    assert (delta * (apart + delta)).sum() / (delta * delta).sum() == pytest.approx(1, abs=0.1)
    assert np.abs(apart).max() <= 0.51 * np.abs(wanted).max() / 127 * (2 if name == "ct-int8-zeros" else 1)


def read(folder: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118


def decode_of(name: str) -> Callable[[Mapping[str, Any]], Any]:
    if name == "int8":
        functional = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes").functional
        return lambda own: functional.int8_vectorwise_dequant(own["weight"], own["SCB"])
    if name == "ct-packed-int8":
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        shape = torch.Size((OUT, INNER))
        return lambda own: unpack_from_int32(own["weight_packed"], 8, shape).float() * own["weight_scale"]
    if name in ("torchao-int8", "quanto-int8"):
        codes, scales = {"t": ("_weight_qdata", "_weight_scale"), "q": ("weight._data", "weight._scale")}[name[0]]
        return lambda own: own[codes].float() * own[scales]
    return lambda own: (own["weight"].float() - own.get("weight_zero_point", 0)) * own["weight_scale"]


@pytest.mark.parametrize("name", sorted(set(MADE) - set(IN_PLACE)))
def test_others_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(loraformat.LoraformatError) as caught:
        merge(tmp_path, MADE[name]())
    assert {problem.code for problem in caught.value.problems} <= {"LF440", "LF471"}
    assert "--on-quantized dequantize" in str(caught.value)


def test_torchao_s_codes_of_few_bits_are_refused_by_name(tmp_path: Path) -> None:
    """They lie in bytes, as those of 8 bits do."""
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("needs torchao")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import PerGroup
    made = torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(32))
    with pytest.raises(loraformat.LoraformatError, match="few bits") as caught:
        merge(tmp_path, made)
    assert set(caught.value.codes) == {"LF470"}


@pytest.mark.parametrize("name", ["ct-int4", "ct-float8-channel", "ct-float8-tensor", "ct-float8-block", "deepseek"])
def test_with_the_float_checkpoint_few_bits_are_quantised_afresh(name: str, tmp_path: Path) -> None:
    """Within half a step of the merged float weight, with the scales that follow from it."""
    tensors, _, settings = MADE[name]()
    checkpoint = write_base(tmp_path / "floats", {"weight": weight()}, {})
    found, wanted, output = merge(tmp_path, (tensors, weight(), settings), base_checkpoint=checkpoint)
    base = read(tmp_path / "base")
    assert {key: (each.dtype, each.shape) for key, each in found.items()} == {
        key: (each.dtype, each.shape) for key, each in base.items()
    }
    decoded = decode_few(found).double().numpy()
    delta = wanted - weight().double().numpy()
    kept = (delta * (decoded - weight().double().numpy())).sum() / (delta * delta).sum()
    assert kept == pytest.approx(1, abs=0.15)
    steps = np.abs(wanted).max() / (448 / 32 if "int4" not in name else 7)
    assert np.abs(decoded - wanted).max() <= 0.52 * steps
    verdict = loraformat.verify(output, tmp_path / "base", [tmp_path / "adapter"], base_checkpoint=checkpoint)
    assert verdict.holds, verdict


def decode_few(found: Mapping[str, Any]) -> Any:
    """Decode with torch, and int4 with compressed-tensors' own function."""
    own = {key.removeprefix(f"{MODULE}."): tensor for key, tensor in found.items()}
    if "weight_packed" in own:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        codes = unpack_from_int32(own["weight_packed"], 4, torch.Size((OUT, INNER))).float()
        return codes * own["weight_scale"].repeat_interleave(32, 1)
    scales = own.get("weight_scale", own.get("weight_scale_inv"))
    for axis, size in enumerate((OUT, INNER)) if scales.ndim == 2 else ():
        scales = scales.repeat_interleave(-(-size // scales.shape[axis]), axis).narrow(axis, 0, size)
    return own["weight"].float() * scales


def test_experts_of_gpt_oss_are_decoded_as_transformers_does(tmp_path: Path) -> None:
    """Merged into codes in floats, it is what merging into transformers' own decoding gives."""
    pytest.importorskip("transformers", reason="needs transformers")
    from safetensors.torch import load_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng, stem = torch.Generator().manual_seed(5), "model.layers.0.mlp.experts"
    sizes = {"gate_up_proj": (80, 64), "down_proj": (64, 96)}
    coded, plain = {}, {}
    for name, (out, inner) in sizes.items():
        blocks = torch.randint(0, 256, (3, out, inner // 32, 16), generator=rng, dtype=torch.uint8)
        scales = torch.randint(118, 124, (3, out, inner // 32), generator=rng, dtype=torch.uint8)
        coded |= {f"{stem}.{name}_blocks": blocks, f"{stem}.{name}_scales": scales}
        plain[f"{stem}.{name}"] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    for folder, tensors in (("coded", coded), ("plain", plain)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
        settings = {"quantization_config": {"quant_method": "mxfp4"}} if folder == "coded" else {}
        config = {"model_type": "gpt_oss", "dtype": "float32", **settings}
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(6)
    modules = {f"{stem}.1.gate_up_proj": (80, 64), f"{stem}.2.down_proj": (64, 96), f"{stem}.0.down_proj": (64, 96)}
    factors = {module: dyadic_factors(draw, *shape, 2) for module, shape in modules.items()}
    adapter = write_peft(tmp_path / "adapter", factors, alpha=2.0)
    with pytest.raises(loraformat.LoraformatError, match="LF471"):
        loraformat.merge(tmp_path / "coded", [adapter], tmp_path / "one")
    loraformat.merge(tmp_path / "coded", [adapter], tmp_path / "one", on_quantized="dequantize")
    loraformat.merge(tmp_path / "plain", [adapter], tmp_path / "other")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys() == plain.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
        assert not torch.equal(one[name], plain[name]), name
