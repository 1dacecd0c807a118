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


def test_the_other_method_of_these_names_is_refused(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    model = RobertaModel(RobertaConfig(**SIZES))
    adapters.init(model)
    model.add_adapter("ia3", config=adapters.IA3Config())
    model.save_adapter(str(tmp_path / "ia3"), "ia3")
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.load(tmp_path / "ia3")
    assert caught.value.codes == ("LF209",)
