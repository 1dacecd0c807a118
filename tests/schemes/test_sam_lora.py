"""SAMed and LoRA-ViT: numbered pairs of q and v."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from laws.scheme_laws import SchemeLaws
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes.sam_lora import SCHEME
from schemes import decoders as d


def pairs(count: int) -> dict[str, Any]:
    dice = np.random.default_rng(count)
    arrays: dict[str, Any] = {}
    for index in range(count):
        arrays[f"w_a_{index:03d}"] = dice.standard_normal((3, 7)).astype(np.float32)
        arrays[f"w_b_{index:03d}"] = dice.standard_normal((5, 3)).astype(np.float32)
    return arrays


def bundle_of(arrays: Mapping[str, Any]) -> Bundle:
    return Bundle(Path("sam.pth"), d.tensors(arrays))


class TestSamLora(SchemeLaws):
    scheme = SCHEME

    def examples(self) -> Mapping[str, Bundle]:
        decoder = {"mask_decoder.iou_token.weight": np.ones((1, 4), np.float32), "fc.bias": np.ones(3, np.float32)}
        return {"pairs": bundle_of(pairs(4)), "pairs and a decoder": bundle_of(pairs(24) | decoder)}


def test_even_pairs_are_q_and_odd_ones_v() -> None:
    arrays = pairs(4)
    adapter = SCHEME.read(bundle_of(arrays), NOT_STATED)
    assert [(target.name, target.rank, target.scale) for target in adapter.targets] == [
        ("blocks.0.attn.qkv", 6, 1.0),
        ("blocks.1.attn.qkv", 6, 1.0),
    ]
    factors = adapter.targets[1].factors
    change = factors["lora_B.weight"].read().astype(np.float64) @ factors["lora_A.weight"].read()
    q, v = (arrays[f"w_b_{index:03d}"].astype(np.float64) @ arrays[f"w_a_{index:03d}"] for index in (2, 3))
    np.testing.assert_allclose(change, np.concatenate([q, np.zeros((5, 7)), v]), rtol=1e-12)
    assert [problem.code for problem in adapter.problems] == ["LF344"]


def test_a_block_without_one_of_its_tensors_is_named() -> None:
    arrays = pairs(4)
    del arrays["w_b_003"]
    problems = SCHEME.read(bundle_of(arrays), NOT_STATED).problems
    assert [(problem.code, problem.where) for problem in problems if problem.severity == "error"] == [
        ("LF201", "block 1")
    ]
