"""kohya's flat scheme: alphas in their own forms, LyCORIS payloads, and names that only tables or the base can read."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loraformat
from builders import MemoryFactor, write_tensors
from laws.scheme_laws import SchemeLaws, store
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.base_facts import NO_FACTS, BaseFacts
from loraformat.conversion._engine import Rounding, Source, convert_source
from loraformat.errors import LoraformatError
from loraformat.kinds import KINDS
from loraformat.problems import Problem
from loraformat.schemes import NOT_STATED, Bundle, StatedScale
from loraformat.schemes.dotted import SCHEME as DOTTED
from loraformat.schemes.kohya import SCHEME
from schemes import modules as m

DOWN, UP = "lora_down.weight", "lora_up.weight"
PATH = Path("a.safetensors")


def bundle_of(tensors: Mapping[str, object], **metadata: str) -> Bundle:
    return Bundle(PATH, dict(tensors), metadata)  # type: ignore[arg-type]


def one(module: str, shape: tuple[int, ...] = (6, 5), **more: object) -> Bundle:
    return bundle_of(m.lora({module: shape}, DOWN, UP, **more))  # type: ignore[arg-type]


def payload(prefix: str, roles: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    dice = np.random.default_rng(5)
    arrays = {role: dice.standard_normal(shape).astype(np.float32) for role, shape in roles.items()}
    return dict(m.tensors({f"{prefix}.{role}": array for role, array in arrays.items()}))


TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
LOHA = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 5), "hada_w2_a": (8, 2), "hada_w2_b": (2, 5), "alpha": ()}
LOKR = {"lokr_w1": (2, 5), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 3), "alpha": ()}
GLORA = {"a1.weight": (5, 2), "a2.weight": (2, 5), "b1.weight": (8, 2), "b2.weight": (2, 5), "alpha": ()}
TUCKER = {DOWN: (2, 5, 1, 1), UP: (8, 2, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "alpha": ()}
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
TOKENS = m.tensors(
    {
        "bundle_emb.my.token.clip_l": np.ones((2, 5), np.float32),
        "bundle_emb.my.token.t5_out": np.ones((2, 7), np.float32),
    }
)
"""Embeddings of new tokens as OneTrainer puts them beside the factors."""
NORM = "lora_te_text_model_final_layer_norm"


def numbers(prefix: str, **values: np.ndarray) -> dict[str, object]:
    """Return tensors of given numbers beside a module's factors."""
    return dict(m.tensors({f"{prefix}.{role}": value for role, value in values.items()}))


