"""mlx-lm itself loads what we write and computes what PEFT computes, and PEFT what mlx-lm wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("peft", reason="needs peft")
mx = pytest.importorskip("mlx.core", reason="needs mlx and mlx-lm")
tuner = pytest.importorskip("mlx_lm.tuner.utils", reason="needs mlx-lm")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft asks transformers for it.
]

import decoder_zoo as zoo  # noqa: E402

FAMILIES = ("llama", "qwen3")
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "ranks and scales of their own": {
        "rank_pattern": {"q_proj": 6, "down_proj": 1},
        "alpha_pattern": {"v_proj": 24, "down_proj": 8},
    },
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "embedding and head": {"target_modules": [*zoo.LINEAR, "embed_tokens", "lm_head"]},
    "one block": {"layers_to_transform": [1]},
}


def same_in_mlx(model: Any) -> Any:
    """Return mlx-lm's model with the same weights."""
    from mlx_lm.models import llama, qwen3

    module = {"llama": llama, "qwen3": qwen3}[model.config.model_type]
    twin = module.Model(module.ModelArgs.from_dict(model.config.to_dict() | {"rope_theta": 10000.0}))
    weights = {name: mx.array(tensor.numpy()) for name, tensor in model.state_dict().items()}
    twin.load_weights(list(twin.sanitize(weights).items()))
    return twin


def logits(model: Any) -> Any:
    return np.array(model(mx.array([zoo.TOKENS]))[0].astype(mx.float32), dtype=np.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_libraries_compute_the_same_without_an_adapter(family: str) -> None:
    model = zoo.make_model(family)
    np.testing.assert_allclose(logits(same_in_mlx(model)), zoo.logits(model, zoo.TOKENS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_mlx_lm_computes_what_peft_computes(tmp_path: Path, family: str, name: str) -> None:
    model = zoo.make_model(family)
    twin = same_in_mlx(model)
    plain = zoo.logits(model, zoo.TOKENS)
    adapted = zoo.make_adapter(model, tmp_path / "peft", **ADAPTERS[name])
    done = loraformat.convert(tmp_path / "peft", "mlx", tmp_path / "mlx", verify=True)
    assert done.proof is not None
    assert done.proof.relative < 1e-7
    tuner.load_adapters(twin, str(tmp_path / "mlx"))
    twin.eval()
    expected = zoo.logits(adapted, zoo.TOKENS)
    assert np.abs(expected - plain).max() > 0.01
    np.testing.assert_allclose(logits(twin), expected, atol=2e-4, rtol=2e-4)


def write_with_mlx(twin: Any, folder: Path, *, dora: bool) -> None:
    """Give mlx-lm's model an adapter of its own, and save it as its trainer does."""
    from mlx.utils import tree_flatten, tree_map_with_path

    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.0}
    twin.freeze()
    tuner.linear_to_lora_layers(twin, 1, parameters, use_dora=dora)

    def fill(path: str, array: Any) -> Any:
        if path.endswith(("lora_a", "lora_b")):
            return 0.2 * mx.random.normal(array.shape, key=mx.random.key(len(path)))
        return array * 1.2 if path.endswith(".m") else array

    twin.update(tree_map_with_path(fill, twin.parameters()))
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(twin.trainable_parameters())))
    kind = "dora" if dora else "lora"
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters, "model": "a/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_what_mlx_lm_computes(tmp_path: Path, family: str, dora: bool) -> None:
    from peft import PeftModel

    model = zoo.make_model(family)
    twin = same_in_mlx(model)
    write_with_mlx(twin, tmp_path / "mlx", dora=dora)
    done = loraformat.convert(tmp_path / "mlx", "peft", tmp_path / "peft", verify=True)
    assert done.proof is not None
    assert done.proof.relative == 0
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "peft")).eval()
    np.testing.assert_allclose(zoo.logits(adapted, zoo.TOKENS), logits(twin), atol=2e-4, rtol=2e-4)
    back = loraformat.convert(tmp_path / "peft", "mlx", tmp_path / "back", verify=True)
    assert back.targets == done.targets
    one, other = (mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("mlx", "back"))
    assert set(one) == set(other)
    assert all(mx.array_equal(one[key], other[key]) for key in one)


