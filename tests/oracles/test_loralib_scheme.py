"""loralib's own layers: what they merge is what we read, and they load what we write."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from loraformat.adapter import SlotKind

torch = pytest.importorskip("torch", reason="needs torch")
lora = pytest.importorskip("loralib", reason="needs loralib")
pytestmark = pytest.mark.oracle

LAYERS = {
    "encoder.layer.0.query": lambda: lora.Linear(7, 10, r=3, lora_alpha=6),
    "encoder.layer.1.value": lambda: lora.Linear(7, 4, r=3, lora_alpha=6),
    "transformer.h.0.attn.c_attn": lambda: lora.MergedLinear(
        8, 24, r=3, lora_alpha=6, enable_lora=[True, False, True], fan_in_fan_out=True
    ),
    "encoder.layer.2.qkv": lambda: lora.MergedLinear(8, 24, r=3, lora_alpha=6, enable_lora=[True] * 3),
    "model.embed_tokens": lambda: lora.Embedding(9, 6, r=3, lora_alpha=6),
}
"""Not square, and with the one alpha that a user would state."""


class Model(torch.nn.Module):  # type: ignore[name-defined, misc]
    def __init__(self, names: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            layer = LAYERS[name]()
            for key, parameter in layer.named_parameters():
                if "lora_" in key:
                    torch.nn.init.normal_(parameter)
            *parents, last = name.split(".")
            owner: Any = self
            for each in parents:
                if not hasattr(owner, each):
                    owner.add_module(each, torch.nn.Module())
                owner = getattr(owner, each)
            owner.add_module(last, layer)


def merged_change(model: Any, name: str) -> Any:
    """Return the change that the library itself merges in eval mode, as the weight is stored."""
    layer = model.get_submodule(name)
    before = layer.weight.detach().double().numpy().copy()
    layer.train()
    layer.eval()
    return layer.weight.detach().double().numpy() - before


def change_of(target: Any) -> Any:
    roles = (
        ("lora_embedding_A", "lora_embedding_B")
        if target.slot is SlotKind.EMBEDDING
        else ("lora_A.weight", "lora_B.weight")
    )
    a, b = (target.factors[role].read().astype(np.float64) for role in roles)
    change = target.scale * b @ a
    return change.T if target.slot in (SlotKind.EMBEDDING, SlotKind.LINEAR_TRANSPOSED) else change


@pytest.mark.parametrize("name", LAYERS)
def test_we_read_what_it_merges(tmp_path: Path, name: str) -> None:
    model = Model([name])
    torch.save(lora.lora_state_dict(model), tmp_path / "lora.pt")
    (target,) = loraformat.load(tmp_path / "lora.pt", alpha=6).targets
    assert target.name == name
    expected = merged_change(model, name)
    np.testing.assert_allclose(change_of(target), expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_it_loads_what_we_write(tmp_path: Path) -> None:
    names = ["encoder.layer.0.query", "encoder.layer.1.value", "model.embed_tokens"]
    model = Model(names)
    torch.save(lora.lora_state_dict(model), tmp_path / "lora.pt")
    loraformat.convert(tmp_path / "lora.pt", "peft", tmp_path / "peft", alpha=6, verify=True)
    done = loraformat.convert(tmp_path / "peft", "loralib", tmp_path / "back.pt", verify=True)
    assert [problem.code for problem in done.problems if problem.severity == "warning"] == ["LF345"]
    stored = torch.load(tmp_path / "back.pt", weights_only=True)
    source = lora.lora_state_dict(model)
    assert set(stored) == set(source)
    assert all(torch.equal(stored[name], source[name]) for name in source)
    model.load_state_dict(stored, strict=False)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_a_convolution_is_known_by_the_base(tmp_path: Path, size: int, groups: int) -> None:
    """Of the file alone its factors are those of a linear layer."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(size)
    layer = lora.Conv2d(4, 6, size, groups=groups, r=3, lora_alpha=6, merge_weights=False).double()
    model = torch.nn.ModuleDict({"stem": layer})
    save_file(
        {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name},
        tmp_path / "base.safetensors",
    )
    images = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        before = layer(images)
        for factor in (layer.lora_A, layer.lora_B):
            torch.nn.init.normal_(factor)
        expected = layer(images)
        torch.save(lora.lora_state_dict(model), tmp_path / "lora.pt")
        loraformat.merge(tmp_path / "base.safetensors", [tmp_path / "lora.pt"], tmp_path / "m.safetensors", alpha=6)
        layer.conv.weight.copy_(load_file(tmp_path / "m.safetensors")["stem.conv.weight"])
        found = layer.conv(images)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_bitfit_of_the_same_repository(tmp_path: Path) -> None:
    """examples/NLU trains biases and the classifier with `apply_bitfit`, and saves what was trained."""
    from safetensors.torch import load_file, save_file

    transformers = pytest.importorskip("transformers", reason="the model is one of transformers")
    torch.manual_seed(3)
    config = transformers.RobertaConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=36, num_labels=3
    )
    model = transformers.RobertaForSequenceClassification(config).eval()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "base.safetensors")
    tokens = torch.randint(3, 40, (2, 9))
    with torch.no_grad():
        before = model(tokens).logits
        trained = {n: p for n, p in model.named_parameters() if "bias" in n or "classifier" in n}
        for parameter in trained.values():
            parameter += 0.3 * torch.randn_like(parameter)
        expected = model(tokens).logits
        torch.save({name: parameter.data for name, parameter in trained.items()}, tmp_path / "bitfit.bin")
        loraformat.merge(tmp_path / "base.safetensors", [tmp_path / "bitfit.bin"], tmp_path / "merged.safetensors")
        plain = transformers.RobertaForSequenceClassification(config).eval()
        plain.load_state_dict(load_file(tmp_path / "merged.safetensors"))
        found = plain(tokens).logits
    assert (expected - before).abs().max() > 0.05
    assert torch.equal(found, expected)