class TestKohya(SchemeLaws):
    scheme = SCHEME

    def examples(self) -> Mapping[str, Bundle]:
        sd1 = m.flat("lora_unet", m.SD1_DIFFUSERS) | m.flat("lora_te", m.CLIP)
        sdxl = m.flat("lora_unet", m.SDXL_SGM) | m.flat("lora_te1", m.CLIP) | m.flat("lora_te2", m.CLIP)
        flux = m.flat("lora_unet", m.FLUX_BFL) | m.flat("lora_te1", m.CLIP) | m.flat("lora_te3", m.T5)
        dora = payload(TO_Q, {DOWN: (2, 5), UP: (8, 2), "dora_scale": (8, 1), "alpha": ()})
        oft = {"oft_blocks": (2, 4, 4), "alpha": ()}
        parts = {"oft_blocks.0": (2, 3, 3), "alpha": ()}
        return {
            "OFT of sd-scripts": bundle_of(payload("oft_unet_" + TO_Q.removeprefix("lora_unet_"), oft)),
            "OFT of sd-scripts, FLUX": bundle_of(payload("oft_unet_double_blocks_0_img_attn_proj", parts)),
            "Z-Image, dots": bundle_of(
                m.lora(
                    {f"lora_unet_layers_0_{name}": (6, 5) for name in ("attention_to_q", "adaLN_modulation_0")},
                    "lora.down.weight",
                    "lora.up.weight",
                )
            ),
            "HunyuanVideo of musubi": bundle_of(
                m.lora(
                    {f"lora_unet_double_blocks_0_{each}": (24, 5) for each in ("img_attn_qkv", "img_mlp_fc1")}, DOWN, UP
                )
            ),
            "Stable Diffusion 1.5": bundle_of(m.lora(sd1, DOWN, UP, alpha=1.0), ss_network_dim="2"),
            "Stable Diffusion XL": bundle_of(m.lora(sdxl, DOWN, UP, alpha=4, dtype=np.float16)),
            "FLUX.1, bfloat16": bundle_of(m.lora(flux, DOWN, UP, alpha=10.67, dtype=m.BFLOAT16)),
            "FLUX.1, ranks differ": bundle_of(m.lora(flux, DOWN, UP, alpha=2.0, ranks=(1, 2, 4))),
            "Stable Diffusion 3": bundle_of(m.lora(m.flat("lora_unet", m.SD3_MMDIT), DOWN, UP, alpha=2.0)),
            "Wan": bundle_of(m.lora(m.flat("lora_unet", m.WAN_NATIVE), DOWN, UP, alpha=2.0)),
            "Qwen-Image": bundle_of(m.lora(m.flat("lora_unet", m.QWEN), DOWN, UP, alpha=2.0)),
            "without alphas": bundle_of(m.lora(sd1, DOWN, UP)),
            "alphas with an axis": bundle_of(_with_axis(m.lora(sd1, DOWN, UP, alpha=3.0))),
            "LoHa and LoKr": bundle_of(payload(TO_Q, LOHA) | payload(TO_K, LOKR)),
            "DoRA of outputs": bundle_of(dora),
            "DoRA of inputs": bundle_of(payload(TO_Q, {DOWN: (2, 5), UP: (8, 2), "dora_scale": (1, 5)})),
            "differences and norms": bundle_of(
                payload(TO_Q, {"diff": (8, 5), "diff_b": (8,)})
                | payload(TO_K, {"diff_b": (8,)})
                | payload(CONV, {"diff": (8, 5, 3, 3)})
                | payload(NORM, {"w_norm": (5,), "b_norm": (5,)})
            ),
            "token embeddings": bundle_of(m.lora(sd1, DOWN, UP, alpha=1.0) | TOKENS),
            "a core": bundle_of(payload(CONV, TUCKER) | payload(TO_Q, {"diff": (8, 5)})),
            "DoRA of LoHa and of LoKr": bundle_of(
                payload(TO_Q, LOHA | {"dora_scale": (8, 1)}) | payload(TO_K, LOKR | {"dora_scale": (1, 15)})
            ),
            "LoRA with biases": bundle_of(
                payload(TO_Q, {DOWN: (3, 5), UP: (8, 3), "diff_b": (8,)})
                | numbers(TO_Q, alpha=np.float32(5))
                | payload(TO_K, {DOWN: (2, 5), UP: (8, 2), "diff_b": (8,)})
            ),
            "GLoRA": bundle_of(payload(TO_Q, GLORA)),
            "(IA)³": bundle_of(
                payload(TO_Q, {"weight": (8,)})
                | numbers(TO_Q, on_input=np.array(0))
                | payload(TO_K, {"weight": (5,)})
                | numbers(TO_K, on_input=np.ones(1, np.float16))
                | payload(CONV, {"weight": (1, 8, 1, 1)})
                | numbers(CONV, on_input=np.array(0, np.uint8))
            ),
            "rotations": bundle_of(
                payload(TO_Q, {"oft_blocks": (2, 4, 4)})
                | numbers(TO_Q, alpha=np.zeros(()))
                | payload(TO_K, {"oft_blocks": (2, 4, 4), "rescale": (8, 1)})
                | numbers(TO_K, alpha=np.array(0.25, np.float16))
            ),
            "rotations in stages": bundle_of(
                payload(TO_Q, {"oft_blocks": (2, 2, 4, 4)})
                | numbers(TO_Q, alpha=np.array(0.1))
                | payload(CONV, {"oft_blocks": (1, 2, 4, 4), "rescale": (8, 1, 1, 1)})
            ),
            "double underscore": bundle_of(m.lora({"lora_unet__blocks_0_self_attn_q": (6, 5)}, DOWN, UP, alpha=1.0)),
        }


