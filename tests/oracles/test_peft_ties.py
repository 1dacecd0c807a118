"""Tied tables of GPT-2, which PEFT's `ensure_weight_tying` does not know by name, and of Llama, which it does.

PEFT looks for `embed_tokens` and `lm_head` before it ties anything: with `wte` alone it trains one side, so that its
model computes with two tables. The oracle is that model's forward pass, before it is merged.
"""

from pathlib import Path
from typing import Any

import pytest
from checkpoints import fill, merge, peft, save_base, state_of, stored_names, torch, train, transformers

import loraformat

pytestmark = pytest.mark.oracle

VOCABULARY, WIDTH = 40, 24


def gpt2() -> Any:
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def differ(folder: Path, model: Any) -> float:
    """Return how far logits of a merged folder are from those of a PEFT model, in parts of their own size."""
    merged = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=next(model.parameters()).dtype).eval()
    tokens = torch.arange(VOCABULARY).reshape(1, -1)
    with torch.no_grad():
        found, expected = merged(tokens).logits, model.eval()(tokens).logits
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [True, "auto"], ids=["tables saved", "as PEFT chooses"])
@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["c_attn", "wte"]}, {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}],
    ids=["adapted", "saved"],
)
def test_one_side_of_gpt2(tmp_path: Path, fields: dict[str, Any], whole: Any) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, ensure_weight_tying=True, **fields)
    trained = train(gpt2(), config, tmp_path, save_embedding_layers=whole)
    assert not [name for name in stored_names(trained.adapter) if "lm_head.lora" in name]
    with pytest.raises(loraformat.LoraformatError) as caught:
        merge(trained, tmp_path / "refused")
    assert set(caught.value.codes) == {"LF402"}
    assert all("--untie" in problem.advice for problem in caught.value.problems)
    merge(trained, tmp_path / "merged", untie=True)
    assert differ(tmp_path / "merged", trained.model) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_both_sides_of_gpt2_stay_one_table(tmp_path: Path) -> None:
    """With `lm_head` among the targets PEFT ties the factors and saves both; what it reads again has one side alone."""
    config = peft.LoraConfig(r=4, lora_alpha=8, ensure_weight_tying=True, target_modules=["c_attn", "wte", "lm_head"])
    model = gpt2()
    base = save_base(model, tmp_path / "base", torch.float32)
    adapted = peft.get_peft_model(model, config)
    fill(adapted, 5)
    adapted.save_pretrained(tmp_path / "adapter")
    assert [name for name in stored_names(tmp_path / "adapter") if "lm_head.lora" in name]
    receipt = loraformat.merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    assert "LF411" in {problem.code for problem in receipt.problems}
    assert "lm_head.weight" not in state_of(tmp_path / "merged")
    assert differ(tmp_path / "merged", adapted) < 1e-5
    plain = transformers.GPT2LMHeadModel.from_pretrained(base)
    assert differ(tmp_path / "merged", peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")) > 1e-3
