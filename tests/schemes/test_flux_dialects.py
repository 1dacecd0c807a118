"""Dialects of FLUX adapters that are only read: XLabs, OMI and fal."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from laws.scheme_laws import SchemeLaws
from loraformat.errors import LoraformatError
from loraformat.schemes import NOT_STATED, Bundle, StatedScale, fal, omi, xlabs
from schemes import modules as m

WIDTH = 6


def bundle_of(tensors: Mapping[str, object]) -> Bundle:
    return Bundle(Path("a.safetensors"), dict(tensors))  # type: ignore[arg-type]


def processors(prefix: str = "") -> dict[str, object]:
    shapes = {
        "double_blocks.0.processor.qkv_lora1": (3 * WIDTH, 5),
        "double_blocks.0.processor.proj_lora2": (WIDTH, 5),
        "single_blocks.4.processor.qkv_lora": (3 * WIDTH, 5),
        "single_blocks.4.processor.proj_lora": (WIDTH, 5 * 5),
    }
    return dict(m.lora(m.behind(prefix, shapes), "down.weight", "up.weight"))


class TestXlabs(SchemeLaws):
    scheme = xlabs.SCHEME
    stated = StatedScale(multiplier=0.7)

    def examples(self) -> Mapping[str, Bundle]:
        return {"bare": bundle_of(processors()), "prefixed": bundle_of(processors("diffusion_model."))}


class TestOmi(SchemeLaws):
    scheme = omi.SCHEME

    def examples(self) -> Mapping[str, Bundle]:
        parts = {f"transformer.double_blocks.0.img_attn.qkv.{part}": (WIDTH, 5) for part in range(3)}
        parts |= {"transformer.single_blocks.1.linear1.3": (4 * WIDTH, 5), "transformer.img_in": (WIDTH, 4)}
        texts = m.behind("clip_l.", m.CLIP) | m.behind("t5.", m.T5)
        return {"FLUX.1": bundle_of(m.lora(parts | texts, "lora_down.weight", "lora_up.weight", alpha=3.0))}


class TestFal(SchemeLaws):
    scheme = fal.SCHEME

    def examples(self) -> Mapping[str, Bundle]:
        return {
            "Kontext": bundle_of(m.lora(m.behind("base_model.model.", m.FLUX_BFL), "lora_A.weight", "lora_B.weight")),
            "Krea 2": bundle_of(
                m.lora({"base_model.model.blocks.0.attn.wq": (6, 5)}, "lora_A.weight", "lora_B.weight")
            ),
        }


def test_xlabs_covers_the_first_parts_of_linear1() -> None:
    tensors = processors()
    adapter = xlabs.SCHEME.read(bundle_of(tensors), StatedScale(multiplier=1.0))
    targets = {target.name: target for target in adapter.targets}
    up = targets["transformer.single_blocks.4.linear1"].factors["lora_B.weight"].read()
    stored = tensors["single_blocks.4.processor.qkv_lora.up.weight"].read()  # type: ignore[attr-defined]
    assert up.shape == (7 * WIDTH, 2)
    np.testing.assert_array_equal(up[: 3 * WIDTH], stored)
    assert not up[3 * WIDTH :].any()
    assert set(targets) == {
        "transformer.double_blocks.0.img_attn.qkv",
        "transformer.double_blocks.0.txt_attn.proj",
        "transformer.single_blocks.4.linear1",
        "transformer.single_blocks.4.linear2",
    }


def test_xlabs_must_be_told_its_scale() -> None:
    with pytest.raises(LoraformatError) as caught:
        xlabs.SCHEME.read(bundle_of(processors()), NOT_STATED)
    assert caught.value.codes == ("LF211",)


def test_fal_beside_a_configuration_is_peft() -> None:
    bundle = TestFal().examples()["Kontext"]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    assert fal.SCHEME.detect(Bundle(bundle.path, bundle.tensors, config=config)) is None
