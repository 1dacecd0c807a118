"""State dicts of torch in memory, merged and loaded again, beside PEFT's own forward pass."""

from pathlib import Path
from typing import Any

import pytest
from checkpoints import peft, torch, transformers

import loraformat

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

SIZES = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 32, "bos_token_id": 0}
LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}


def make_gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(eos_token_id=0, **SIZES))


def make_llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **LLAMA))


MODELS = {"gpt2": (make_gpt2, ["c_attn", "c_proj"]), "llama": (make_llama, "all-linear")}


@pytest.mark.parametrize("form", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_live_model(family: str, form: Any) -> None:
    torch.manual_seed(1)
    make, modules = MODELS[family]
    base = make().to(form).eval()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    fresh = make().to(form).eval()
    fresh.load_state_dict(before)
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=modules, init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    adapter = loraformat.load(peft.get_peft_model_state_dict(model), config=model.peft_config["default"])
    state = fresh.state_dict()
    found = loraformat.merge_state_dict(state, adapter, config=fresh.config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert {(t.dtype, t.device) for t in found.tensors.values()} == {(form, torch.device("cpu"))}
    assert found.tensors["lm_head.weight"].data_ptr() == state["lm_head.weight"].data_ptr()
    fresh.load_state_dict(found.tensors)
    tokens = torch.arange(11)[None]
    with torch.no_grad():
        expected, got = model(tokens).logits, fresh(tokens).logits
    bound = {torch.float32: 5e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[form]
    assert float((expected - got).norm() / expected.norm()) < bound


def test_grown_tables_that_are_tied(tmp_path: Path) -> None:
    torch.manual_seed(2)
    base = make_llama().eval()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    base.resize_token_embeddings(101)
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(loraformat.FindingError, match="LF414"):  # Two names of one table that grows.
        loraformat.merge_state_dict(state, tmp_path / "adapter", config=base.config)
    resized = make_llama().eval()
    resized.load_state_dict(state)
    resized.resize_token_embeddings(101)
    found = loraformat.merge_state_dict(resized.state_dict(), tmp_path / "adapter", config=resized.config)
    assert found.tensors["lm_head.weight"] is found.tensors["model.embed_tokens.weight"]
    resized.load_state_dict(found.tensors)
    tokens = torch.arange(90, 101)[None]
    with torch.no_grad():
        torch.testing.assert_close(resized(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_tensors_whose_numbers_are_elsewhere() -> None:
    state = dict(make_gpt2().state_dict())
    for odd in (torch.ones(3, 4, device="meta"), torch.ones(3, 4).to_sparse(), torch.ones(3, dtype=torch.complex32)):
        with pytest.raises(loraformat.InputError, match="LF106"):
            loraformat.merge_state_dict(state | {"odd.weight": odd}, [])


def test_transposed_view_is_refused_where_it_changes() -> None:
    layer = torch.nn.Linear(5, 7, bias=False)
    factors = {
        "base_model.model.fc.lora_A.weight": torch.ones(1, 5),
        "base_model.model.fc.lora_B.weight": torch.ones(7, 1),
    }
    adapter = loraformat.load(factors, config=peft.LoraConfig(r=1, lora_alpha=2, target_modules=["fc"]))
    weight = layer.weight
    found = loraformat.merge_state_dict({"fc.weight": weight}, adapter).tensors["fc.weight"]
    torch.testing.assert_close(found, weight.detach() + 2)
    assert not found.requires_grad
    with pytest.raises(loraformat.LoraformatError, match="LF150"):
        loraformat.merge_state_dict({"fc.weight": weight.detach().T.contiguous().T}, adapter)
