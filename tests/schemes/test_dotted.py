"""Dotted native names: with and without prefix, with every payload, and PEFT's configuration beside them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loraformat
from laws.scheme_laws import SchemeLaws
from loraformat.base_facts import NO_FACTS
from loraformat.loading import load_adapter
from loraformat.loading.readers import choose_scheme
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes.dotted import SCHEME
from schemes import modules as m

A, B = "lora_A.weight", "lora_B.weight"
BEHIND = "diffusion_model."


def bundle_of(tensors: Mapping[str, object], **metadata: str) -> Bundle:
    return Bundle(Path("a.safetensors"), dict(tensors), metadata)  # type: ignore[arg-type]


def control() -> dict[str, object]:
    """Return BFL's control adapter in small: biases of B, and whole norms."""
    more = {f"{name}.lora_B.bias": np.ones(shape[0], np.float32) for name, shape in m.FLUX_BFL.items()}
    more["double_blocks.0.img_attn.norm.query_norm.scale"] = np.ones(4, np.float32)
    more["single_blocks.11.norm.key_norm.scale"] = np.ones(4, np.float32)
    return dict(m.lora(m.FLUX_BFL, A, B)) | dict(m.tensors(more))


class TestDotted(SchemeLaws):
    scheme = SCHEME

    def examples(self) -> Mapping[str, Bundle]:
        texts = m.behind("text_encoders.clip_l.transformer.", m.CLIP)
        t5 = m.behind("text_encoders.t5xxl.transformer.", m.T5)
        flux = m.behind(BEHIND, m.FLUX_BFL)
        lokr = {
            f"{BEHIND}double_blocks.0.img_attn.qkv.{role}": np.ones(shape)
            for role, shape in (("lokr_w1", (3, 2)), ("lokr_w2", (6, 4)), ("alpha", ()))
        }
        return {
            "ComfyUI": bundle_of(m.lora(flux | texts | t5, "lora_down.weight", "lora_up.weight", alpha=3.0)),
            "ai-toolkit": bundle_of(m.lora(flux, A, B, dtype=m.BFLOAT16), software='{"name":"ai-toolkit"}'),
            "SDXL": bundle_of(m.lora(m.behind(BEHIND, m.SDXL_SGM), A, B)),
            "Wan": bundle_of(m.lora(m.behind(BEHIND, m.WAN_NATIVE), A, B)),
            "a model that no table has": bundle_of(m.lora({f"{BEHIND}blocks.0.mixer.layer1": (6, 5)}, A, B)),
            "LoKr": bundle_of(m.tensors(lokr)),
            "diffusion-pipe": replace(
                bundle_of(m.lora(flux, A, B)), config={"peft_type": "LORA", "r": 2, "lora_alpha": 2}
            ),
        }

    def test_written_again_it_is_the_same_file(self) -> None:
        """But for diffusion-pipe's configuration, which becomes alphas."""
        for name, bundle, _, converted in self.write_examples():
            alphas = {key for key in converted.written.tensors if key.endswith(".alpha")} if bundle.config else set()
            assert set(converted.written.tensors) - alphas == set(bundle.tensors), name


class TestDottedKnown(TestDotted):
    """Files without a prefix, or with one of a trainer's, known by the names of a model that a table has."""

    def examples(self) -> Mapping[str, Bundle]:
        mochi = {"blocks.0.attn.qkv_x": (18, 5), "blocks.1.attn.proj_x": (6, 5), "blocks.0.mlp_x.w1": (16, 5)}
        lokr = {
            f"transformer.layers.0.self_attention.to_q.{role}": np.ones(shape)
            for role, shape in (("lokr_w1", (3, 2)), ("lokr_w2", (6, 4)), ("alpha", ()))
        }
        differences = {
            "diffusion_model.blocks.0.diff_m": np.ones((1, 6, 5), np.float32),
            "diffusion_model.blocks.0.norm3.diff": np.ones(5, np.float32),
            "diffusion_model.blocks.0.norm3.diff_b": np.ones(5, np.float32),
        }
        diffsynth = {"blocks.0.attn.a_to_qkv": (18, 5), "single_blocks.3.to_qkv_mlp": (42, 5)}
        return {
            "Mochi": bundle_of(m.lora(mochi, "lora_A", "lora_B")),
            "DiffSynth's Wan": bundle_of(m.lora(m.WAN_NATIVE, "lora_A.default.weight", "lora_B.default.weight")),
            "DiffSynth's FLUX": bundle_of(m.lora(m.behind("pipe.dit.", diffsynth), A, B)),
            "LoKr under diffusers' names": bundle_of(m.tensors(lokr)),
            "Ideogram 4": bundle_of(m.lora({"conditional_transformer.layers.0.attention.o": (6, 5)}, A, B)),
            "LightX2V": bundle_of(m.tensors(differences)),
        }

    def test_written_again_it_is_the_same_file(self) -> None:
        for name, bundle, _, converted in self.write_examples():
            assert set(converted.written.tensors) == set(bundle.tensors), name


class TestDottedBare(TestDotted):
    unmergeable = frozenset({"LF209", "LF202"})  # A norm's `scale` is a parameter that no kind replaces yet.

    def examples(self) -> Mapping[str, Bundle]:
        return {
            "BFL control": bundle_of(control()),
            "original names": bundle_of(m.lora(m.SD3_MMDIT, "lora_down.weight", "lora_up.weight", alpha=1.0)),
        }


def test_a_configuration_of_peft_does_not_make_it_peft() -> None:
    bundle = self_made = TestDotted().examples()["diffusion-pipe"]
    scheme, evidence = choose_scheme(bundle, None)
    assert scheme is SCHEME
    assert "diffusion_model." in evidence
    assert {target.scale for target in SCHEME.read(self_made, NOT_STATED).targets} == {1.0}


