"""What trainers write of PEFT's models beside one file with one adapter: shards, and state dicts with several."""

import warnings
from pathlib import Path

import numpy as np
import pytest

import loraformat

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

NAMES = ("speech", "vision")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    import torch
    from kind_zoo import Parts
    from safetensors.torch import save_file

    torch.manual_seed(3)
    save_file(Parts().double().state_dict(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def test_one_of_two_adapters_in_a_state_dict(base: Path, tmp_path: Path) -> None:
    import peft
    import torch
    from kind_zoo import Parts, _draw
    from safetensors.torch import load_file

    model = Parts().double()
    model.load_state_dict(load_file(base))
    make = [
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=["lin", "odd"], modules_to_save=["norm"]),
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["lin", "wide"]),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = peft.get_peft_model(model, make[0], adapter_name=NAMES[0], autocast_adapter_dtype=False)
        both.add_adapter(NAMES[1], make[1], autocast_adapter_dtype=False)
        for seed, name in enumerate(NAMES):
            both.set_adapter(name)
            _draw(both, seed)
    own = {key: tensor for key, tensor in both.state_dict().items() if any(f".{name}" in key for name in NAMES)}
    torch.save(own, tmp_path / "both.bin")
    for name in NAMES:
        found = loraformat.merge(base, [f"{tmp_path / 'both.bin'}#{name}"], tmp_path / f"{name}.safetensors", alpha=6)
        assert [each.name for each in found.adapters] == [name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            both.save_pretrained(tmp_path / "saved", selected_adapters=[name])
            again = Parts().double()
            again.load_state_dict(load_file(base))
            merged = peft.PeftModel.from_pretrained(again, tmp_path / "saved" / name).merge_and_unload()
        ours = load_file(tmp_path / f"{name}.safetensors")
        changed = 0
        for key, expected in merged.state_dict().items():
            np.testing.assert_allclose(ours[key].numpy(), expected.numpy(), rtol=1e-12, atol=1e-12, err_msg=key)
            changed += not np.array_equal(expected.numpy(), load_file(base)[key].numpy())
        assert changed >= 2


def test_shards_as_the_hub_writes_them(base: Path, tmp_path: Path) -> None:
    import peft
    from huggingface_hub import save_torch_state_dict
    from kind_zoo import Parts, _draw

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=["lin", "odd", "conv"], modules_to_save=["table"])
        model = peft.get_peft_model(Parts().double(), config, autocast_adapter_dtype=False)
    _draw(model, 1)
    model.save_pretrained(tmp_path / "whole")
    split = tmp_path / "split"
    split.mkdir()
    (split / "adapter_config.json").write_bytes((tmp_path / "whole" / "adapter_config.json").read_bytes())
    state = peft.get_peft_model_state_dict(model)
    save_torch_state_dict(state, split, filename_pattern="adapter_model{suffix}.safetensors", max_shard_size=1200)
    assert len(list(split.glob("adapter_model-*.safetensors"))) > 2
    for folder in (tmp_path / "whole", split):
        loraformat.merge(base, [folder], folder / "merged.safetensors")
    assert not loraformat.verify(split / "merged.safetensors", base, [split]).problems
    from safetensors.numpy import load_file

    whole, parts = (load_file(each / "merged.safetensors") for each in (tmp_path / "whole", split))
    assert all(np.array_equal(whole[key], parts[key]) for key in whole)
    (split / "adapter_model.safetensors.index.json").unlink()
    assert len(loraformat.load(split).targets) == len(loraformat.load(tmp_path / "whole").targets)
