"""Merges into graphs of 4 bits with the checkpoint's float numbers, beside the merged float model quantised afresh."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

import loraformat
from builders import write_peft, write_tensors
from loraformat.errors import LoraformatError
from loraformat.plan import weights

pytestmark = pytest.mark.oracle
quantization = pytest.importorskip("onnxruntime.quantization")
pytest.importorskip("onnx_ir", reason="MatMulNBitsQuantizer needs onnx_ir")

from quantised import QDQ, SHAPES, Case, compute, nbits  # noqa: E402

MADE: dict[str, Callable[[Path, Path], None]] = {
    "symmetric": nbits(4, block_size=32, is_symmetric=True),
    "asymmetric": nbits(4, block_size=16, is_symmetric=False),
    "one block": nbits(4, block_size=128, is_symmetric=True),
    "QDQ symmetric": nbits(4, block_size=32, is_symmetric=True, quant_format=QDQ),
    "QDQ asymmetric": nbits(4, block_size=16, is_symmetric=False, quant_format=QDQ),
}
COARSE = {
    "2 bits": nbits(2, block_size=32, is_symmetric=True),
    "2 bits asymmetric": nbits(2, block_size=16, is_symmetric=False),
}
"""What is left of a small change there is noise."""
TOUCHED = ("fc1", "fc2")
"""The quantiser leaves fc3, a Gemm, in floats."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("few-bits"), share=0.02)


def quantise(case: Case, name: str, source: Path) -> Path:
    target = case.folder / f"{name.replace(' ', '-')}-{source.name}"
    if not target.exists():
        (MADE | COARSE)[name](source, target)
    return target


