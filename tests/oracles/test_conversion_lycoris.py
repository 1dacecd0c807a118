"""LyCORIS' files as folders of PEFT: both packages make the same change of each layer, and the way back is exact."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import loraformat

if TYPE_CHECKING:
    from torch import nn

pytestmark = pytest.mark.oracle
for _package in ("torch", "lycoris", "peft"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
PLACES = {
    f"{BLOCK}.attn1.to_q": ("Linear", (20, 48)),
    f"{BLOCK}.ff.net.2": ("Linear", (24, 36)),
    "down_blocks.0.resnets.0.conv1": ("Conv2d", (24, 16, 3)),
    "down_blocks.0.resnets.0.conv_shortcut": ("Conv2d", (24, 16, 1)),
}
"""Module of Stable Diffusion 1 to the layer that stands there: its class and sizes, the inputs first."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "loha": {"network_module": "loha", "lora_dim": 3, "alpha": 2.0},
    "loha with cores": {"network_module": "loha", "lora_dim": 3, "alpha": 2.0, "use_tucker": True},
    "lokr": {"network_module": "lokr", "lora_dim": 2, "alpha": 1.0},
    "lokr by a factor": {"network_module": "lokr", "lora_dim": 2, "alpha": 1.0, "factor": 4},
    "lokr of two products": {"network_module": "lokr", "lora_dim": 1, "alpha": 0.5, "decompose_both": True},
    "lokr of whole factors": {"network_module": "lokr", "lora_dim": 10000, "alpha": 1.0},
}


def build() -> "nn.Module":
    import torch
    from torch import nn

    torch.manual_seed(4)
    model = nn.Module()
    for path, (kind, sizes) in PLACES.items():
        owner: Any = model
        *parents, last = path.split(".")
        for name in parents:
            if not hasattr(owner, name):
                owner.add_module(name, nn.Module())
            owner = getattr(owner, name)
        owner.add_module(last, getattr(nn, kind)(*sizes, bias=False))
    return model


def train(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Save a network of LyCORIS with random numbers under kohya's names; return its change of each layer."""
    import torch
    from lycoris.wrapper import LycorisNetwork

    options = dict(settings)
    dim, alpha = options["lora_dim"], options["alpha"]
    before = {name: getattr(LycorisNetwork, name) for name in ("LORA_PREFIX", "TARGET_REPLACE_MODULE")}
    LycorisNetwork.apply_preset({"lora_prefix": "lora_unet"})
    try:
        network = LycorisNetwork(build(), conv_lora_dim=dim, conv_alpha=alpha, **options)
    finally:
        for name, value in before.items():
            setattr(LycorisNetwork, name, value)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    network.save_weights(str(path), None, {})
    flat = {name.replace(".", "_"): name for name in PLACES}
    return {
        flat[each.lora_name.removeprefix("lora_unet_")]: each.get_weight(each.shape).detach() for each in network.loras
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_makes_the_change_that_lycoris_makes(tmp_path: Path, name: str) -> None:
    import torch
    from peft import PeftModel
    from safetensors.numpy import load_file

    source = tmp_path / "lycoris.safetensors"
    changes = train(source, SETTINGS[name])
    assert set(changes) == set(PLACES)
    loraformat.convert(source, "peft", tmp_path / "peft", verify=True)
    model = PeftModel.from_pretrained(build(), tmp_path / "peft")
    layers = dict(model.base_model.model.named_modules())
    for path, change in changes.items():
        found = layers[path].get_delta_weight("default").detach()
        assert change.abs().max() > 0.01
        torch.testing.assert_close(found, change.reshape(found.shape), rtol=2e-5, atol=1e-6)
    loraformat.convert(tmp_path / "peft", "kohya", tmp_path / "again.safetensors", verify=True)
    first, last = (load_file(path) for path in (source, tmp_path / "again.safetensors"))
    assert set(first) == set(last)
    assert all(np.array_equal(first[key], last[key]) for key in first)


def test_sides_are_those_of_peft() -> None:
    from peft.tuners.lokr.layer import factorization

    from loraformat.schemes._peft.kronecker import factorise

    for size in (1, 7, 36, 127, 128, 360, 5120):
        for factor in (-1, 1, 4, 5, 16, 200):
            assert factorise(size, factor) == factorization(size, factor), (size, factor)
