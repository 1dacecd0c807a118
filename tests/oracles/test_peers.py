"""Where a peer's own merge is not what it computed in training, or two peers read one set of tensors differently.

`docs/peers.md` lists the differences and what is done about them. Each test shows that the difference is there, and on
which side of it our merge is.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

import loraformat
from builders import MemoryFactor, write_peft, write_tensors
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target
from loraformat.containers.safetensors import CONTAINER
from loraformat.strict_json import JsonValue

if TYPE_CHECKING:
    from torch import nn

pytestmark = pytest.mark.oracle
for _package in ("torch", "lycoris", "peft"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")


def merge(folder: Path, base: dict[str, NDArray[Any]], target: Target) -> dict[str, NDArray[Any]]:
    path = write_tensors(folder / "base.safetensors", base)
    receipt = loraformat.merge(path, [Adapter((target,))], folder / "merged.safetensors")
    return {name: tensor.read() for name, tensor in CONTAINER.open(Path(receipt.output)).tensors.items()}


def make_target(
    kind: str, slot: SlotKind, arrays: dict[str, Any], rank: int = 0, alpha: float = 1.0, **options: JsonValue
) -> Target:
    factors = {role: MemoryFactor(role, np.ascontiguousarray(array)) for role, array in arrays.items()}
    rule = ScalingRule.ALPHA_OVER_RANK if rank else ScalingRule.MULTIPLIER
    return Target("m", kind, slot, factors, rank, Scaling(rule, alpha), options=options)


def train(module: "nn.Module") -> dict[str, NDArray[Any]]:
    """Give a LyCORIS module random numbers and return what it saves."""
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter) if parameter.requires_grad else 0
    return {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(("file", "name"), [("loha", "LohaModule"), ("lokr", "LokrModule")])
def test_lycoris_merges_with_the_square_of_the_scale(tmp_path: Path, file: str, name: str) -> None:
    """alpha/rank is 2, so that the package's merge adds twice what its layer does."""
    from importlib import import_module

    import torch
    from torch import nn

    torch.manual_seed(0)
    layer = nn.Linear(20, 16, bias=False).double()
    rank = 2
    settings = {"lora_dim": rank, "alpha": 2 * rank} | ({"factor": 2} if file == "lokr" else {})
    module = getattr(import_module(f"lycoris.modules.{file}"), name)("m", layer, 1.0, **settings).double()
    saved = train(module)
    weight = layer.weight.detach().numpy().copy()
    peer = module.get_merged_weight(1, layer.weight.shape)[0].detach().numpy() - weight
    module.apply_to()
    trained = module.eval()(torch.eye(20, dtype=torch.float64)).detach().numpy().T - weight
    factors = {role: array for role, array in saved.items() if role != "alpha"}
    target = make_target(file, SlotKind.LINEAR, factors, rank, float(saved["alpha"]))
    ours = merge(tmp_path, {"m.weight": weight}, target)["m.weight"] - weight
    np.testing.assert_allclose(peer, 2 * trained, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(ours, trained, rtol=1e-6, atol=1e-9)
    assert np.abs(trained).max() > 0.1


def test_lycoris_ia3_scales_the_bias_only_where_it_bypasses(tmp_path: Path) -> None:
    import torch
    from lycoris.modules.ia3 import IA3Module
    from torch import nn

    torch.manual_seed(0)
    inputs = torch.randn(3, 6, dtype=torch.float64)
    outputs: dict[bool, Any] = {}
    for bypass in (False, True):
        torch.manual_seed(1)
        layer = nn.Linear(6, 4).double()
        weight, bias = (parameter.detach().numpy().copy() for parameter in (layer.weight, layer.bias))
        module = IA3Module("m", layer, 1.0, bypass_mode=bypass).double()
        saved = train(module)
        module.apply_to()
        outputs[bypass] = module.eval()(inputs).detach().numpy()
    target = make_target("lycoris_ia3", SlotKind.LINEAR, {"weight": saved["weight"]}, on_input=False)
    merged = merge(tmp_path, {"m.weight": weight, "m.bias": bias}, target)
    ours = inputs.numpy() @ merged["m.weight"].T + merged["m.bias"]
    np.testing.assert_allclose(ours, outputs[False], rtol=1e-9)
    np.testing.assert_allclose(
        outputs[True] - outputs[False], np.broadcast_to(saved["weight"] * bias, (3, 4)), rtol=1e-6
    )


def test_peft_rounds_twice_when_it_merges_safely(tmp_path: Path) -> None:
    """A base in bfloat16: the change is rounded to it, and then the sum."""
    import ml_dtypes
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.Linear(24, 32, bias=False)

        def forward(self, x: Any) -> Any:
            return self.m(x)

    torch.manual_seed(0)
    plain = Model()
    weight = plain.m.weight.detach().to(torch.bfloat16)
    down, up = torch.randn(4, 24), torch.randn(32, 4)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["m"])
    model = get_peft_model(Model().to(torch.bfloat16), config)
    layer = model.base_model.model.m
    with torch.no_grad():
        layer.base_layer.weight.copy_(weight)
        layer.lora_A["default"].weight.copy_(down)
        layer.lora_B["default"].weight.copy_(up)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert isinstance(model, PeftModel)
    peer = model.merge_and_unload(safe_merge=True).m.weight.detach().float().numpy()

    wide = weight.double() + up.double() @ down.double()
    rounded = wide.numpy().astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    base = write_tensors(tmp_path / "b.safetensors", {"m.weight": weight.float().numpy().astype(ml_dtypes.bfloat16)})
    adapter = write_peft(tmp_path / "a", {"m": (down.numpy(), up.numpy())}, r=4, alpha=4)
    receipt = loraformat.merge(base, [adapter], tmp_path / "merged.safetensors")
    ours = CONTAINER.open(Path(receipt.output)).tensors["m.weight"].read().astype(np.float32)
    assert np.count_nonzero(ours != rounded) == 0
    assert np.count_nonzero(peer != rounded) > 50


