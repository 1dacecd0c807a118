"""GGUF models as bases: transformers loads what was merged, and the gguf package decodes and quantises it."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from builders import write_peft
from loraformat.bases.gguf_model import _ENCODINGS as ENCODINGS

gguf = pytest.importorskip("gguf", reason="the oracle tests need gguf")
torch = pytest.importorskip("torch", reason="the oracle tests need torch")
peft = pytest.importorskip("peft", reason="the oracle tests need peft")
transformers = pytest.importorskip("transformers", reason="the oracle tests need transformers")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by a name of old.

HEADS, KV_HEADS, HIDDEN, INNER, VOCAB = 4, 2, 128, 192, 64
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed_tokens"]


def interleave(weight: Any, heads: int) -> Any:
    """Return rows as llama.cpp's converter has them (`LlamaModel.permute` of convert_hf_to_gguf.py)."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def make_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2, "vocab_size": VOCAB}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "tie_word_embeddings": False}
    config = transformers.LlamaConfig(**sizes, **heads)
    return transformers.LlamaForCausalLM(config).eval()


def write_gguf(path: Path, model: Any, form: Any) -> Path:
    """Write a llama as convert_hf_to_gguf.py does, matrices in one form."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        module, values = name.removesuffix(".weight"), tensor.float().numpy()
        own = ends.get(module) or f"blk.{module.split('.')[2]}.{NAMES[module.split('.', 3)[3]]}"
        if own.endswith(("attn_q", "attn_k")):
            values = interleave(values, HEADS if own.endswith("attn_q") else KV_HEADS)
        kind = form if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{own}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def adapt(model: Any, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return a PEFT adapter, and every weight of the merged model."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder, {name: each.float().numpy() for name, each in adapted.merge_and_unload().state_dict().items()}


def decode(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}


FORMS = {"F32": 1e-6, "F16": 2e-4, "BF16": 2e-3, "Q8_0": 3e-3}


@pytest.mark.parametrize("form", FORMS)
def test_what_was_merged_is_what_transformers_loads(form: str, tmp_path: Path) -> None:
    """It undoes the order of q and k by itself."""
    model = make_model()
    adapter, wanted = adapt(model, tmp_path / "adapter")
    folder = tmp_path / "merged"
    folder.mkdir()
    base = write_gguf(tmp_path / "base.gguf", model, gguf.GGMLQuantizationType[form])
    receipt = loraformat.merge(base, [adapter], folder / "model.gguf")
    assert len(receipt.weights) == 13
    assert all(weight.retained is not None and weight.retained > 0.9 for weight in receipt.weights)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    for name, tensor in loaded.state_dict().items():
        np.testing.assert_allclose(tensor.numpy(), wanted[name], atol=FORMS[form], err_msg=name)
    assert loraformat.verify(folder / "model.gguf", base, [adapter]).holds


def test_q8_0_is_encoded_as_ggml_does(tmp_path: Path) -> None:
    """The bytes are those of the gguf package for the decoded base plus the delta."""
    model = make_model()
    adapter, merged = adapt(model, tmp_path / "adapter")
    kind = gguf.GGMLQuantizationType.Q8_0
    base = write_gguf(tmp_path / "base.gguf", model, kind)
    loraformat.merge(base, [adapter], tmp_path / "merged.gguf")
    before, name = decode(base)["blk.1.ffn_down.weight"], "model.layers.1.mlp.down_proj.weight"
    delta = merged[name] - model.state_dict()[name].numpy()
    found = next(e for e in gguf.GGUFReader(tmp_path / "merged.gguf").tensors if e.name == "blk.1.ffn_down.weight")
    expected = gguf.quants.quantize((before + delta).astype(np.float32), kind)
    assert (found.data != expected).mean() < 1e-3  # A rounding of the delta may fall the other way.
    untouched = decode(base)["blk.0.ffn_gate.weight"]
    np.testing.assert_array_equal(decode(tmp_path / "merged.gguf")["blk.0.ffn_gate.weight"], untouched)


def test_an_adapter_converted_to_gguf_merges_to_the_same_bytes(tmp_path: Path) -> None:
    """llama.cpp's own names and orders on both sides."""
    model = make_model()
    adapter, _ = adapt(model, tmp_path / "adapter")
    base = write_gguf(tmp_path / "base.gguf", model, gguf.GGMLQuantizationType.F16)
    model.save_pretrained(tmp_path / "hf")
    loraformat.convert(adapter, "gguf", tmp_path / "adapter.gguf", base=tmp_path / "hf")
    loraformat.merge(base, [adapter], tmp_path / "one.gguf")
    loraformat.merge(base, [tmp_path / "adapter.gguf"], tmp_path / "other.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()


def make_blocks(kind: Any, rows: int, columns: int, rng: np.random.Generator) -> Any:
    """Return a matrix of blocks with any codes, whose numbers are of the size of weights."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // elements, size)).astype(np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ2_0": (64,)}
    for at in halves.get(kind.name, (0, 2) if kind.name.endswith("_1") else (0,)):
        blocks[:, at : at + 2] = np.array([0.001], np.float16).view(np.uint8)
    if kind.name == "MXFP4":
        blocks[:, 0] = 120
    return blocks.reshape(rows, -1)


BLOCKS = [form.upper() for form, encoding in ENCODINGS.items() if encoding == "ggml_blocks"]


@pytest.mark.parametrize("form", BLOCKS)
def test_forms_of_few_bits_are_decoded_as_the_package_does(form: str, tmp_path: Path) -> None:
    """To the bit: what stands in the output is its numbers and the delta, rounded once."""
    kind, rng = gguf.GGMLQuantizationType[form], np.random.default_rng(3)
    rows, columns, name = 6, 512, "blk.0.ffn_down.weight"
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_head_count(HEADS)
    stored = {name: make_blocks(kind, rows, columns, rng), "blk.0.ffn_up.weight": make_blocks(kind, 4, 512, rng)}
    for each, blocks in stored.items():
        writer.add_tensor(each, blocks, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.arange(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    factors = rng.standard_normal((2, columns)).astype(np.float32), rng.standard_normal((rows, 2)).astype(np.float32)
    module = "model.layers.0.mlp.down_proj"
    adapter = write_peft(tmp_path / "adapter", {module: factors}, r=2, alpha=2)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(tmp_path / "base.gguf", [adapter], tmp_path / "merged.gguf")
    assert caught.value.codes == ("LF471",)
    assert f"stored as {form.lower()}," in str(caught.value)
    receipt = loraformat.merge(tmp_path / "base.gguf", [adapter], tmp_path / "merged.gguf", on_quantized="dequantize")
    assert receipt.weights[0].retained == pytest.approx(1, abs=1e-3)
    found = {each.name: each for each in gguf.GGUFReader(tmp_path / "merged.gguf").tensors}
    before = gguf.quants.dequantize(stored[name], kind)
    delta = (factors[1].astype(np.float64) @ factors[0]).astype(np.float32)
    np.testing.assert_allclose(found[name].data, (before + delta).astype(np.float16), rtol=1e-3, atol=1e-6)
    assert found[name].tensor_type == gguf.GGMLQuantizationType.F16
    np.testing.assert_array_equal(found["blk.0.ffn_up.weight"].data.reshape(-1), stored["blk.0.ffn_up.weight"].ravel())
    np.testing.assert_array_equal(found["output_norm.weight"].data, np.arange(7))
    assert loraformat.verify(tmp_path / "merged.gguf", tmp_path / "base.gguf", [adapter]).holds


@pytest.mark.parametrize("form", ["Q4_0", "Q5_1"])
def test_floats_in_the_place_of_codes_are_what_transformers_loads(form: str, tmp_path: Path) -> None:
    """Of the codes; and with the checkpoint, the numbers that were quantised."""
    model, kind = make_model(), gguf.GGMLQuantizationType[form]
    adapter, wanted = adapt(model, tmp_path / "adapter")
    base = write_gguf(tmp_path / "base.gguf", model, kind)
    with torch.no_grad():
        model.save_pretrained(tmp_path / "torch")
    before, own = decode(base), {name: each.numpy() for name, each in model.state_dict().items()}
    for options in ({}, {"base_checkpoint": tmp_path / "torch"}):
        folder = tmp_path / f"merged{len(options)}"
        folder.mkdir()
        loraformat.merge(base, [adapter], folder / "model.gguf", on_quantized="dequantize", **options)
        assert loraformat.verify(folder / "model.gguf", base, [adapter], **options).holds
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
        for name, layer in (("down_proj", "ffn_down"), ("up_proj", "ffn_up")):
            full = f"model.layers.1.mlp.{name}.weight"
            noise = 0 if options else before[f"blk.1.{layer}.weight"] - own[full]
            np.testing.assert_allclose(loaded.state_dict()[full].numpy(), wanted[full] + noise, atol=2e-4)
        query = "model.layers.0.self_attn.q_proj.weight"
        noise = 0 if options else before["blk.0.attn_q.weight"] - interleave(own[query], HEADS)
        found = interleave(loaded.state_dict()[query].numpy(), HEADS)
        np.testing.assert_allclose(found, interleave(wanted[query], HEADS) + noise, atol=2e-4)