def _with_axis(tensors: Mapping[str, object]) -> dict[str, object]:
    """Give every alpha an axis, as some trainers do."""
    return {
        name: MemoryFactor(name, each.array.reshape(1)) if name.endswith("alpha") else each  # type: ignore[attr-defined]
        for name, each in tensors.items()
    }


def find(bundle: Bundle, code: str) -> list[Problem]:
    return [problem for problem in SCHEME.read(bundle, NOT_STATED).problems if problem.code == code]


def test_names_are_read_by_the_models_table() -> None:
    names = {
        f"{TO_Q}": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn1_to_out_0": (
            "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0"
        ),
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q": (
            "unet.input_blocks.4.1.transformer_blocks.1.attn1.to_q"
        ),
        "lora_unet_double_blocks_0_img_attn_qkv": "transformer.double_blocks.0.img_attn.qkv",
        "lora_unet_joint_blocks_0_x_block_attn_qkv": "transformer.joint_blocks.0.x_block.attn.qkv",
        "lora_unet_blocks_0_ffn_0": "transformer.blocks.0.ffn.0",
        "lora_transformer_single_transformer_blocks_3_attn_to_k": ("transformer.single_transformer_blocks.3.attn.to_k"),
        "lycoris_single_transformer_blocks_3_norm_linear": "transformer.single_transformer_blocks.3.norm.linear",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
        ),
    }
    for module, target in names.items():
        (read,) = SCHEME.read(one(module), NOT_STATED).targets
        assert read.name == target


def test_the_third_text_encoders_prefix_depends_on_the_model() -> None:
    t5 = {"lora_te3_encoder_block_0_layer_0_SelfAttention_q": (6, 5)}
    for denoiser, component in (
        ("lora_unet_double_blocks_0_img_attn_qkv", "text_encoder_2"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "text_encoder_3"),
    ):
        adapter = SCHEME.read(bundle_of(m.lora({denoiser: (18, 5), **t5}, DOWN, UP)), NOT_STATED)
        assert [each.name.partition(".")[0] for each in adapter.targets] == [component, "transformer"]


def test_a_name_that_no_table_has_is_refused_and_never_guessed() -> None:
    problems = find(one("lora_unet_my_new_block_0_to_q"), "LF314")
    assert [problem.where for problem in problems] == ["lora_unet_my_new_block_0_to_q"]


def test_the_base_tells_a_name_that_no_table_has() -> None:
    facts = BaseFacts("model", frozenset({"my_new.block.0.to_q", "my_new.block.0.to_k"}))
    bundle = replace(one("lora_unet_my_new_block_0_to_q"), facts=facts)
    (target,) = SCHEME.read(bundle, NOT_STATED).targets
    assert target.name == "unet.my_new.block.0.to_q"
    written = SCHEME.write(SCHEME.read(bundle, NOT_STATED), facts)
    assert store(written.tensors) == store(bundle.tensors)


def test_a_base_in_which_a_name_may_be_two_modules_is_asked_about() -> None:
    facts = BaseFacts("model", frozenset({"a_b.c", "a.b_c"}))
    (problem,) = find(replace(one("lora_unet_a_b_c"), facts=facts), "LF314")
    assert "a.b_c or a_b.c" in problem.found


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (2.0, 1.0), (3.0, 1.5)])
def test_scales(alpha: float | None, scale: float) -> None:
    (target,) = SCHEME.read(one(TO_Q, alpha=alpha), NOT_STATED).targets
    assert target.scale == scale


