"""PEFT 0.2, which had loralib's MergedLinear (`enable_lora`): what it saved is merged as it computed.

Its grouped convolution has two groups whatever is enabled, so that it is what the paper means for two slices alone.
"""

import types
import warnings
from pathlib import Path

import pytest

import loraformat

torch = pytest.importorskip("torch", reason="needs torch")
peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(not peft.__version__.startswith("0.2."), reason="needs peft 0.2, in an environment of its own"),
]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("enabled", [[True, False, True], [True, True], [False, True, True, False]])
def test_slices_of_a_fused_weight(tmp_path: Path, enabled: list[bool], turned: bool) -> None:
    from safetensors.torch import load_file, save_file
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(len(enabled))
    out = 4 * len(enabled)

    class Model(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.config = types.SimpleNamespace(to_dict=dict)  # What a model of transformers has.
            self.fused = Conv1D(out, 10) if turned else torch.nn.Linear(10, out)

        def forward(self, inputs: object) -> object:
            return self.fused(inputs)

    plain, inputs = Model().eval(), torch.randn(3, 7, 10)
    save_file({name: tensor.clone() for name, tensor in plain.state_dict().items()}, tmp_path / "base.safetensors")
    before = plain(inputs).detach()
    config = peft.LoraConfig(
        r=3, lora_alpha=5, lora_dropout=0.0, target_modules=["fused"], enable_lora=enabled, fan_in_fan_out=turned
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel(plain, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter))
        adapted.train()  # In eval mode it would add the change to the weight, whatever merge_weights says.
        expected = adapted(inputs).detach()
        adapted.save_pretrained(tmp_path / "adapter")
    loraformat.merge(tmp_path / "base.safetensors", [tmp_path / "adapter"], tmp_path / "merged.safetensors")
    found = Model().eval()
    found.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    assert (expected - before).abs().max() > 0.5
    torch.testing.assert_close(found(inputs).detach(), expected, rtol=1e-5, atol=1e-5)
