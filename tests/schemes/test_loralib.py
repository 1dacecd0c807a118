"""loralib: no scale in the file, merged layers, GPT-2's transposed modules."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loraformat
from builders import write_tensors
from laws.scheme_laws import SchemeLaws
from loraformat.adapter import SlotKind
from loraformat.base_facts import BaseFacts
from loraformat.errors import LoraformatError
from loraformat.schemes import NOT_STATED, Bundle, StatedScale
from loraformat.schemes.loralib import SCHEME
from schemes import decoders as d

A, B = ".lora_A", ".lora_B"
ROBERTA = {
    f"roberta.encoder.layer.{layer}.attention.self.{name}": (10, 7) for layer in (0, 11) for name in ("query", "value")
}


def bundle_of(tensors: Mapping[str, Any]) -> Bundle:
    return Bundle(Path("lora.bin"), dict(tensors))


def merged(groups: int, rank: int = 4) -> dict[str, Any]:
    dice = np.random.default_rng(groups)
    name = "transformer.h.0.attn.c_attn"
    return {
        f"{name}{A}": dice.standard_normal((groups * rank, 16)).astype(np.float32),
        f"{name}{B}": dice.standard_normal((groups * 16, rank)).astype(np.float32),
    }


class TestLoralib(SchemeLaws):
    scheme = SCHEME
    stated = StatedScale(alpha=16)
    facts = BaseFacts("config.json", architecture="gpt2")
    carries = False

    def is_restored(self, example: str) -> bool:
        return "merged" not in example

    def examples(self) -> Mapping[str, Bundle]:
        head = {"classifier.dense.weight": np.ones((5, 7), np.float32), "classifier.dense.bias": np.ones(5, np.float32)}
        return {
            "encoder with its head": bundle_of(d.factors(ROBERTA, A, B) | d.tensors(head)),
            "float16": bundle_of(d.factors(ROBERTA, A, B, dtype=np.float16)),
            "merged q and v": bundle_of(d.tensors(merged(2))),
            "merged q, k and v": bundle_of(d.tensors(merged(3))),
        }


def test_the_scale_must_be_stated() -> None:
    bundle = bundle_of(d.factors(ROBERTA, A, B))
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle, NOT_STATED)
    assert caught.value.codes == ("LF211",)
    assert {target.scale for target in SCHEME.read(bundle, StatedScale(alpha=12)).targets} == {4.0}


@pytest.mark.parametrize(("groups", "parts"), [(2, (0, 2)), (3, (0, 1, 2))])
def test_merged_layers_are_grouped_products_with_zeros_between(groups: int, parts: tuple[int, ...]) -> None:
    arrays = merged(groups)
    adapter = SCHEME.read(bundle_of(d.tensors(arrays)), StatedScale(alpha=8))
    (target,) = adapter.targets
    a, b = (each.astype(np.float64) for each in arrays.values())
    expected = np.zeros((48, 16))
    for group, part in enumerate(parts):
        expected[16 * part : 16 * part + 16] = 2 * b[16 * group : 16 * group + 16] @ a[4 * group : 4 * group + 4]
    found = (
        target.scale
        * target.factors["lora_B.weight"].read().astype(np.float64)
        @ target.factors["lora_A.weight"].read()
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert (target.scale, target.slot) == (2.0, SlotKind.LINEAR_TRANSPOSED)
    assert {problem.code for problem in adapter.problems} == ({"LF343"} if groups == 2 else set())


def test_other_numbers_of_groups_are_refused() -> None:
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle_of(d.tensors(merged(4))), StatedScale(alpha=8))
    assert caught.value.codes == ("LF342",)


def test_what_is_written_says_what_its_reader_must_be_told() -> None:
    adapter = SCHEME.read(bundle_of(d.factors(ROBERTA, A, B)), StatedScale(alpha=12))
    written = SCHEME.write(adapter, d.LLAMA)
    assert written.stated == StatedScale(alpha=12.0)
    assert [(problem.code, problem.severity) for problem in written.problems] == [("LF345", "warning")]
    assert "lora_alpha = 12" in str(written.problems[0])


def test_factors_of_a_convolution_are_told_by_the_base() -> None:
    arrays = {"stem.lora_A": np.ones((6, 12), np.float32), "stem.lora_B": np.ones((15, 6), np.float32)}
    kernels = {"stem.conv": (5, 4, 3, 3)}
    bundle = Bundle(Path("lora.pt"), d.tensors(arrays), facts=BaseFacts(kernels=kernels))
    (target,) = SCHEME.read(bundle, StatedScale(alpha=6)).targets
    assert (target.name, target.kind, target.slot) == ("stem.conv", "conv_lora", SlotKind.CONV)
    assert (target.rank, target.scale) == (2, 3.0)
    assert target.options == {"kernel_size": 3, "groups": 1, "axes": 2}
    for other in ({"stem": (5, 4, 3, 1)}, {"stem": (6, 4, 3, 3)}, {}):
        bundle = Bundle(Path("lora.pt"), d.tensors(arrays), facts=BaseFacts(kernels=other))
        assert SCHEME.read(bundle, StatedScale(alpha=6)).targets[0].kind == "lora"


def test_an_output_layer_beside_other_modules_is_no_mark_of_litgpt() -> None:
    head = d.factors({"lm_head": (12, 7)}, A, B)
    assert SCHEME.detect(bundle_of(head | d.factors({"model.layers.0.self_attn.q_proj": (10, 7)}, A, B)))
    assert not SCHEME.detect(bundle_of(head))


def test_lit_llama_stores_the_same_names_the_other_way(tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    name = "transformer.h.0.attn.c_attn"
    down, up = (dice.standard_normal(shape).astype(np.float32) for shape in ((8, 10), (20, 4)))
    base = {
        f"{name}.weight": np.ones((30, 10), np.float32),
        "transformer.h.0.mlp.c_fc1.weight": np.ones((7, 10), np.float32),
    }
    write_tensors(tmp_path / "a.safetensors", {f"{name}.lora_A": down, f"{name}.lora_B": up})
    write_tensors(tmp_path / "b.safetensors", base)
    loraformat.merge(tmp_path / "b.safetensors", tmp_path / "a.safetensors", output=tmp_path / "m.safetensors", alpha=8)
    merged = load_file(tmp_path / "m.safetensors")[f"{name}.weight"]
    want = 1 + 2 * np.concatenate([up[:10] @ down[:4], np.zeros((10, 10)), up[10:] @ down[4:]])
    assert np.allclose(merged, want, atol=1e-5)
