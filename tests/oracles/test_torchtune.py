"""torchtune's own converter to PEFT, and its table of names; its package need not be importable, only installed."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from loraformat.spellings import all_tables

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("peft", reason="needs peft")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft asks transformers for it.
]

import decoder_zoo as zoo  # noqa: E402

TABLES = {table.name: table for table in all_tables()}


@pytest.fixture(scope="module")
def converter() -> Any:
    """Return `torchtune/models/convert_weights.py`: importing the package asks for a torchao that torch has left."""
    found = importlib.util.find_spec("torchtune")
    if found is None or found.origin is None:
        pytest.skip("torchtune is not installed")
    path = Path(found.origin).parent / "models" / "convert_weights.py"
    spec = importlib.util.spec_from_file_location("_torchtune_convert_weights", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("table", ["llama-decoder", "qwen-decoder", "gemma-decoder"])
def test_names_are_those_of_torchtune(converter: Any, table: str) -> None:
    theirs = {key.removesuffix(".weight"): value for key, value in converter._FROM_HF.items() if value is not None}
    rows = [row for row in TABLES[table].rows if "torchtune" in row.paths]  # It has no experts.
    assert len(rows) > 4
    for row in rows:
        for ours, tune in zip(row.paths["transformers"], row.paths["torchtune"], strict=True):
            assert theirs[ours.replace("{i}", "{}")] == f"{tune.replace('{i}', '{}')}.weight"


def change_of(tensors: dict[str, Any], module: str, scale: float) -> Any:
    a, b = (tensors[f"base_model.model.{module}.lora_{letter}.weight"].double().numpy() for letter in "AB")
    return scale * b @ a


def test_its_converter_leads_back_to_peft(tmp_path: Path, converter: Any) -> None:
    from safetensors.torch import load_file

    model = zoo.make_model("llama")
    zoo.make_adapter(model, tmp_path / "peft")
    config = zoo.save_config(model, tmp_path / "base")
    loraformat.convert(tmp_path / "peft", "torchtune", tmp_path / "tune", base=config, verify=True)
    stored = torch.load(tmp_path / "tune" / "adapter_model.pt", weights_only=True)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "dim": 24, "head_dim": 10}
    theirs = converter.tune_to_peft_adapter_weights(stored, **sizes)
    source = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert set(theirs) == set(source)
    assert all(torch.equal(theirs[name], source[name]) for name in source)


def test_we_read_what_its_names_mean_as_its_converter_does(tmp_path: Path, converter: Any) -> None:
    from safetensors.torch import load_file

    torch.manual_seed(5)
    sizes = {"q_proj": (40, 24), "k_proj": (20, 24), "v_proj": (20, 24), "output_proj": (24, 40)}
    stored = {}
    for layer in range(2):
        for name, (out, inner) in sizes.items():
            stored[f"layers.{layer}.attn.{name}.lora_a.weight"] = torch.randn(3, inner)
            stored[f"layers.{layer}.attn.{name}.lora_b.weight"] = torch.randn(out, 3)
    torch.save(stored, tmp_path / "adapter_0.pt")
    config = zoo.save_config(zoo.make_model("llama"), tmp_path / "base")
    loraformat.convert(tmp_path / "adapter_0.pt", "peft", tmp_path / "peft", base=config, alpha=6, verify=True)
    theirs = converter.tune_to_peft_adapter_weights(stored, num_heads=4, num_kv_heads=2, dim=24, head_dim=10)
    ours = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_where_its_converter_forgets_the_magnitudes_and_we_do_not(tmp_path: Path, converter: Any) -> None:
    """It permutes the rows of B, and not those of the magnitude that scales them."""
    from safetensors.torch import load_file

    model = zoo.make_model("llama")
    zoo.make_adapter(model, tmp_path / "peft", use_dora=True)
    config = zoo.save_config(model, tmp_path / "base")
    loraformat.convert(tmp_path / "peft", "torchtune", tmp_path / "tune", base=config)
    loraformat.convert(tmp_path / "tune", "peft", tmp_path / "back", base=config)
    source = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert all(torch.equal(source[name], back[name]) for name in source)
    stored = torch.load(tmp_path / "tune" / "adapter_model.pt", weights_only=True)
    name = "layers.0.attn.q_proj.magnitude"
    kept = source["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"]
    assert not torch.equal(stored[name], kept)
    assert np.array_equal(np.sort(stored[name].numpy()), np.sort(kept.numpy()))