def test_lokr_of_a_conv1d_is_multiplied_in_two_ways(tmp_path: Path) -> None:
    """torch.kron adds axes in front, which is PEFT's way; LyCORIS gives w1 an axis behind first."""
    import torch

    torch.manual_seed(0)
    left, right = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 5, 2, dtype=torch.float64)
    weight = torch.randn(8, 15, 2, dtype=torch.float64)
    lycoris = torch.kron(left.unsqueeze(-1), right)
    peft = torch.kron(left, right).reshape(weight.shape)
    assert not torch.equal(peft, lycoris)
    factors = {"lokr_w1": left.numpy(), "lokr_w2": right.numpy()}
    for axes, change in (("trailing", lycoris), ("leading", peft)):
        folder = tmp_path / axes
        folder.mkdir()
        target = make_target("lokr", SlotKind.CONV, factors, kron_axes=axes)
        found = merge(folder, {"m.weight": weight.numpy()}, target)["m.weight"]
        np.testing.assert_allclose(found, (weight + change).numpy(), rtol=1e-12)


def make_tied(folder: Path, **fields: Any) -> "tuple[Any, Any, Any]":
    """Return PEFT's model of a Llama with tied tables, its tokens, and what it computes; base and adapter are saved."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **fields)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        tokens = torch.tensor([[1, 4, 9, 2]])
        trained = adapted(tokens).logits
    adapted.save_pretrained(folder / "adapter")
    return adapted, tokens, trained


@pytest.mark.filterwarnings("ignore")
def test_peft_adds_the_change_of_tied_tables_twice(tmp_path: Path) -> None:
    """With `ensure_weight_tying` both tables have one change, and PEFT merges it into the one weight once for each."""
    import torch
    from transformers import LlamaForCausalLM

    fields = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    adapted, tokens, trained = make_tied(tmp_path, **fields)
    base = adapted.base_model.model.model.embed_tokens.base_layer.weight.detach().clone()
    loraformat.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours")
    theirs = adapted.merge_and_unload()
    with torch.no_grad():
        plain = LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
        found, other = plain(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-5)
    assert float((other - trained).abs().max()) > 0.1
    once, twice = (each.model.embed_tokens.weight.detach() - base for each in (plain, theirs))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_peft_changes_a_tied_table_that_nobody_trained(tmp_path: Path) -> None:
    """LoRA of the head alone: PEFT's merge changes the embedding too; ours parts them where the user asks for it."""
    import torch
    from transformers import LlamaForCausalLM

    adapted, tokens, trained = make_tied(tmp_path, target_modules=["lm_head"])
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "refused")
    assert "LF402" in caught.value.codes
    loraformat.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours", untie=True)
    theirs = adapted.merge_and_unload()
    with torch.no_grad():
        plain = LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
        found, other = plain(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-5)
    assert float((other - trained).abs().max()) > 0.1