def test_mlx_lm_refuses_ranks_that_differ(tmp_path: Path) -> None:
    """Why ranks are padded: the library compares shapes with those of its configuration's one rank."""
    model = zoo.make_model("llama")
    twin = same_in_mlx(model)
    zoo.make_adapter(model, tmp_path / "peft", rank_pattern={"q_proj": 6})
    loraformat.convert(tmp_path / "peft", "mlx", tmp_path / "mlx")
    path = tmp_path / "mlx" / "adapters.safetensors"
    cut = dict(mx.load(str(path)))
    key = next(key for key in cut if key.endswith("v_proj.lora_a"))
    cut[key] = cut[key][:, :3]
    mx.eval(cut)
    path.unlink()
    mx.save_safetensors(str(path), cut)
    with pytest.raises(ValueError, match="does not match"):
        tuner.load_adapters(twin, str(tmp_path / "mlx"))


# --- experts ---------------------------------------------------------------------------------------------------------

MIXTURE = {"num_experts": 3, "moe_intermediate_size": 28, "num_experts_per_tok": 2, "norm_topk_prob": True}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixture_in_mlx(model: Any) -> Any:
    """Return mlx-lm's Qwen3 MoE with the same weights; experts lie in one tensor in both, gate and up in two there."""
    from mlx_lm.models import qwen3_moe

    fields = model.config.to_dict() | {"rope_theta": 10000.0, "decoder_sparse_step": 1, "mlp_only_layers": []} | MIXTURE
    twin = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(fields))
    weights = {}
    for name, tensor in model.state_dict().items():
        whole, array = name.replace(".experts.", ".switch_mlp."), tensor.numpy()
        if name.endswith("gate_up_proj"):
            half = array.shape[1] // 2
            weights[whole.replace("gate_up_proj", "gate_proj.weight")] = array[:, :half]
            weights[whole.replace("gate_up_proj", "up_proj.weight")] = array[:, half:]
        else:
            weights[f"{whole}.weight" if name.endswith("experts.down_proj") else whole] = array
    twin.load_weights([(name, mx.array(array)) for name, array in weights.items()])
    return twin


def test_experts_of_peft_act_in_mlx_lm_and_come_back(tmp_path: Path) -> None:
    """PEFT's packed parameters, mlx-lm's SwitchLinear: both libraries compute the same, and no number is lost."""
    from safetensors.numpy import load_file

    model = zoo.make_model("qwen3_moe", **MIXTURE)
    config = zoo.save_config(model, tmp_path / "base")
    twin = mixture_in_mlx(model)
    plain = zoo.logits(model, zoo.TOKENS)
    np.testing.assert_allclose(logits(twin), plain, atol=1e-4, rtol=1e-4)
    adapted = zoo.make_adapter(model, tmp_path / "peft", target_modules=["q_proj"], target_parameters=PARAMETERS)
    loraformat.convert(tmp_path / "peft", "mlx", tmp_path / "mlx", base=config, verify=True)
    tuner.load_adapters(twin, str(tmp_path / "mlx"))
    twin.eval()
    expected = zoo.logits(adapted, zoo.TOKENS)
    assert np.abs(expected - plain).max() > 0.01
    np.testing.assert_allclose(logits(twin), expected, atol=2e-4, rtol=2e-4)
    loraformat.convert(tmp_path / "mlx", "peft", tmp_path / "back", base=config, verify=True)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert set(one) == set(other)
    assert all(np.array_equal(one[key], other[key]) for key in one)


def test_mlx_reads_an_npz_of_ours(tmp_path: Path) -> None:
    model = zoo.make_model("llama")
    zoo.make_adapter(model, tmp_path / "peft")
    loraformat.convert(tmp_path / "peft", "mlx", tmp_path / "adapters.npz")
    (tmp_path / "mlx").mkdir()
    loraformat.convert(tmp_path / "peft", "mlx", tmp_path / "mlx" / "adapters.safetensors")
    one, other = (mx.load(str(path)) for path in (tmp_path / "adapters.npz", tmp_path / "mlx" / "adapters.safetensors"))
    assert set(one) == set(other)
    assert all(mx.array_equal(one[key], other[key]) for key in one)