def test_an_alpha_is_kept_as_it_was_stored() -> None:
    """10.67 is 10.6875 in bfloat16: the number that every reader sees, and the tensor goes back as it was."""
    bundle = one(TO_Q, alpha=10.67, dtype=m.BFLOAT16)
    adapter = SCHEME.read(bundle, NOT_STATED)
    assert adapter.targets[0].scaling == Scaling(ScalingRule.ALPHA_OVER_RANK, 10.6875)
    assert SCHEME.write(adapter, NO_FACTS).tensors[f"{TO_Q}.alpha"].dtype.name == "bfloat16"


def test_a_scale_by_the_root_of_the_rank_becomes_an_alpha() -> None:
    """alpha / sqrt(rank) = (alpha * sqrt(rank)) / rank, which float32 holds or rounds."""
    adapter = SCHEME.read(one(TO_Q, rank=4), NOT_STATED)
    (target,) = adapter.targets
    rooted = replace(target, scaling=Scaling(ScalingRule.ALPHA_OVER_SQRT_RANK, 3.0))
    written = SCHEME.write(replace(adapter, targets=(rooted,)), NO_FACTS)
    assert float(written.tensors[f"{TO_Q}.alpha"].read()) == 6.0
    odd = replace(target, rank=2, scaling=Scaling(ScalingRule.ALPHA_OVER_SQRT_RANK, 3.0))
    (problem,) = SCHEME.write(replace(adapter, targets=(odd,)), NO_FACTS).problems
    assert (problem.code, problem.severity) == ("LF320", "note")


def test_a_stated_scale_holds_where_no_alpha_is() -> None:
    (target,) = SCHEME.read(one(TO_Q), StatedScale(alpha=6.0)).targets
    assert target.scaling == Scaling(ScalingRule.ALPHA_OVER_RANK, 6.0)


@pytest.mark.parametrize("text", ['{"split_qkv": "True", "train_blocks": "all"}', '["split_qkv=True"]'])
def test_parts_that_were_trained_apart_and_saved_fused_are_pointed_out(text: str) -> None:
    tensors = m.lora(m.flat("lora_unet", m.FLUX_BFL), DOWN, UP, alpha=2.0)
    (problem,) = find(bundle_of(tensors, ss_network_args=text), "LF324")
    assert problem.severity == "warning"
    assert not find(bundle_of(tensors, ss_network_args='{"split_qkv": "False"}'), "LF324")


def test_alphas_that_are_no_number() -> None:
    bundle = bundle_of(dict(one(TO_Q).tensors) | m.tensors({f"{TO_Q}.alpha": np.ones((2,))}))
    with pytest.raises(Exception, match="LF203"):
        SCHEME.read(bundle, NOT_STATED)


def test_kinds_and_slots_of_payloads() -> None:
    bundle = bundle_of(payload(TO_Q, LOHA) | payload(TO_K, LOKR))
    kinds = {
        target.name.rpartition(".")[2]: (target.kind, target.slot, target.rank)
        for target in SCHEME.read(bundle, NOT_STATED).targets
    }
    assert kinds == {"to_q": ("loha", SlotKind.LINEAR, 2), "to_k": ("lokr", SlotKind.LINEAR, 2)}


def test_a_magnitude_of_outputs_is_that_of_dora_and_one_of_inputs_is_not() -> None:
    for shape, role, stored, kind in (
        ((8, 1), "lora_magnitude_vector", (8,), "dora"),
        ((1, 5), "dora_scale", (1, 5), "dora"),
    ):
        bundle = bundle_of(payload(TO_Q, {DOWN: (2, 5), UP: (8, 2), "dora_scale": shape}))
        (target,) = SCHEME.read(bundle, NOT_STATED).targets
        assert target.kind == kind
        assert target.factors[role].shape == stored


