"""LoRAs of text encoders as diffusers saves them with the transformers that is installed, whatever it calls modules."""

from pathlib import Path

import pytest
from checkpoints import peft, torch, transformers

import loraformat

diffusers = pytest.importorskip("diffusers", reason="oracle: pip install torch==2.13.0, then '.[oracle]'")

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("inner", [False, True], ids=["as saved", "with the inner module's name"])
def test_to_kohya_and_into_a_text_encoder(tmp_path: Path, inner: bool) -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=60, max_position_embeddings=16, **sizes))
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    model.add_adapter(config)
    layers = diffusers.utils.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(model))
    if inner:
        layers = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in layers.items()}
    metadata = model.peft_config["default"].to_dict()
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "lora", text_encoder_lora_layers=layers, text_encoder_lora_adapter_metadata=metadata
    )
    loraformat.convert(tmp_path / "lora", "kohya", tmp_path / "kohya.safetensors", verify=True)
    names = {target.name for target in loraformat.load(tmp_path / "kohya.safetensors").targets}
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj" in names
    tokens = torch.tensor([[1, 2, 3, 59]])
    for source in ("lora", "kohya.safetensors"):
        output = tmp_path / f"merged-{Path(source).stem}"
        loraformat.merge(tmp_path / "base", tmp_path / source, output)
        merged = transformers.CLIPTextModel.from_pretrained(output).eval()
        with torch.no_grad():
            expected, got = model.eval()(tokens).last_hidden_state, merged(tokens).last_hidden_state
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
