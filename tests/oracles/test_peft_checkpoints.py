"""Everything that a PEFT adapter holds, merged into checkpoints, beside PEFT's own merge in float64."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    assert_merged,
    changed_names,
    config_of,
    merge,
    peft,
    state_of,
    stored_names,
    torch,
    train,
    transformers,
)

import loraformat

pytestmark = pytest.mark.oracle

FORMS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LINEAR = ["q_proj", "v_proj", "down_proj"]
OLD, NEW = 40, 46


def llama(*, tied: bool = False, biased: bool = False) -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=OLD,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=biased,
        mlp_bias=biased,
        initializer_range=0.1,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape) * 0.1
    return model


def resize(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(NEW, mean_resizing=False)
        model.get_input_embeddings().weight.data[OLD:] = torch.randn(NEW - OLD, 48) * 0.1
        if not model.config.tie_word_embeddings:
            model.get_output_embeddings().weight.data[OLD:] = torch.randn(NEW - OLD, 48) * 0.1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["plain", "rslora", "patterns", "embedding", "head"])
def test_factors(tmp_path: Path, form: str, case: str) -> None:
    fields: dict[str, dict[str, Any]] = {
        "plain": {"target_modules": LINEAR},
        "rslora": {"target_modules": LINEAR, "use_rslora": True},
        "patterns": {
            "target_modules": LINEAR,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"down_proj": 9, "v_proj": 2},
        },
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "head": {"target_modules": ["lm_head", "embed_tokens"]},
    }
    config = peft.LoraConfig(r=4, lora_alpha=8, **fields[case])
    trained = train(llama(), config, tmp_path, form=FORMS[form])
    found, _ = merge(trained, tmp_path / "merged")
    assert_merged(found, trained, form=form)
    assert changed_names(trained, found)


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_of_the_factors(tmp_path: Path, form: str) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, lora_bias=True)
    trained = train(llama(biased=True), config, tmp_path, form=FORMS[form])
    found, receipt = merge(trained, tmp_path / "merged")
    assert_merged(found, trained, form=form)
    assert "model.layers.0.self_attn.q_proj.bias" in changed_names(trained, found)
    assert receipt.problems == ()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_trained_biases(tmp_path: Path, form: str, bias: Any, lora_bias: bool) -> None:
    """A trained bias is the base's own, and what the factors' bias adds comes on top of it."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, bias=bias, lora_bias=lora_bias)
    trained = train(llama(biased=True), config, tmp_path, form=FORMS[form])
    found, _ = merge(trained, tmp_path / "merged")
    assert_merged(found, trained, form=form)
    changed = changed_names(trained, found)
    assert "model.layers.0.self_attn.q_proj.bias" in changed
    assert ("model.layers.0.self_attn.o_proj.bias" in changed) == (bias == "all")


