"""litgpt computes with what we write what PEFT computes, and PEFT with what litgpt saved."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("litgpt", reason="needs litgpt, in an environment of its own")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

import decoder_zoo as zoo  # noqa: E402

CONFIG: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 4,
    "n_query_groups": 2,
    "n_embd": 24,
    "head_size": 10,
    "intermediate_size": 28,
    "vocab_size": 40,
    "padded_vocab_size": 40,
    "block_size": 64,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "norm_eps": 1e-6,
    "mlp_class_name": "LLaMAMLP",
}
PARTS = {
    "all": {},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "k alone, and the MLP": {"target_modules": ["k_proj", "gate_proj", "up_proj", "down_proj"]},
    "one block": {"layers_to_transform": [1]},
    "ranks of their own": {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 24}},
}


def make_litgpt(model: Any, lora: dict[str, Any]) -> Any:
    """Return litgpt's model with LoRA layers and the weights of transformers' model, as its own script copies them."""
    from litgpt.lora import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

    twin = GPT(Config(**CONFIG, **lora)).eval()
    weights: dict[str, Any] = {}
    copy_weights_hf_llama(twin.config, {}, weights, dict(model.state_dict()))
    twin.load_state_dict(weights, strict=False)
    return twin


def logits(twin: Any) -> Any:
    with torch.no_grad():
        return twin(torch.tensor([zoo.TOKENS]))[0].double().numpy()


@pytest.mark.parametrize("name", PARTS)
def test_litgpt_computes_what_peft_computes(tmp_path: Path, name: str) -> None:
    import yaml

    model = zoo.make_model("llama")
    config = zoo.save_config(model, tmp_path / "base")
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain = zoo.logits(model, zoo.TOKENS)
    adapted = zoo.make_adapter(model, tmp_path / "peft", **PARTS[name])
    done = loraformat.convert(tmp_path / "peft", "litgpt", tmp_path / "lit", base=config, verify=True)
    assert done.proof is not None
    assert done.proof.relative < 1e-7
    settings = yaml.safe_load((tmp_path / "lit" / "hyperparameters.yaml").read_text())
    lora = {key: value for key, value in settings.items() if key.startswith("lora_")}
    stored = torch.load(tmp_path / "lit" / "lit_model.pth.lora", weights_only=True)["model"]
    twin = make_litgpt(zoo_with(weights), lora)
    wanted = {key for key in twin.state_dict() if "lora_" in key}
    assert set(stored) == wanted, "merge_lora loads strictly"
    missing, unexpected = twin.load_state_dict(stored, strict=False)
    assert not unexpected
    assert not [key for key in missing if "lora_" in key]
    expected = zoo.logits(adapted, zoo.TOKENS)
    assert np.abs(expected - plain).max() > 0.01
    np.testing.assert_allclose(logits(twin), expected, atol=2e-4, rtol=2e-4)


def zoo_with(weights: dict[str, Any]) -> Any:
    """Return a plain model with these weights; PEFT has put its layers into the other."""
    model = zoo.make_model("llama")
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("parts", [(True, False, True), (True, True, True), (False, True, False)])
def test_peft_computes_what_litgpt_computes(tmp_path: Path, parts: tuple[bool, bool, bool]) -> None:
    import yaml
    from litgpt.lora import lora_filter
    from peft import PeftModel

    flags = dict(zip(("lora_query", "lora_key", "lora_value"), parts, strict=True))
    lora = {"lora_r": 3, "lora_alpha": 12, "lora_projection": True, "lora_mlp": True, "lora_head": True, **flags}
    model = zoo.make_model("llama")
    config = zoo.save_config(model, tmp_path / "base")
    twin = make_litgpt(model, lora)
    torch.manual_seed(3)
    for key, parameter in twin.named_parameters():
        if "lora_" in key:
            parameter.data = 0.2 * torch.randn_like(parameter)
    folder = tmp_path / "lit"
    folder.mkdir()
    state = {key: value for key, value in twin.state_dict().items() if lora_filter(key, value)}
    torch.save({"model": state}, folder / "lit_model.pth.lora")
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({**lora, "train": {"epochs": 1}}))
    (folder / "model_config.yaml").write_text(yaml.safe_dump(CONFIG))
    loraformat.convert(folder, "peft", tmp_path / "peft", base=config, verify=True)
    expected = logits(twin)
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "peft")).eval()
    np.testing.assert_allclose(zoo.logits(adapted, zoo.TOKENS), expected, atol=2e-4, rtol=2e-4)
    loraformat.convert(tmp_path / "peft", "litgpt", tmp_path / "back", base=config, verify=True)
    back = torch.load(tmp_path / "back" / "lit_model.pth.lora", weights_only=True)["model"]
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
