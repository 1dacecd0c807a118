"""The plain model with our merged weights computes what litgpt's model with adapter_v2 computes."""

from pathlib import Path
from typing import Any

import pytest

import loraformat

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("litgpt", reason="needs litgpt, in an environment of its own")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

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
}


@pytest.mark.parametrize("biased", [True, False])
def test_merged_is_trained(tmp_path: Path, biased: bool) -> None:
    """Without biases in the base the merge adds them, and the model that has them computes the same."""
    from litgpt import adapter_v2, model
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    own = CONFIG | {"bias": biased, "lm_head_bias": biased}
    plain = model.GPT(model.Config(**own)).double().eval()
    twin = adapter_v2.GPT(adapter_v2.Config(**own, adapter_start_layer=2)).double().eval()
    twin.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if adapter_v2.adapter_filter(name, parameter):
                parameter += 0.3 * torch.randn_like(parameter)
    saved = {name: tensor for name, tensor in twin.state_dict().items() if adapter_v2.adapter_filter(name, tensor)}
    (tmp_path / "tuned").mkdir()
    torch.save({"model": saved}, tmp_path / "tuned" / "lit_model.pth.adapter_v2")
    save_file({name: tensor.contiguous() for name, tensor in plain.state_dict().items()}, tmp_path / "base.safetensors")
    merged = tmp_path / "merged.safetensors"
    loraformat.merge(tmp_path / "base.safetensors", [tmp_path / "tuned"], merged, new_biases=not biased)
    tokens = torch.tensor([[1, 5, 7, 2, 30]])
    found = model.GPT(model.Config(**own | {"bias": True, "lm_head_bias": True})).double().eval()
    found.load_state_dict(load_file(merged))
    with torch.no_grad():
        expected, before = twin(tokens), plain(tokens)
        torch.testing.assert_close(found(tokens), expected, rtol=1e-9, atol=1e-9)
    assert (expected - before).abs().max() > 0.1
