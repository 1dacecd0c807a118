"""AdapterHub's own library: what it merges is what we read of its folders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat

torch = pytest.importorskip("torch", reason="needs torch")
adapters = pytest.importorskip("adapters", reason="needs adapters, in an environment of its own")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}


def make_model(**lora: Any) -> Any:
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    model = RobertaModel(RobertaConfig(**SIZES)).eval()
    adapters.init(model)
    model.add_adapter("sst2", config=adapters.LoRAConfig(**({"r": 3, "alpha": 6, "intermediate_lora": True} | lora)))
    model.set_active_adapters("sst2")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("lora", [{}, {"r": 4, "alpha": 16, "attn_matrices": ["q", "k", "v"], "output_lora": True}])
def test_we_read_what_it_merges(tmp_path: Path, lora: dict[str, Any]) -> None:
    model = make_model(**lora)
    model.save_adapter(str(tmp_path / "hub"), "sst2")
    before = {name: tensor.double().numpy().copy() for name, tensor in model.state_dict().items()}
    model.merge_adapter("sst2")
    after = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    adapter = loraformat.load(tmp_path / "hub")
    assert adapter.scheme == "adapterhub"
    assert {f"{target.name}.weight" for target in adapter.targets} == changed
    for target in adapter.targets:
        a, b = (target.factors[f"lora_{letter}.weight"].read().astype(np.float64) for letter in "AB")
        change = after[f"{target.name}.weight"] - before[f"{target.name}.weight"]
        np.testing.assert_allclose(target.scale * b @ a, change, atol=1e-5)


def test_ia3_is_what_its_layers_compute(tmp_path: Path) -> None:
    """The library's own merge leaves the bias, which its layer multiplies."""
    model = make_model()
    model.add_adapter("ia3", config=adapters.IA3Config())
    model.set_active_adapters("ia3")
    for name, parameter in model.named_parameters():
        if ".loras.ia3." in name:
            torch.nn.init.normal_(parameter, 1, 0.3)
        elif name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    model.save_adapter(str(tmp_path / "ia3"), "ia3")
    adapter = loraformat.load(tmp_path / "ia3")
    assert {target.kind for target in adapter.targets} == {"ia3"}
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        want = model(ids).last_hidden_state
        model.set_active_adapters(None)
        names = {f"{target.name}.{part}" for target in adapter.targets for part in ("weight", "bias")}
        state = {name: each for name, each in model.state_dict().items() if name in names}
        merged = loraformat.merge_state_dict(state, tmp_path / "ia3").tensors
        model.load_state_dict(merged, strict=False)
        got = model(ids).last_hidden_state
    assert (got - want).abs().max() < 1e-5


def test_one_of_several_in_a_state_dict(tmp_path: Path) -> None:
    model = make_model()
    model.add_adapter("other", config=adapters.LoRAConfig(r=3, alpha=6))
    both = {name: each for name, each in model.state_dict().items() if ".loras." in name}
    model.save_adapter(str(tmp_path / "hub"), "sst2")
    torch.save(both, tmp_path / "hub" / "pytorch_adapter.bin")
    (tmp_path / "hub" / "adapter.safetensors").unlink(missing_ok=True)
    adapter = loraformat.load(f"{tmp_path / 'hub'}#sst2")
    for target in adapter.targets:
        own = both[f"{target.name}.loras.sst2.lora_A"].numpy()
        assert np.array_equal(target.factors["lora_A.weight"].read(), own)


def test_a_fused_weight_of_gpt2(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_embd=24, n_layer=1, n_head=4, vocab_size=40, n_positions=40))
    adapters.init(model)
    model.add_adapter("x", config=adapters.LoRAConfig(r=3, alpha=6, attn_matrices=["q", "v"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_adapter(str(tmp_path / "hub"), "x")
    weight = next(each for name, each in model.state_dict().items() if name.endswith("c_attn.weight")).clone()
    model.merge_adapter("x")
    merged = next(each for name, each in model.state_dict().items() if name.endswith("c_attn.weight"))
    change = (merged - weight).numpy()
    (target,) = (each for each in loraformat.load(tmp_path / "hub").targets if each.name.endswith("c_attn"))
    ours = target.scale * target.factors["lora_B.weight"].read() @ target.factors["lora_A.weight"].read()
    assert np.abs(ours.T - change).max() < 1e-5