def test_an_alpha_alone_is_an_orphan() -> None:
    bundle = bundle_of(dict(one(TO_Q).tensors) | m.tensors({f"{TO_K}.alpha": np.ones(())}))
    assert [problem.where.rpartition(".")[2] for problem in find(bundle, "LF201")] == ["to_k"]


@pytest.mark.parametrize(
    ("module", "roles", "kind", "slot", "rank"),
    [
        (CONV, TUCKER, "locon", SlotKind.CONV, 2),
        (TO_Q, LOHA | {"dora_scale": (8, 1)}, "dora_loha", SlotKind.LINEAR, 2),
        (TO_Q, LOKR | {"dora_scale": (1, 15)}, "dora_lokr", SlotKind.LINEAR, 2),
        (TO_Q, GLORA, "lycoris_glora", SlotKind.LINEAR, 2),
        (TO_Q, {"diff": (8, 5), "diff_b": (8,)}, "diff", SlotKind.LINEAR, 0),
        (TO_Q, {"diff_b": (8,)}, "diff", SlotKind.PARAMETER, 0),
        (CONV, {"diff": (8, 5, 3, 3)}, "diff", SlotKind.CONV, 0),
        (NORM, {"w_norm": (5,), "b_norm": (5,)}, "diff", SlotKind.PARAMETER, 0),
        (NORM, {"w_norm": (5, 3)}, "diff", SlotKind.PARAMETER, 0),
        (TO_Q, {"oft_blocks": (2, 4, 4)}, "lycoris_oft", SlotKind.LINEAR, 0),
        (CONV, {"oft_blocks": (2, 4, 4), "rescale": (8, 1, 1, 1)}, "lycoris_oft", SlotKind.CONV, 0),
        (TO_Q, {"oft_blocks": (2, 2, 4, 4), "rescale": (8, 1)}, "lycoris_boft", SlotKind.LINEAR, 0),
    ],
)
def test_payloads_are_of_kinds_that_merge(
    module: str, roles: Mapping[str, tuple[int, ...]], kind: str, slot: SlotKind, rank: int
) -> None:
    (target,) = SCHEME.read(bundle_of(payload(module, roles)), NOT_STATED).targets
    assert (target.kind, target.slot, target.rank) == (kind, slot, rank)
    found = KINDS.find(kind)
    assert found is not None
    assert not found.check(target)


@pytest.mark.parametrize("side", [0, 1])
def test_a_number_beside_says_which_side_ia3_multiplies(side: int) -> None:
    ia3 = payload(TO_Q, {"weight": (8,)})
    (target,) = SCHEME.read(bundle_of(ia3 | numbers(TO_Q, on_input=np.array(side))), NOT_STATED).targets
    assert (target.kind, target.options) == ("lycoris_ia3", {"on_input": bool(side)})
    (silent,) = SCHEME.read(bundle_of(ia3), NOT_STATED).targets
    kind = KINDS.find("lycoris_ia3")
    assert kind is not None
    assert [problem.code for problem in kind.check(silent)] == ["LF230"]
    with pytest.raises(Exception, match="LF203"):
        SCHEME.read(bundle_of(ia3 | numbers(TO_Q, on_input=np.ones(2))), NOT_STATED)


def test_the_alpha_of_a_rotation_is_its_bound_and_no_scale() -> None:
    bundle = bundle_of(payload(TO_Q, {"oft_blocks": (2, 4, 4)}) | numbers(TO_Q, alpha=np.array(0.1)))
    adapter = SCHEME.read(bundle, NOT_STATED)
    (target,) = adapter.targets
    assert (target.options, target.scale) == ({"constraint": 0.1}, 1.0)
    fresh = SCHEME.write(replace(adapter, provenance={}), NO_FACTS).tensors[f"{TO_Q}.alpha"]
    assert (fresh.dtype.name, float(fresh.read())) == ("float64", 0.1)


