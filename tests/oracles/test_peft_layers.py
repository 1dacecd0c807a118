"""PEFT's `layer_replication`: the merged folder computes what the model of shared layers does, unmerged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import config_of, peft, torch, train, transformers

import loraformat

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

TOKENS = 40
SIZES = {"vocab_size": TOKENS, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
RUNS = [[0, 3], [1, 4]]
"""Six layers of four."""


def llama() -> Any:
    config = transformers.LlamaConfig(num_hidden_layers=4, num_key_value_heads=2, attention_bias=True, **SIZES)
    return transformers.LlamaForCausalLM(config)


def qwen() -> Any:
    """A family whose layers are of two types, which `layer_types` lists."""
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Qwen3Config(
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=6,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=types,
        tie_word_embeddings=True,
        **SIZES,
    )
    return transformers.Qwen3ForCausalLM(config)


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(num_hidden_layers=4, **SIZES))


def falcon() -> Any:
    config = transformers.FalconConfig(
        vocab_size=TOKENS, hidden_size=24, num_attention_heads=4, num_hidden_layers=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.FalconModel(config)


def compute(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(torch.arange(TOKENS).reshape(2, -1))[0].double().numpy()


CASES: dict[str, tuple[Callable[[], Any], list[str], int]] = {
    "llama": (llama, ["q_proj", "down_proj"], 2),
    "llama, biases": (llama, ["v_proj"], 2),
    "bert": (bert, ["query", "output.dense"], 3),
    "falcon": (falcon, ["query_key_value"], 1),
}
"""Model, target modules, and how many parameters of a layer change."""


@pytest.mark.parametrize("case", CASES)
def test_what_the_model_of_shared_layers_computes(case: str, tmp_path: Path) -> None:
    make, modules, changed = CASES[case]
    torch.manual_seed(3)
    more = {"lora_bias": True} if "biases" in case else {}
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=modules, layer_replication=RUNS, **more)
    trained = train(make(), config, tmp_path, reference=lambda model: {})
    receipt = loraformat.merge(trained.base, [trained.adapter], tmp_path / "merged", min_retained=0.0)
    assert len(receipt.weights) == 6 * changed
    assert "LF244" in {problem.code for problem in receipt.problems}
    assert config_of(tmp_path / "merged")["num_hidden_layers"] == 6
    merged = type(make()).from_pretrained(tmp_path / "merged", dtype=torch.float64)
    base = compute(type(make()).from_pretrained(trained.base, dtype=torch.float64))
    expected = compute(trained.model)
    assert np.abs(base - expected).max() > 1e-2
    np.testing.assert_allclose(compute(merged), expected, rtol=1e-5, atol=1e-5)
    assert not loraformat.verify(tmp_path / "merged", trained.base, [trained.adapter]).problems


def test_types_of_layers_go_with_them(tmp_path: Path) -> None:
    """PEFT leaves `layer_types` as they are, and its model of this family cannot run; its layers keep their types."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], layer_replication=RUNS)
    trained = train(qwen(), config, tmp_path, reference=lambda model: {})
    loraformat.merge(trained.base, [trained.adapter], tmp_path / "merged", min_retained=0.0)
    kinds = {"f": "full_attention", "s": "sliding_attention"}
    assert config_of(tmp_path / "merged")["layer_types"] == [kinds[each] for each in "fsfsfs"]
    layers = trained.model.base_model.model.model.layers
    assert [layer.self_attn.sliding_window is not None for layer in layers] == [each == "s" for each in "fsfsfs"]
    trained.model.base_model.model.config.layer_types = config_of(tmp_path / "merged")["layer_types"]
    merged = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    np.testing.assert_allclose(compute(merged), compute(trained.model), rtol=1e-5, atol=1e-5)


def test_a_base_that_was_saved_with_its_layers_repeated_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], layer_replication=RUNS)
    trained = train(llama(), config, tmp_path, reference=lambda model: {})
    repeated = trained.model.unload()
    state = {name: tensor.clone() for name, tensor in repeated.state_dict().items()}
    own = transformers.LlamaForCausalLM(repeated.config)
    own.load_state_dict(state)
    own.float().save_pretrained(tmp_path / "repeated")
    first = loraformat.merge(trained.base, [trained.adapter], tmp_path / "one", min_retained=0.0)
    second = loraformat.merge(tmp_path / "repeated", [trained.adapter], tmp_path / "two", min_retained=0.0)
    assert "LF244" not in {problem.code for problem in second.problems}
    assert [weight.name for weight in first.weights] == [weight.name for weight in second.weights]
    one, two = (transformers.LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
