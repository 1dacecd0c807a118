"""Adapters of models that are stored otherwise than they were trained: experts, fused modules, renames, attention.

The reference is PEFT's merge in float64 where PEFT can make the adapter, and otherwise numpy written from the modelling
code's own views of a weight.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    Arrays,
    assert_merged,
    assert_near,
    config_of,
    fill,
    merge,
    peft,
    state_of,
    torch,
    train,
    transformers,
    wide_merge,
    write_folder,
)
from numpy.typing import NDArray
from safetensors.torch import save_file

import loraformat
from builders import write_peft

pytestmark = pytest.mark.oracle

FORMS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXPERTS, HIDDEN, INNER = 4, 32, 24
SIZES = {
    "vocab_size": 40,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixture(family: str, **sizes: Any) -> Any:
    torch.manual_seed(1)
    fields = SIZES | sizes
    if family == "mixtral":
        config = transformers.MixtralConfig(num_local_experts=EXPERTS, **fields)
        return transformers.MixtralForCausalLM(config)
    if family == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            num_experts=EXPERTS, moe_intermediate_size=fields["intermediate_size"], **fields
        )
        return transformers.Qwen3MoeForCausalLM(config)
    config = transformers.GptOssConfig(num_local_experts=EXPERTS, **fields)
    return randomised(transformers.GptOssForCausalLM(config))


def randomised(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.1
    return model


def reload(folder: Path) -> Arrays:
    """Return a model folder's parameters under the names that transformers gives them, in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("names", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up", "down"])