def test_parts_with_lengths_of_inputs_are_not_fused() -> None:
    """Those of a fused weight would be lengths over all its parts."""
    parts = m.flat("lora_unet", m.FLUX_DIFFUSERS)
    lengths = {f"{module}.dora_scale": np.ones((1, shape[1]), np.float32) for module, shape in parts.items()}
    bundle = bundle_of(m.lora(parts, DOWN, UP, alpha=2.0) | dict(m.tensors(lengths)))
    source = Source(PATH, bundle, SCHEME.read(bundle, NOT_STATED), "")
    converted = convert_source(source, DOTTED, NO_FACTS, Rounding())
    against = [problem for problem in converted.problems if problem.severity == "error"]
    assert {problem.code for problem in against} == {"LF315"}
    assert any("dora_scale" in problem.found for problem in against)


def test_what_is_added_to_a_bias_beside_a_lora_is_not_scaled(tmp_path: Path) -> None:
    """ComfyUI adds `diff_b` as it is, whatever alpha says of the weight."""
    dice, module = np.random.default_rng(2), "diffusion_model.blocks.0.cross_attn.k"
    down, up, added = (dice.standard_normal(shape).astype(np.float32) for shape in ((3, 5), (8, 3), (8,)))
    tensors = {f"{module}.{DOWN}": down, f"{module}.{UP}": up, f"{module}.diff_b": added}
    tensors[f"{module}.alpha"] = np.array(2.0, np.float32)
    adapter = write_tensors(tmp_path / "wan.safetensors", tensors)
    weight, bias = dice.standard_normal((8, 5)).astype(np.float32), dice.standard_normal(8).astype(np.float32)
    name = module.removeprefix("diffusion_model.")
    base = write_tensors(tmp_path / "base.safetensors", {f"{name}.weight": weight, f"{name}.bias": bias})
    loraformat.merge(base, [(adapter, 0.5)], tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    np.testing.assert_array_equal(merged[f"{name}.bias"], (bias + 0.5 * added.astype(np.float64)).astype(np.float32))
    np.testing.assert_allclose(merged[f"{name}.weight"], weight + 0.5 * 2 / 3 * up @ down, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("more", [{"diff": (8, 5)}, {"lora_B.bias": (8,)}])
def test_two_changes_of_one_parameter_are_refused(more: Mapping[str, tuple[int, ...]]) -> None:
    """ComfyUI lets one of them win in silence."""
    bundle = bundle_of(payload("diffusion_model.x", {DOWN: (2, 5), UP: (8, 2), "diff_b": (8,), **more}))
    (target,) = DOTTED.read(bundle, NOT_STATED).targets
    assert target.kind == "diff and lora"
    assert KINDS.find(target.kind) is None


def test_embeddings_of_tokens_are_carried_and_not_merged(tmp_path: Path) -> None:
    modules = m.flat("lora_unet", m.SD1_DIFFUSERS)
    arrays = {name: each.read() for name, each in (m.lora(modules, DOWN, UP, alpha=1.0) | TOKENS).items()}
    source = write_tensors(tmp_path / "a.safetensors", arrays)
    token = {each.name: each for each in loraformat.load(source).targets}["bundle_emb.my.token"]
    assert (token.kind, token.slot, set(token.factors)) == ("token embedding", SlotKind.PARAMETER, {"clip_l", "t5_out"})
    (verdict,) = loraformat.validate(source)
    refused = [problem for problem in verdict.problems if problem.severity == "error"]
    assert [(problem.code, problem.where) for problem in refused] == [("LF209", "bundle_emb.my.token")]
    for scheme in ("dotted", "native", "kohya"):
        output = tmp_path / f"{scheme}.safetensors"
        loraformat.convert(source, scheme, output, verify=True)
        assert output.read_bytes().count(b"bundle_emb.my.token.clip_l") == 1
        source = output
    plan = loraformat.plan_conversion(source, "diffusers")
    assert [problem.where for problem in plan.problems if problem.severity == "error"] == ["bundle_emb.my.token"]


def rotate(blocks: np.ndarray, weight: np.ndarray, alpha: float) -> np.ndarray:
    """Return a part of a weight as sd-scripts' networks/oft_flux.py merges it."""
    skew = blocks.astype(np.float64) - blocks.astype(np.float64).swapaxes(1, 2)
    length = np.linalg.norm(skew)
    skew *= (min(length, alpha * len(weight)) + 1e-8) / (length + 1e-8)
    one = np.eye(blocks.shape[1])
    turns = [(one + each) @ np.linalg.inv(one - each) for each in skew]
    size = blocks.shape[1]
    return np.concatenate([turn.T @ weight[n * size : (n + 1) * size] for n, turn in enumerate(turns)])


def test_rotations_of_the_parts_of_a_fused_weight(tmp_path: Path) -> None:
    """FLUX.1's q, k, v and the rows of linear1 are turned one by one, each within its own bound."""
    dice = np.random.default_rng(2)
    double, single = "transformer_blocks.0.attn", "single_transformer_blocks.0"
    parts = {
        "double_blocks_0_img_attn_qkv": [(f"{double}.to_{part}", 4) for part in "qkv"],
        "single_blocks_0_linear1": [*((f"{single}.attn.to_{part}", 4) for part in "qkv"), (f"{single}.proj_mlp", 16)],
        "double_blocks_0_img_attn_proj": [(f"{double}.to_out.0", 4)],
    }
    base: dict[str, np.ndarray] = {}
    tensors: dict[str, np.ndarray] = {}
    expected: dict[str, np.ndarray] = {}
    for stem, modules in parts.items():
        tensors[f"oft_unet_{stem}.alpha"] = np.array(0.1, np.float32)
        for n, (module, rows) in enumerate(modules):
            weight = base[f"{module}.weight"] = dice.standard_normal((rows, 6)).astype(np.float32)
            blocks = 0.3 * dice.standard_normal((2, rows // 2, rows // 2)).astype(np.float32)
            tensors[f"oft_unet_{stem}.oft_blocks.{n}"] = blocks
            expected[f"{module}.weight"] = rotate(blocks, weight, float(tensors[f"oft_unet_{stem}.alpha"]))
    save_file(base, tmp_path / "base.safetensors")
    save_file(tensors, tmp_path / "oft.safetensors")
    loraformat.merge(tmp_path / "base.safetensors", tmp_path / "oft.safetensors", tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for name, weight in expected.items():
        np.testing.assert_allclose(merged[name], weight, atol=1e-5, err_msg=name)
    fused = {f"{stem.replace('_0_', '.0.').replace('_attn_', '_attn.')}.weight": 0 for stem in parts}
    save_file(dict.fromkeys(fused, np.ones((28, 6), np.float32)), tmp_path / "bfl.safetensors")
    with pytest.raises(LoraformatError, match=r"LF315(?s:.*)lycoris_oft"):
        loraformat.merge(tmp_path / "bfl.safetensors", tmp_path / "oft.safetensors", tmp_path / "no.safetensors")


@pytest.mark.parametrize("role", ["bm.weight", "oft_S.weight"])
def test_a_weight_that_is_none_of_ia3_is_refused(role: str) -> None:
    """(IA)³ has its side beside it; anything else called so is some other tool's."""
    dotted = "diffusion_model.double_blocks.0.img_attn.proj"
    for scheme, module, code in ((DOTTED, dotted, "LF202"), (SCHEME, TO_Q, "LF314")):
        tensors = payload(module, {role: (6, 5), DOWN: (2, 5), UP: (6, 2)})
        problems = scheme.read(bundle_of(tensors), NOT_STATED).problems
        assert code in {problem.code for problem in problems if problem.severity == "error"}
