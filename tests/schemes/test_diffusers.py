"""diffusers' files: four generations of names, and scales in an annotation, in tensors, or nowhere."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from laws.scheme_laws import SchemeLaws
from loraformat.adapter import Adapter, Scaling, ScalingRule
from loraformat.base_facts import NO_FACTS
from loraformat.schemes import NOT_STATED, SCHEMES, Bundle
from loraformat.schemes._memory import PROVENANCE_KEY
from loraformat.schemes.diffusers import SCHEME
from schemes import modules as m

A, B = "lora_A.weight", "lora_B.weight"
ENCODER = m.behind("text_encoder.", m.CLIP)
QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def bundle_of(tensors: Mapping[str, object], **metadata: object) -> Bundle:
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    return Bundle(Path("pytorch_lora_weights.safetensors"), dict(tensors), texts)  # type: ignore[arg-type]


def with_fields(tensors: Mapping[str, object], **fields: object) -> Bundle:
    return bundle_of(tensors, lora_adapter_metadata={name.replace("__", "."): each for name, each in fields.items()})


class TestDiffusers(SchemeLaws):
    scheme = SCHEME

    def examples(self) -> Mapping[str, Bundle]:
        sd1 = m.behind("unet.", m.SD1_DIFFUSERS) | ENCODER
        flux = m.behind("transformer.", m.FLUX_DIFFUSERS)
        return {
            "PEFT's style": bundle_of(m.lora(sd1, A, B)),
            "FLUX.1, bfloat16": bundle_of(m.lora(flux, A, B, dtype=m.BFLOAT16)),
            "FLUX.1, other ranks": bundle_of(m.lora(flux, A, B, ranks=(1, 3))),
            "an adapter's name in the keys": bundle_of(m.lora(flux, "lora_A.default.weight", "lora_B.default.weight")),
            "the middle generation": bundle_of(m.lora(sd1, "lora.down.weight", "lora.up.weight")),
            "linear layers of text encoders": bundle_of(
                m.lora(ENCODER, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
            ),
            "attention processors": bundle_of(_processors()),
            "Wan with two transformers": bundle_of(
                m.lora(
                    {
                        "transformer.blocks.0.attn1.to_q": (6, 5),
                        "transformer_2.blocks.0.attn1.to_q": (6, 5),
                    },
                    A,
                    B,
                )
            ),
            "a dump of PEFT": bundle_of(m.lora(m.behind("transformer.base_model.model.", m.FLUX_DIFFUSERS), A, B)),
        }


class TestDiffusersWithoutComponents(TestDiffusers):
    def examples(self) -> Mapping[str, Bundle]:
        return {
            "a UNet alone": bundle_of(m.lora(m.SD1_DIFFUSERS, A, B)),
            "a transformer alone": bundle_of(m.lora(m.FLUX_DIFFUSERS, A, B)),
        }


def _processors() -> dict[str, object]:
    named = {}
    for name, ends in (("q", (8, 5)), ("out", (8, 7))):
        named |= m.lora({f"{QUERY}.processor": ends}, f"to_{name}_lora.down.weight", f"to_{name}_lora.up.weight")
    return dict(named)


def read(bundle: Bundle) -> Adapter:
    return SCHEME.read(bundle, NOT_STATED)


def test_old_generations_are_the_same_modules() -> None:
    assert [target.name for target in read(bundle_of(_processors())).targets] == [f"{QUERY}.to_out.0", f"{QUERY}.to_q"]
    old = m.lora(
        {"text_encoder.text_model.encoder.layers.0.self_attn": (6, 5)},
        "to_out_lora.down.weight",
        "to_out_lora.up.weight",
    )
    (target,) = read(bundle_of(old)).targets
    assert target.name == "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"


def test_the_annotation_states_ranks_and_scales_by_component() -> None:
    modules = {
        f"{QUERY}.to_q": (8, 5),
        f"{QUERY}.to_k": (8, 5),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": (8, 5),
    }
    bundle = with_fields(
        m.lora(modules, A, B),
        unet__r=2,
        unet__lora_alpha=16,
        unet__alpha_pattern={"attn1.to_k": 5},
        text_encoder__r=2,
        text_encoder__lora_alpha=3,
        text_encoder__use_rslora=True,
    )
    scalings = {target.name.rpartition(".")[2]: target.scaling for target in read(bundle).targets}
    assert scalings == {
        "to_q": Scaling(ScalingRule.ALPHA_OVER_RANK, 16.0),
        "to_k": Scaling(ScalingRule.ALPHA_OVER_RANK, 5.0),
        "fc1": Scaling(ScalingRule.ALPHA_OVER_SQRT_RANK, 3.0),
    }


def test_a_file_without_components_has_an_annotation_without_components() -> None:
    bundle = with_fields(m.lora(m.SD1_DIFFUSERS, A, B), r=2, lora_alpha=16)
    adapter = read(bundle)
    assert {target.scale for target in adapter.targets} == {8.0}
    assert all(target.name.startswith("unet.") for target in adapter.targets)
    written = SCHEME.write(adapter, NO_FACTS)
    assert set(written.tensors) == set(bundle.tensors)
    assert json.loads(str(written.metadata["lora_adapter_metadata"]))["lora_alpha"] == 16


def test_alpha_tensors_win_over_nothing() -> None:
    (target,) = read(bundle_of(m.lora({f"{QUERY}.to_q": (8, 5)}, A, B, alpha=6.0))).targets
    assert target.scale == 3.0


def test_without_any_scale_it_is_one_and_that_is_said() -> None:
    adapter = read(bundle_of(m.lora({f"{QUERY}.to_q": (8, 5)}, A, B)))
    assert adapter.targets[0].scale == 1.0
    assert [problem.severity for problem in adapter.problems if problem.code == "LF321"] == ["note"]


def test_the_scales_go_into_the_annotation_as_exact_patterns() -> None:
    adapter = read(bundle_of(m.lora({f"{QUERY}.to_q": (8, 5), f"{QUERY}.to_k": (8, 5), f"{QUERY}.to_v": (8, 5)}, A, B)))
    first, *others = adapter.targets
    odd = replace(first, scaling=Scaling(ScalingRule.ALPHA_OVER_RANK, 7.0))
    written = SCHEME.write(replace(adapter, targets=(odd, *others)), NO_FACTS)
    fields = json.loads(str(written.metadata["lora_adapter_metadata"]))
    path = first.name.removeprefix("unet.")
    assert fields["unet.alpha_pattern"] == {"^" + path.replace(".", r"\."): 7}
    assert fields["unet.target_modules"] == sorted(each.name.removeprefix("unet.") for each in adapter.targets)


def test_an_annotation_that_still_says_the_same_is_kept_to_the_letter() -> None:
    bundle = with_fields(m.lora(m.SD1_DIFFUSERS, A, B), r=2, lora_alpha=16, something_of_next_year={"x": [1]})
    adapter = read(bundle)
    text = bundle.metadata["lora_adapter_metadata"]
    assert SCHEME.write(adapter, NO_FACTS).metadata["lora_adapter_metadata"] == text
    first, *others = adapter.targets
    odd = replace(adapter, targets=(replace(first, scaling=Scaling(ScalingRule.ALPHA_OVER_RANK, 7.0)), *others))
    assert SCHEME.write(odd, NO_FACTS).metadata["lora_adapter_metadata"] != text


def test_a_provenance_that_is_no_json_is_passed_over() -> None:
    bundle = bundle_of(m.lora({f"{QUERY}.to_q": (8, 5)}, A, B))
    assert not read(replace(bundle, metadata={PROVENANCE_KEY: "{"})).provenance.keys() - {"diffusers"}


@pytest.mark.parametrize("kind", ["loha", "oft"])
def test_what_diffusers_has_no_place_for(kind: str) -> None:
    adapter = read(bundle_of(m.lora({f"{QUERY}.to_q": (8, 5)}, A, B)))
    target = replace(adapter.targets[0], kind=kind, factors=m.tensors({"hada_w1_a": np.ones((2, 3))}))
    codes = [problem.code for problem in SCHEME.write(replace(adapter, targets=(target,)), NO_FACTS).problems]
    assert set(codes) == {"LF312"}


@pytest.mark.parametrize(
    "path",
    [
        "double_stream_blocks.0.block.attn1.to_q",
        "single_stream_blocks.0.block.attn1.to_q",
        "joint_transformer_blocks.0.attn.to_q",
        "visual_transformer_blocks.0.self_attention.to_query",
    ],
)
def test_transformers_of_other_models(path: str) -> None:
    bundle = bundle_of(m.lora({f"transformer.{path}": (6, 5)}, A, B))
    assert [name for name, scheme in SCHEMES if scheme.detect(bundle)] == ["diffusers"]
    (target,) = SCHEME.read(bundle, NOT_STATED).targets
    assert (target.name, target.scale) == (f"transformer.{path}", 1)


def test_ai_toolkit_s_magnitudes() -> None:
    tensors = m.lora({"transformer.transformer_blocks.0.attn.to_q": (6, 5)}, A, B)
    magnitude = m.tensors({"transformer.transformer_blocks.0.attn.to_q.magnitude": np.ones(6, np.float32)})
    (target,) = SCHEME.read(bundle_of({**tensors, **magnitude}), NOT_STATED).targets
    assert target.kind == "dora"


def test_magnitudes_at_some_targets_of_a_component_are_refused() -> None:
    """`use_dora` is said of a whole component: PEFT would make up the magnitudes that are missing."""
    magnitude = m.tensors({f"{QUERY}.to_q.lora_magnitude_vector": np.ones(8, np.float32)})
    beside = m.lora({"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (6, 5)}, A, B)
    whole = read(bundle_of({**m.lora({f"{QUERY}.to_q": (8, 5)}, A, B), **magnitude, **beside}))
    assert not SCHEME.write(whole, NO_FACTS).problems
    some = read(bundle_of({**m.lora({f"{QUERY}.to_q": (8, 5), f"{QUERY}.to_k": (8, 5)}, A, B), **magnitude, **beside}))
    (problem,) = SCHEME.write(some, NO_FACTS).problems
    assert (problem.code, problem.where) == ("LF312", f"{QUERY}.to_k")