def test_packed_factors(tmp_path: Path, form: str, family: str, names: list[str]) -> None:
    """Onto the checkpoint as transformers saves it: the experts of the first two apart, those of the third packed."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=names, lora_dropout=0.0)
    trained = train(mixture(family), config, tmp_path, form=FORMS[form])
    found, _ = merge(trained, tmp_path / "merged")
    apart = [name for name in found if ".experts.0." in name]
    assert bool(apart) == (family != "gpt_oss")
    assert_near(reload(tmp_path / "merged"), trained.merged, reload(trained.base), form=form)
    # And onto the same model as it is in memory, packed.
    model = transformers.AutoModelForCausalLM.from_pretrained(trained.base, dtype=FORMS[form])
    packed = write_folder(tmp_path / "packed", model.state_dict(), config_of(trained.base))
    loraformat.merge(packed, [trained.adapter], tmp_path / "merged-packed", min_retained=0.0)
    found = state_of(tmp_path / "merged-packed")
    assert "model.layers.1.mlp.experts.down_proj" in found
    assert_near(found, trained.merged, state_of(packed), form=form)


@pytest.mark.parametrize("family", ["granitemoe", "nemotron_h", "aria_text", "qwen3_next"])
def test_packed_factors_of_families_that_are_stored_otherwise(tmp_path: Path, family: str) -> None:
    """Experts in a tensor of another name (Granite, Aria), without a gate (Nemotron-H), beside linear attention."""
    sizes: dict[str, Any] = SIZES | {"num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS}
    sizes |= {"moe_num_experts": EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 28, "pad_token_id": 0}
    if family == "qwen3_next":
        sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
        sizes |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = randomised(transformers.AutoModelForCausalLM.from_config(config).float())
    names = {".".join(name.split(".")[-2:]) for name, each in model.named_parameters() if each.dim() == 3}
    packed = sorted(name for name in names if name.startswith("experts."))
    assert len(packed) == 2
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=packed, lora_dropout=0.0)
    trained = train(model, config, tmp_path)
    merge(trained, tmp_path / "merged")
    assert_near(reload(tmp_path / "merged"), trained.merged, reload(trained.base))


def test_all_linear_of_a_mixture(tmp_path: Path) -> None:
    """PEFT 0.21 targets the router by its owner's name beside the bare names of the experts' parameters."""
    trained = train(mixture("mixtral"), peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"), tmp_path)
    merge(trained, tmp_path / "merged")
    assert_near(reload(tmp_path / "merged"), trained.merged, reload(trained.base), form="float32")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_packed_factors_of_square_matrices(tmp_path: Path, family: str) -> None:
    """Only the family tells which side is the input."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=BOTH[1:], lora_dropout=0.0)
    trained = train(mixture(family, intermediate_size=HIDDEN), config, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(trained.base)
    packed = write_folder(tmp_path / "packed", model.state_dict(), config_of(trained.base))
    loraformat.merge(packed, [trained.adapter], tmp_path / "merged")
    assert_near(state_of(tmp_path / "merged"), trained.merged, state_of(packed))
    (packed / "config.json").unlink()
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(packed, [trained.adapter], tmp_path / "unknown")
    assert set(caught.value.codes) == {"LF404"}
    stated = json.loads((trained.adapter / "adapter_config.json").read_text())
    (trained.adapter / "adapter_config.json").write_text(json.dumps(stated | {"peft_version": "0.18.0"}))
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(trained.base, [trained.adapter], tmp_path / "old")
    assert set(caught.value.codes) == {"LF225"}


def test_packed_factors_with_ranks_by_pattern(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=BOTH,
        rank_pattern={"experts.down_proj": 3},
        alpha_pattern={"experts.gate_up_proj": 5},
        use_rslora=True,
    )
    trained = train(mixture("qwen3_moe"), config, tmp_path)
    merge(trained, tmp_path / "merged")
    assert_near(reload(tmp_path / "merged"), trained.merged, reload(trained.base))


def test_a_parameter_that_is_a_matrix(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    trained = train(mixture("qwen3_moe"), config, tmp_path)
    found, _ = merge(trained, tmp_path / "merged")
    assert_near(reload(tmp_path / "merged"), trained.merged, reload(trained.base))
    before = state_of(trained.base)["model.layers.0.mlp.gate.weight"]
    assert not np.array_equal(found["model.layers.0.mlp.gate.weight"], before)


def factors(rng: np.random.Generator, out: int, inner: int, rank: int = 3) -> tuple[Any, Any]:
    down, up = rng.standard_normal((rank, inner)), rng.standard_normal((out, rank))
    return (down * 0.03).astype(np.float32), (up * 0.03).astype(np.float32)


def delta(pair: tuple[Any, Any], scale: float = 2.0) -> NDArray[np.float64]:
    return scale * (pair[1].astype(np.float64) @ pair[0].astype(np.float64))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_an_adapter_of_single_experts_onto_packed_ones(tmp_path: Path, family: str) -> None:
    """Mixtral's older names; and gpt-oss, where gate and up take turns."""
    rng = np.random.default_rng(4)
    model = mixture(family)
    packed = write_folder(tmp_path / "packed", model.state_dict(), model.config.to_dict())
    older = family == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if older else ("gate_proj", "up_proj", "down_proj")
    path = "model.layers.1.block_sparse_moe.experts.2" if older else "model.layers.1.mlp.experts.2"
    pairs = {gate: factors(rng, INNER, HIDDEN), up: factors(rng, INNER, HIDDEN), down: factors(rng, HIDDEN, INNER)}
    adapter = write_peft(tmp_path / "adapter", {f"{path}.{name}": pair for name, pair in pairs.items()}, alpha=6)
    receipt = loraformat.merge(packed, [adapter], tmp_path / "merged")
    assert [problem.code for problem in receipt.problems] == (["LF410"] if older else [])
    before, found = state_of(packed), state_of(tmp_path / "merged")
    expected = {name: value.copy() for name, value in before.items()}
    both, out = (expected[f"model.layers.1.mlp.experts.{name}"][2] for name in ("gate_up_proj", "down_proj"))
    if older:
        both[:INNER] += delta(pairs[gate])
        both[INNER:] += delta(pairs[up])
        out += delta(pairs[down])
    else:
        both[:, ::2] += delta(pairs[gate]).T
        both[:, 1::2] += delta(pairs[up]).T
        out += delta(pairs[down]).T
    assert_near(found, expected, before)


# --- fused modules ---------------------------------------------------------------------------------------------------

HEADS, GROUPS, SIZE, WIDTH = 4, 2, 8, 32


def fused_views(family: str, weight: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Return q, k and v as the modelling code views them, `(heads, size, in)` each; writes go through."""
    if family == "phi3":
        ends = (HEADS * SIZE, (HEADS + GROUPS) * SIZE)
        return {"q_proj": weight[: ends[0]], "k_proj": weight[ends[0] : ends[1]], "v_proj": weight[ends[1] :]}
    if family == "gpt2":
        return {
            name: weight[:, index * WIDTH : (index + 1) * WIDTH].T
            for index, name in enumerate(("q_proj", "k_proj", "v_proj"))
        }
    if family in ("gpt_neox", "bloom", "falcon by head"):
        heads = weight.reshape(HEADS, 3, SIZE, WIDTH)
        return {name: heads[:, index] for index, name in enumerate(("q_proj", "k_proj", "v_proj"))}
    if family == "falcon one group":
        heads = weight.reshape(HEADS + 2, SIZE, WIDTH)
        return {"q_proj": heads[:-2], "k_proj": heads[-2:-1], "v_proj": heads[-1:]}
    groups = weight.reshape(GROUPS, HEADS // GROUPS + 2, SIZE, WIDTH)
    return {"q_proj": groups[:, :-2], "k_proj": groups[:, -2:-1], "v_proj": groups[:, -1:]}


def plain(**fields: Any) -> dict[str, Any]:
    return {"num_attention_heads": HEADS, "hidden_size": WIDTH, **fields}


FUSED: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "phi3": ("qkv_proj", plain(model_type="phi3", num_key_value_heads=GROUPS), ((HEADS + 2 * GROUPS) * SIZE, WIDTH)),
    "gpt2": ("c_attn", {"model_type": "gpt2", "n_head": HEADS, "n_embd": WIDTH}, (WIDTH, 3 * WIDTH)),
    "gpt_neox": ("query_key_value", plain(model_type="gpt_neox"), (3 * WIDTH, WIDTH)),
    "bloom": ("query_key_value", {"model_type": "bloom", "n_head": HEADS}, (3 * WIDTH, WIDTH)),
    "falcon": (
        "query_key_value",
        plain(model_type="falcon", new_decoder_architecture=True, num_kv_heads=GROUPS),
        ((HEADS + 2 * GROUPS) * SIZE, WIDTH),
    ),
    "falcon one group": ("query_key_value", plain(model_type="falcon"), ((HEADS + 2) * SIZE, WIDTH)),
    "falcon by head": ("query_key_value", plain(model_type="falcon", multi_query=False), (3 * WIDTH, WIDTH)),
}


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("members", [("q_proj",), ("k_proj",), ("v_proj", "q_proj")], ids="+".join)
def test_an_adapter_of_split_modules_onto_a_fused_one(tmp_path: Path, family: str, members: tuple[str, ...]) -> None:
    fused, config, shape = FUSED[family]
    rng = np.random.default_rng(6)
    name = f"model.layers.0.attn.{fused}.weight"
    state = {name: rng.standard_normal(shape).astype(np.float32), f"other.{name}": np.ones((3, 2), np.float32)}
    base = write_folder(tmp_path / "base", state, config)
    expected = {key: value.astype(np.float64) for key, value in state.items()}
    views = fused_views(family, expected[name])
    pairs = {member: factors(rng, views[member].size // WIDTH, WIDTH) for member in members}
    adapter = write_peft(tmp_path / "adapter", {f"model.layers.0.attn.{m}": pair for m, pair in pairs.items()}, alpha=6)
    for member, pair in pairs.items():
        views[member][...] += delta(pair).reshape(views[member].shape)
    loraformat.merge(base, [adapter], tmp_path / "merged")
    assert_near(state_of(tmp_path / "merged"), expected, state_of(base))


@pytest.mark.parametrize("config", [{}, {"model_type": "codegen"}, {"model_type": "gpt_neox"}], ids=str)
def test_a_fused_weight_whose_rows_nothing_tells_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    rng = np.random.default_rng(6)
    base = write_folder(tmp_path / "base", {"m.query_key_value.weight": np.ones((96, 32), np.float32)}, config)
    adapter = write_peft(tmp_path / "adapter", {"m.q_proj": factors(rng, 32, 32)}, alpha=6)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [adapter], tmp_path / "merged")
    assert caught.value.codes == ("LF416",)


def phi(**fields: Any) -> Any:
    torch.manual_seed(2)
    sizes = SIZES | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | fields
    sizes.pop("head_dim")
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes))


def split(state: Arrays) -> Arrays:
    """Return Phi-3's parameters as a model of split modules has them."""
    heads, groups = SIZES["num_attention_heads"] * 8, SIZES["num_key_value_heads"] * 8
    found: Arrays = {}
    for name, value in state.items():
        if "qkv_proj" in name:
            parts = np.split(value, [heads, heads + groups])
            found |= {name.replace("qkv_proj", f"{part}_proj"): rows for part, rows in zip("qkv", parts, strict=True)}
        elif "gate_up_proj" in name:
            halves = np.split(value, 2)
            found |= {
                name.replace("gate_up_proj", f"{half}_proj"): rows
                for half, rows in zip(("gate", "up"), halves, strict=True)
            }
        else:
            found[name] = value
    return found


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_of_fused_modules_onto_split_ones(tmp_path: Path, form: str) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["qkv_proj", "gate_up_proj", "o_proj"])
    trained = train(phi(), config, tmp_path, form=FORMS[form])
    found, _ = merge(trained, tmp_path / "merged")
    assert_merged(found, trained, form=form)
    state = {name: torch.tensor(value).to(FORMS[form]) for name, value in split(state_of(trained.base)).items()}
    apart = write_folder(tmp_path / "split", state, {"model_type": "llama"})
    loraformat.merge(apart, [trained.adapter], tmp_path / "merged-split", min_retained=0.0)
    assert_near(state_of(tmp_path / "merged-split"), split(trained.merged), state_of(apart), form=form)


# --- attention, blocks, buffers, renames -----------------------------------------------------------------------------


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(24, 4, batch_first=True)
        self.fc = torch.nn.Linear(24, 10)

    def forward(self, x: Any) -> Any:
        return self.fc(self.attn(x, x, x)[0])


def save_adapter(model: Any, config: Any, folder: Path) -> tuple[Any, Arrays]:
    """Adapt a plain module, save both, and return the PEFT model in float64 with its merged parameters."""
    write_folder(folder / "base", model.state_dict(), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
        fill(adapted, 2)
        adapted.save_pretrained(folder / "adapter")
        adapted = adapted.double()
    return adapted, {}


def test_attention_of_torch(tmp_path: Path) -> None:
    """PEFT adds the change of the output projection twice, in forward pass and merge: so do we, and say it."""
    torch.manual_seed(5)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["attn", "fc"])
    adapted, _ = save_adapter(Attention(), config, tmp_path)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = adapted.eval()(x)
    reference = wide_merge(adapted)
    receipt = loraformat.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    found = state_of(tmp_path / "merged")
    assert_near(found, reference, state_of(tmp_path / "base"))
    assert [(problem.code, problem.severity) for problem in receipt.problems] == [("LF224", "warning")]
    merged = Attention().double().eval()
    merged.load_state_dict({name: torch.tensor(value) for name, value in found.items()})
    with torch.no_grad():
        assert float((merged(x) - expected).abs().max()) < 1e-5
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(stated | {"peft_version": "0.22.0"}))
    assert loraformat.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "later").problems == ()
    once, before = (
        state_of(tmp_path / "later")["attn.out_proj.weight"],
        state_of(tmp_path / "base")["attn.out_proj.weight"],
    )
    np.testing.assert_allclose(2 * (once - before), reference["attn.out_proj.weight"] - before, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_factors_of_blocks(tmp_path: Path, form: str) -> None:
    from peft.tuners.lora.config import BdLoraConfig

    torch.manual_seed(2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    blocks = BdLoraConfig(
        target_modules_bd_a=["o_proj", "down_proj"], target_modules_bd_b=["q_proj", "up_proj"], nblocks=2
    )
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj", "o_proj", "down_proj"], use_bdlora=blocks
    )
    trained = train(model, config, tmp_path, form=FORMS[form])
    found, _ = merge(trained, tmp_path / "merged")
    assert_merged(found, trained, form=form)


def test_the_text_model_of_one_that_sees(tmp_path: Path) -> None:
    """transformers saves LLaVA under its older names, and PEFT the adapter under the newer ones."""
    torch.manual_seed(2)
    text = transformers.LlamaConfig(**SIZES)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=39)
    model = transformers.LlavaForConditionalGeneration(config)
    trained = train(
        model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj", "linear_1"]), tmp_path
    )
    before = state_of(trained.base)
    assert any(name.startswith("language_model.model.layers") for name in before), sorted(before)[:3]
    found, receipt = merge(trained, tmp_path / "merged")
    assert not receipt.problems, "config.json says which names transformers gives its modules"
    merged = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    base = transformers.LlavaForConditionalGeneration.from_pretrained(trained.base, dtype=torch.float64)
    arrays, old = ({name: value.numpy() for name, value in each.state_dict().items()} for each in (merged, base))
    assert_near(arrays, trained.merged, old)
    assert any(not np.array_equal(found[name], before[name]) for name in found if "language_model" in name)


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "vit.safetensors"])
def test_what_a_script_trained_whole_beside_the_adapter(tmp_path: Path, name: str) -> None:
    """LLaVA's projector and the parameter for the ends of its lines, in a file beside, as its script has it."""
    text = transformers.LlamaConfig(**SIZES)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaNextConfig(text_config=text, vision_config=vision, image_token_index=39)
    model = randomised(transformers.LlavaNextForConditionalGeneration(config))
    trained = train(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=r".*language_model.*q_proj"), tmp_path)
    parts = ("multi_modal_projector", "image_newline")
    saved = {
        key: value.float() + 0.1 for key, value in trained.model.state_dict().items() if any(p in key for p in parts)
    }
    if name.endswith(".bin"):
        torch.save(saved, trained.adapter / name)
    else:
        save_file(
            {key.removeprefix("base_model.model."): value for key, value in saved.items()}, trained.adapter / name
        )
    merge(trained, tmp_path / "merged")
    found, before = (
        {
            key: value.numpy()
            for key, value in type(model).from_pretrained(place, dtype=torch.float64).state_dict().items()
        }
        for place in (tmp_path / "merged", trained.base)
    )
    whole = {key.removeprefix("base_model.model."): value.double().numpy() for key, value in saved.items()}
    assert len(whole) == 5
    assert_near(found, trained.merged | whole, before)