def test_a_bias_that_the_base_lacks(tmp_path: Path) -> None:
    """PEFT itself refuses it; the reference is its forward pass of the same factors onto biases of zero."""
    biased = llama(biased=True)
    for name, parameter in biased.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    bare = llama()
    bare.load_state_dict(biased.state_dict(), strict=False)
    bare.save_pretrained(tmp_path / "bare")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], lora_bias=True)
    trained = train(biased, config, tmp_path / "biased")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(tmp_path / "bare", [trained.adapter], tmp_path / "out")
    assert set(caught.value.codes) == {"LF401"}
    assert "--new-biases" in caught.value.problems[0].advice
    receipt = loraformat.merge(tmp_path / "bare", [trained.adapter], tmp_path / "out", new_biases=True)
    assert [problem.code for problem in receipt.problems] == ["LF415"]
    found = state_of(tmp_path / "out")
    assert_merged(found, trained)
    assert config_of(tmp_path / "out")["attention_bias"] is True
    assert "model.layers.1.self_attn.o_proj.bias" in found
    assert not any(name.endswith("mlp.down_proj.bias") for name in found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case",
    ["resized", "resized and adapted", "resized and trained", "resized and tokens", "tokens", "own type", "two tables"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_tables_of_tokens(tmp_path: Path, form: str, case: str, tied: bool) -> None:
    resized = case.startswith("resized")
    fields: dict[str, dict[str, Any]] = {
        "resized": {"target_modules": ["q_proj"]},
        "resized and adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        "resized and trained": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        "resized and tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [OLD + 1, OLD, 3]},
        "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 2, 39]},
        "two tables": {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [7], "lm_head": [3, 1]},
        },
    }
    if case == "own type":
        config: Any = peft.TrainableTokensConfig(token_indices=[7, 2, 39])
    else:
        config = peft.LoraConfig(r=4, lora_alpha=8, **fields[case])
    apart = tied and case in ("two tables", "resized and adapted", "resized and trained")
    saving = {"save_embedding_layers": True} if resized else {}
    trained = train(
        llama(tied=tied),
        config,
        tmp_path,
        form=FORMS[form],
        prepare=resize if resized else lambda model: None,
        reference=merge_apart if apart else None,
        **saving,
    )
    if apart:
        with pytest.raises(loraformat.LoraformatError) as caught:
            merge(trained, tmp_path / "refused")
        assert "LF402" in caught.value.codes
        assert "--untie" in caught.value.problems[0].advice
    found, receipt = merge(trained, tmp_path / "merged", untie=apart)
    assert_merged(found, trained, form=form)
    assert "model.embed_tokens.weight" in changed_names(trained, found)
    assert ("lm_head.weight" in found) == (apart or not tied)
    written = config_of(tmp_path / "merged")
    assert written["vocab_size"] == (NEW if resized else OLD)
    assert written["tie_word_embeddings"] is (tied and not apart)
    assert load_and_run(tmp_path / "merged", trained, form)
    assert not [problem for problem in receipt.problems if problem.severity == "error"]


def merge_apart(adapted: Any) -> dict[str, Any]:
    """Return what PEFT's forward pass computes with: its own merge writes both changes into the one tied table."""
    model = adapted.base_model.model
    effective = {
        name: layer_weight(module)
        for name, module in (("model.embed_tokens", model.model.embed_tokens), ("lm_head", model.lm_head))
    }
    merged = adapted.merge_and_unload()
    state = {name: value.detach().double().numpy().copy() for name, value in merged.state_dict().items()}
    return state | {f"{name}.weight": value for name, value in effective.items()}


def layer_weight(module: Any) -> Any:
    """Return the weight that a wrapped table acts with, from its own tensors."""
    if hasattr(module, "token_adapter"):
        layer = module.token_adapter
        weight = layer.get_base_layer().weight.detach().double().clone()
        weight[layer.token_indices["default"]] = layer.trainable_tokens_delta["default"].detach().double()
    elif hasattr(module, "modules_to_save"):
        weight = module.modules_to_save["default"].weight.detach().double().clone()
    else:
        weight = module.get_base_layer().weight.detach().double() + module.get_delta_weight("default").detach().double()
    return weight.numpy()


def load_and_run(folder: Path, trained: Any, form: str) -> bool:
    """Load the merged folder with transformers, and compare its logits with those of the PEFT model, unmerged."""
    merged = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    size = min(merged.config.vocab_size, NEW)
    tokens = torch.arange(size).reshape(1, -1)
    with torch.no_grad():
        found, expected = merged(tokens).logits, trained.model.eval()(tokens).logits
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= (1e-4 if form == "float32" else 0.1) * scale
    return True