def tensors(path: Path) -> dict[str, NDArray[Any]]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("name", [*MADE, *COARSE])
@pytest.mark.parametrize("tile_bytes", [1 << 20, 4096])
def test_codes_are_those_of_the_quantiser_that_saw_the_merged_weights(
    case: Case, tmp_path: Path, name: str, tile_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one tile, or in several that are done each by itself."""
    monkeypatch.setattr(weights, "TILE_BYTES", tile_bytes)
    base, merged = quantise(case, name, case.float_base), tmp_path / "merged.onnx"
    options = {"base_checkpoint": case.checkpoint, "min_retained": 0}
    receipt = loraformat.merge(base, [case.adapter], merged, **options)
    assert len(receipt.weights) == 3
    found, afresh = tensors(merged), tensors(quantise(case, name, case.float_merged))
    assert found.keys() == afresh.keys()
    coded = [each for each in found if "Q4" in each or "Q2" in each or "zero" in each]
    assert coded
    for each, values in found.items():
        if each in coded:
            np.testing.assert_array_equal(values, afresh[each])
        else:
            np.testing.assert_allclose(values, afresh[each], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", MADE)
def test_the_change_is_there(case: Case, tmp_path: Path, name: str) -> None:
    base, merged = quantise(case, name, case.float_base), tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, [case.adapter], merged, base_checkpoint=case.checkpoint)
    assert all(0.75 < weight.retained < 1.25 for weight in receipt.weights)  # Of 7000 numbers; the noise is six times.
    exact = compute(case.float_merged, case.x)
    own = np.linalg.norm(compute(merged, case.x) - exact)
    usual = np.linalg.norm(compute(quantise(case, name, case.float_merged), case.x) - exact)
    assert abs(own - usual) < 1e-3 * usual


@pytest.mark.parametrize("name", ["symmetric", "QDQ asymmetric"])
def test_it_is_proven_with_the_checkpoint_and_only_with_it(case: Case, tmp_path: Path, name: str) -> None:
    base, merged = quantise(case, name, case.float_base), tmp_path / "merged.onnx"
    loraformat.merge(base, [case.adapter], merged, base_checkpoint=case.checkpoint)
    assert loraformat.verify(merged, base, [case.adapter], base_checkpoint=case.checkpoint).holds
    with pytest.raises(LoraformatError) as caught:
        loraformat.verify(merged, base, [case.adapter])
    assert set(caught.value.codes) == {"LF440"}
    data = bytearray(merged.read_bytes())
    codes = next(each for each in onnx.load(merged).graph.initializer if "Q4" in each.name)
    data[data.index(codes.raw_data) + 50] ^= 1
    merged.write_bytes(data)
    assert not loraformat.verify(merged, base, [case.adapter], base_checkpoint=case.checkpoint).holds


@pytest.mark.parametrize("name", ["symmetric", "asymmetric"])
def test_kept_scales_are_kept(case: Case, tmp_path: Path, name: str) -> None:
    base, merged = quantise(case, name, case.float_base), tmp_path / "merged.onnx"
    loraformat.merge(base, [case.adapter], merged, base_checkpoint=case.checkpoint, keep_scales=True, min_retained=0)
    before, after = tensors(base), tensors(merged)
    for each in before:
        assert (before[each].tobytes() == after[each].tobytes()) == ("Q4" not in each and "fc3.weight" not in each)


def test_a_function_of_the_weight_sees_the_float_numbers(case: Case, tmp_path: Path) -> None:
    """DoRA: rows of W + Δ, each of the length that the adapter says."""
    base, lengths = quantise(case, "symmetric", case.float_base), {}
    arrays = {}
    for module in TOUCHED:
        prefix = f"base_model.model.{module}"
        down, up = case.factors[module]
        lengths[module] = np.linspace(0.5, 2, len(up)).astype(np.float32)
        arrays |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
        arrays[f"{prefix}.lora_magnitude_vector"] = lengths[module]
    adapter = case.adapt("dora", *TOUCHED, use_dora=True)
    write_tensors(adapter / "adapter_model.safetensors", arrays, {"format": "pt"})
    loraformat.merge(base, [adapter], tmp_path / "merged.onnx", base_checkpoint=case.checkpoint)
    wanted = {}
    for module in TOUCHED:
        whole = case.base[module] + case.delta[module]
        wanted[module] = whole * (lengths[module][:, None] / np.linalg.norm(whole, axis=1, keepdims=True))
    source = case.make(wanted, "dora.onnx")
    MADE["symmetric"](source, tmp_path / "afresh.onnx")
    found, afresh = tensors(tmp_path / "merged.onnx"), tensors(tmp_path / "afresh.onnx")
    for each, values in found.items():
        if each.endswith("_Q4"):
            assert np.mean(values != afresh[each]) < 1e-3, each
    assert loraformat.verify(tmp_path / "merged.onnx", base, [adapter], base_checkpoint=case.checkpoint).holds


def shift(path: Path, target: Path, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Path:
    """Write a model with other codes."""
    model = onnx.load(path)
    for each in model.graph.initializer:
        if each.name.endswith("_Q4"):
            codes = numpy_helper.to_array(each)
            each.raw_data = np.ascontiguousarray(change(codes)).tobytes()
    onnx.save(model, target)
    return target


def test_other_numbers_are_refused(case: Case, tmp_path: Path) -> None:
    base = shift(quantise(case, "symmetric", case.float_base), tmp_path / "other.onnx", lambda codes: codes[::-1])
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(base, [case.adapter], tmp_path / "merged.onnx", base_checkpoint=case.checkpoint)
    assert set(caught.value.codes) == {"LF421"}
    assert not (tmp_path / "merged.onnx").exists()


def test_other_numbers_are_refused_where_no_sample_is_taken(case: Case, tmp_path: Path) -> None:
    """The plan compares 24 columns, the merge all of them."""

    def turn(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        out, width = codes.copy().reshape(len(codes), -1), SHAPES["fc1" if len(codes) == 96 else "fc2"][1]
        for column in set(range(width)) - {index * (width - 1) // 23 for index in range(24)}:
            out[:, column // 2] ^= 0xF0 if column % 2 else 0xF
        return out

    base = shift(quantise(case, "symmetric", case.float_base), tmp_path / "other.onnx", turn)
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(base, [case.adapter], tmp_path / "merged.onnx", base_checkpoint=case.checkpoint)
    assert caught.value.codes == ("LF615",)
    assert not (tmp_path / "merged.onnx").exists()


def test_multiplied_columns_are_refused(case: Case, tmp_path: Path) -> None:
    """As AWQ does: columns times s, the layer before divided by it."""
    factors = np.linspace(0.6, 1.8, 72)
    source = case.make({"fc1": case.base["fc1"] * factors}, "scaled.onnx")
    MADE["symmetric"](source, tmp_path / "awq.onnx")
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(
            tmp_path / "awq.onnx",
            [case.adapter],
            tmp_path / "merged.onnx",
            base_checkpoint=case.checkpoint,
            any_rounding=True,
        )
    assert caught.value.codes == ("LF616",)


def test_codes_of_another_rounding_need_acceptance(case: Case, tmp_path: Path) -> None:
    """As GPTQ leaves them: near the numbers, not nearest."""
    rng = np.random.default_rng(5)

    def nudge(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        low, high = ((codes >> s & 15).astype(np.int8) + rng.integers(-1, 2, codes.shape) for s in (0, 4))
        return (np.clip(low, 0, 15) | np.clip(high, 0, 15) << 4).astype(np.uint8)

    base = shift(quantise(case, "one block", case.float_base), tmp_path / "gptq.onnx", nudge)
    options = {"base_checkpoint": case.checkpoint}
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(base, [case.adapter], tmp_path / "merged.onnx", **options)
    assert caught.value.codes == ("LF617",)
    loraformat.merge(base, [case.adapter], tmp_path / "merged.onnx", **options, any_rounding=True)
    assert loraformat.verify(tmp_path / "merged.onnx", base, [case.adapter], **options).holds


def test_what_an_earlier_merge_has_added_is_not_lost(case: Case, tmp_path: Path) -> None:
    base, options = quantise(case, "symmetric", case.float_base), {"base_checkpoint": case.checkpoint}
    adapter = case.adapt("two", *TOUCHED)
    loraformat.merge(base, [adapter], tmp_path / "once.onnx", **options)
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge(tmp_path / "once.onnx", [adapter], tmp_path / "twice.onnx", **options)
    assert caught.value.codes == ("LF618",)
    with pytest.raises(LoraformatError) as caught:
        loraformat.unmerge(tmp_path / "once.onnx", tmp_path / "back.onnx", adapters=[adapter], **options)
    assert set(caught.value.codes) == {"LF440"}


def build(folder: Path, target: Path) -> Path:
    """Have onnxruntime-genai's builder make a model of 4 bits."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    command += ["-i", str(folder), "-o", str(target), "-c", str(folder), "--extra_options", "int4_block_size=32"]
    subprocess.run(command, check=True, capture_output=True)
    return target / "model.onnx"


def test_the_builders_own_model_of_the_merged_checkpoint(tmp_path: Path) -> None:
    """q, k and v side by side in codes: all codes and scales are those that the builder gives the merged weights."""
    pytest.importorskip("onnxruntime_genai")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=96, num_hidden_layers=1, tie_word_embeddings=False, **sizes)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    words = tokenizers_of(96)
    factors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            down, up = torch.randn(2, module.in_features), 0.002 * torch.randn(module.out_features, 2)
            factors[name] = (down.numpy(), up.numpy())
    for folder in ("base", "merged"):
        model.save_pretrained(tmp_path / folder)
        words.save_pretrained(tmp_path / folder)
        for name, (down, up) in factors.items():
            weight = model.get_submodule(name).weight
            weight.data += torch.from_numpy(up.astype(np.float64) @ down.astype(np.float64)).to(weight.dtype)
    base, afresh = (build(tmp_path / folder, tmp_path / f"{folder}-onnx") for folder in ("base", "merged"))
    adapter = write_peft(tmp_path / "adapter", factors, r=2, lora_alpha=2)
    (tmp_path / "out").mkdir()
    loraformat.merge(base, [adapter], tmp_path / "out" / "model.onnx", base_checkpoint=tmp_path / "base")
    found, wanted = tensors(tmp_path / "out" / "model.onnx"), tensors(afresh)
    assert sum("qkv_proj" in name for name in found) == 2
    for name, values in found.items():
        if name.endswith("_Q4"):
            assert (values != wanted[name]).mean() < 1e-3, name
        elif values.dtype == np.float32:
            np.testing.assert_allclose(values, wanted[name], rtol=1e-5, atol=1e-6)


def tokenizers_of(size: int) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(index): index for index in range(size)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", bos_token="1", pad_token="0")


def test_a_models_own_files_are_rewritten_or_stay(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "TILE_BYTES", 4096)
    source, options = quantise(case, "asymmetric", case.float_base), {"base_checkpoint": case.checkpoint}
    own, merged = tmp_path / "own.onnx", tmp_path / "merged.onnx"
    own.write_bytes(source.read_bytes())
    loraformat.merge(source, [case.adapter], merged, **options)
    loraformat.merge_into(own, [case.adapter], **options, keep_undo=True)
    found, wanted = tensors(own), tensors(merged)
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
    assert loraformat.verify(own, source, [case.adapter], **options).holds
    loraformat.unmerge(own)
    assert own.read_bytes() == source.read_bytes()
    other = shift(source, tmp_path / "gptq.onnx", lambda codes: codes ^ np.uint8(0x11))
    before = other.read_bytes()
    with pytest.raises(LoraformatError) as caught:
        loraformat.merge_into(other, [case.adapter], **options)
    assert caught.value.codes == ("LF617",)
    assert other.read_bytes() == before