@pytest.mark.parametrize("family", ["ViT", "Swin", "Segformer"])
def test_a_family_that_is_called_otherwise_in_memory(tmp_path: Path, family: str) -> None:
    """An image classifier, trained by the names of transformers 5, onto the checkpoint with the older ones."""
    sizes = {"num_labels": 3, "image_size": 16, "patch_size": 4}
    if family == "ViT":
        sizes |= {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    elif family == "Swin":
        sizes |= {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 3], "window_size": 2}
    else:
        lists = {"depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [12, 20], "num_attention_heads": [2, 4]}
        lists |= {"patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]}
        sizes |= {"num_encoder_blocks": 2, "decoder_hidden_size": 16, **lists}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = randomised(getattr(transformers, f"{family}ForImageClassification")(config))
    trained = train(model, peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"), tmp_path)
    merge(trained, tmp_path / "merged")
    found, before = (
        {
            name: value.numpy()
            for name, value in type(model).from_pretrained(place, dtype=torch.float64).state_dict().items()
        }
        for place in (tmp_path / "merged", trained.base)
    )
    assert_near(found, trained.merged, before)


@pytest.mark.parametrize("family", ["Gte", "NomicBert", "JinaEmbeddingsV3", "Dinov2"])
def test_a_family_whose_modules_are_several_in_memory(tmp_path: Path, family: str) -> None:
    """Encoders that transformers 5 loads in other modules than their checkpoints have: q, k and v, gate and up."""
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    if family == "Dinov2":
        sizes |= {"image_size": 16, "patch_size": 4, "mlp_ratio": 2, "use_swiglu_ffn": True}
    else:
        sizes |= {"vocab_size": 40, "intermediate_size": 40, "max_position_embeddings": 32}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = randomised(getattr(transformers, f"{family}Model")(config))
    trained = train(model, peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", bias="all"), tmp_path)
    merge(trained, tmp_path / "merged")
    found, before = (
        {
            name: value.numpy()
            for name, value in type(model).from_pretrained(place, dtype=torch.float64).state_dict().items()
        }
        for place in (tmp_path / "merged", trained.base)
    )
    assert_near(found, trained.merged, before)
    stored = {name for name in state_of(trained.base) if name not in trained.merged}
    assert any(end in name for name in stored for end in ("qkv", "weights_in"))


@pytest.mark.parametrize("older", [True, False])
def test_the_text_encoder_of_clip(tmp_path: Path, older: bool) -> None:
    """transformers 5 dropped a level of its names; the checkpoints have it, and so have older adapters."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=30, max_position_embeddings=9, **sizes))
    trained = train(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "fc1"]), tmp_path)
    base = trained.base
    state = state_of(base)
    prefix = "text_model." if not any(name.startswith("text_model.") for name in state) else ""
    if older and prefix:
        base = write_folder(
            tmp_path / "older", {prefix + n: torch.tensor(v).float() for n, v in state.items()}, config_of(base)
        )
    elif not older and not prefix:
        bare = {n.removeprefix("text_model."): torch.tensor(v).float() for n, v in state.items()}
        base = write_folder(tmp_path / "newer", bare, config_of(base))
    loraformat.merge(base, [trained.adapter], tmp_path / "merged")
    found = {n.removeprefix("text_model."): v for n, v in state_of(tmp_path / "merged").items()}
    expected = {n.removeprefix("text_model."): v for n, v in trained.merged.items()}
    assert_near(found, expected, {n.removeprefix("text_model."): v for n, v in state.items()})