@pytest.mark.parametrize("case", ["embed_tokens", "lm_head", "saved embed_tokens", "saved lm_head"])
def test_one_side_of_tied_tables(tmp_path: Path, case: str) -> None:
    """Refused, or two tables: what PEFT computes before it merges."""
    saved, name = case.startswith("saved"), case.removeprefix("saved ")
    fields = (
        {"target_modules": ["q_proj"], "modules_to_save": [name]} if saved else {"target_modules": ["q_proj", name]}
    )
    model = llama(tied=True)
    original = model.lm_head.weight.detach().double().numpy().copy()

    def reference(adapted: Any) -> dict[str, Any]:
        inner = adapted.base_model.model
        module = inner.lm_head if name == "lm_head" else inner.model.embed_tokens
        changed = layer_weight(module)
        state = {
            key: value.detach().double().numpy().copy()
            for key, value in adapted.merge_and_unload().state_dict().items()
        }
        tables = {"lm_head.weight": original, "model.embed_tokens.weight": original}
        return state | tables | {("lm_head.weight" if name == "lm_head" else "model.embed_tokens.weight"): changed}

    config = peft.LoraConfig(r=4, lora_alpha=8, **fields)
    trained = train(model, config, tmp_path, reference=reference, save_embedding_layers=False)
    with pytest.raises(loraformat.LoraformatError) as caught:
        merge(trained, tmp_path / "refused")
    assert set(caught.value.codes) == {"LF402"}
    found, _ = merge(trained, tmp_path / "merged", untie=True)
    assert_merged(found, trained)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(found)
    assert config_of(tmp_path / "merged")["tie_word_embeddings"] is False
    assert load_and_run(tmp_path / "merged", trained, "float32")


def test_factors_of_tied_tables_that_were_trained_as_one(tmp_path: Path) -> None:
    """PEFT saves them on both sides, transposed; its merge adds both, W + 2Δ, its forward pass each once."""
    model = llama(tied=True)

    def reference(adapted: Any) -> dict[str, Any]:
        effective = layer_weight(adapted.base_model.model.model.embed_tokens)
        state = {
            key: value.detach().double().numpy().copy()
            for key, value in adapted.merge_and_unload().state_dict().items()
        }
        return state | {"model.embed_tokens.weight": effective, "lm_head.weight": effective}

    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    trained = train(model, config, tmp_path, reference=reference)
    assert "base_model.model.lm_head.lora_A.weight" in stored_names(trained.adapter)
    found, receipt = merge(trained, tmp_path / "merged")
    assert_merged(found, trained)
    assert "lm_head.weight" not in found
    assert {problem.code for problem in receipt.problems} == {"LF411"}
    assert load_and_run(tmp_path / "merged", trained, "float32")


def test_trained_tokens_half_way(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], trainable_token_indices=[7, 2])
    trained = train(llama(), config, tmp_path)
    loraformat.merge(trained.base, [(trained.adapter, 0.25)], tmp_path / "merged")
    before, after = state_of(trained.base), state_of(tmp_path / "merged")
    name = "model.embed_tokens.weight"
    expected = before[name] + 0.25 * (trained.merged[name] - before[name])
    np.testing.assert_allclose(after[name], expected, rtol=0, atol=1e-7)
    assert (after[name] != before[name]).any(axis=1).sum() == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_changed_the_base(tmp_path: Path, init: str) -> None:
    """Refused as it is; converted by PEFT, it is LoRA of twice the rank on the base as it was."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=LINEAR, init_lora_weights=init)
    adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "initial")
    adapted.peft_config["default"].init_lora_weights = init
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.01
    adapted.save_pretrained(tmp_path / "raw")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(tmp_path / "base", [tmp_path / "raw"], tmp_path / "refused")
    assert caught.value.codes == ("LF215",)
    assert "path_initial_model_for_weight_conversion" in caught.value.problems[0].advice
    adapted.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    loraformat.merge(tmp_path / "base", [tmp_path / "converted"], tmp_path / "merged")
    found, before = state_of(tmp_path / "merged"), state_of(tmp_path / "base")
    expected = {name: value.double().numpy() for name, value in adapted.merge_and_unload().state_dict().items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.abs(expected[name] - before[name]).max() > 1e-3
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=2e-6)