def test_control_adapters_keep_their_biases_and_norms() -> None:
    adapter = SCHEME.read(bundle_of(control()), NOT_STATED)
    kinds = {target.name: (target.kind, sorted(target.factors)) for target in adapter.targets}
    assert kinds["transformer.double_blocks.0.img_attn.norm.query_norm"] == ("replace", ["scale"])
    assert kinds["transformer.single_blocks.11.linear2"] == (
        "lora",
        ["lora_A.weight", "lora_B.bias", "lora_B.weight"],
    )


def test_a_model_that_no_table_has_keeps_its_names() -> None:
    bundle = bundle_of(m.lora({f"{BEHIND}blocks.0.mixer.layer1": (6, 5)}, A, B))
    adapter = SCHEME.read(bundle, NOT_STATED)
    assert [target.name for target in adapter.targets] == ["diffusion_model.blocks.0.mixer.layer1"]
    assert set(SCHEME.write(adapter, NO_FACTS).tensors) == set(bundle.tensors)


@pytest.mark.parametrize(
    ("role", "shape", "stored"),
    [
        ("dora_scale", (6, 1), "lora_magnitude_vector"),
        ("dora_scale", (6,), "lora_magnitude_vector"),
        ("dora_scale", (1, 5), "dora_scale"),
        ("magnitude", (6,), "lora_magnitude_vector"),
        ("lora_magnitude_vector", (6,), "lora_magnitude_vector"),
        ("lora_magnitude_vector.weight", (6,), "lora_magnitude_vector"),
        ("lora_magnitude_vector.default.weight", (6,), "lora_magnitude_vector"),
    ],
)
def test_magnitudes_in_every_spelling(role: str, shape: tuple[int, ...], stored: str) -> None:
    name = f"{BEHIND}blocks.0.self_attn.q"
    tensors = m.lora({name: (6, 5)}, A, B) | m.tensors({f"{name}.{role}": np.ones(shape, np.float32)})
    (target,) = SCHEME.read(bundle_of(tensors), NOT_STATED).targets
    assert (target.kind, sorted(set(target.factors) - {A, B})) == ("dora", [stored])


def test_the_conditioner_of_anima_is_a_component_of_its_own() -> None:
    names = {f"{BEHIND}blocks.0.self_attn.q_proj": (6, 5), f"{BEHIND}llm_adapter.blocks.0.self_attn.q_proj": (6, 5)}
    adapter = SCHEME.read(bundle_of(m.lora(names, A, B)), NOT_STATED)
    assert [target.name for target in adapter.targets] == [
        "text_conditioner.blocks.0.self_attn.q_proj",
        "transformer.blocks.0.self_attn.q_proj",
    ]
    assert set(SCHEME.write(adapter, NO_FACTS).tensors) == {f"{name}.{role}" for name in names for role in (A, B)}


@pytest.mark.parametrize(("down", "up"), [(A, B), ("lora.down.weight", "lora.up.weight")])
@pytest.mark.parametrize("component", ["transformer", "text_encoder", "text_encoder_3"])
def test_magnitudes_of_inputs_under_the_names_of_diffusers(component: str, down: str, up: str) -> None:
    """OneTrainer's format for diffusers, which leaves such magnitudes out: here they count."""
    name = f"{component}.encoder.block.0.layer.0.SelfAttention.q"
    tensors = m.lora({name: (6, 5)}, down, up) | m.tensors({f"{name}.dora_scale": np.ones((1, 5), np.float32)})
    scheme, evidence = choose_scheme(bundle_of(tensors), None)
    (target,) = scheme.read(bundle_of(tensors), NOT_STATED).targets
    assert (scheme.name, target.name, target.kind) == ("dotted", name, "dora")
    assert f"{name}.dora_scale" in evidence


def test_a_control_adapter_as_comfyui_saves_it(tmp_path: Path) -> None:
    """Norms behind `set_weight`, and the shape of the first layer: each comes back, and says what BFL's file says."""
    dice = np.random.default_rng(6)
    arrays = {
        "img_in.lora_A.weight": dice.standard_normal((2, 128)),
        "img_in.lora_B.weight": dice.standard_normal((12, 2)),
        "single_blocks.0.linear1.lora_A.weight": dice.standard_normal((2, 12)),
        "single_blocks.0.linear1.lora_B.weight": dice.standard_normal((84, 2)),
    }
    norm, scale = "double_blocks.0.img_attn.norm.query_norm.scale", dice.standard_normal(4)
    theirs = {f"diffusion_model.{key}": array for key, array in arrays.items()}
    theirs[f"diffusion_model.{norm}.set_weight"] = scale
    theirs["diffusion_model.img_in.reshape_weight"] = np.array([12, 128])
    save_file(theirs, tmp_path / "comfy.safetensors")
    save_file({**arrays, norm: scale}, tmp_path / "bfl.safetensors")
    adapters = [load_adapter(tmp_path / f"{name}.safetensors") for name in ("comfy", "bfl")]
    kinds = [{target.name: target.kind for target in adapter.targets} for adapter in adapters]
    assert kinds[0] == kinds[1]
    assert kinds[0]["transformer.img_in"] == "padded_lora"
    for name, tensors in (("comfy", theirs), ("bfl", {**arrays, norm: scale})):
        loraformat.convert(tmp_path / f"{name}.safetensors", "native", tmp_path / "native.safetensors", force=True)
        loraformat.convert(tmp_path / "native.safetensors", "dotted", tmp_path / "again.safetensors", force=True)
        found = load_file(tmp_path / "again.safetensors")
        assert set(found) == set(tensors)
        for key, array in tensors.items():
            np.testing.assert_array_equal(found[key], array)
