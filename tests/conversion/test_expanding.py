"""LoRA of slices becomes plain LoRA of the whole weight: the same change, in every order of rows."""

from pathlib import Path

import numpy as np
import pytest

import loraformat
from loraformat.adapter import Scaling, ScalingRule, SlotKind, Target
from schemes import modules as m

FLAGS = [True, False, True]
NAME = "transformer.h.0.self_attention.query_key_value"


def make_target(sizes: list[int], groups: int, scaling: Scaling) -> Target:
    dice = np.random.default_rng(0)
    rows = sum(size for size, flag in zip(sizes, FLAGS, strict=True) if flag)
    arrays = {"lora_A.weight": dice.standard_normal((6, 5)), "lora_B.weight": dice.standard_normal((rows, 3))}
    factors = m.tensors({role: array.astype(np.float32) for role, array in arrays.items()})
    options = {"enable_lora": list(FLAGS), "sizes": list(sizes), "groups": groups}
    return Target(NAME, "merged_linear", SlotKind.LINEAR, factors, 3, scaling, options=options)


@pytest.mark.parametrize(("sizes", "groups"), [([8, 8, 8], 1), ([8, 8, 8], 4), ([8, 4, 4], 2)])
@pytest.mark.parametrize("rule", list(ScalingRule))
def test_the_change_is_the_same(tmp_path: Path, sizes: list[int], groups: int, rule: ScalingRule) -> None:
    target = make_target(sizes, groups, Scaling(rule, 6.0))
    loraformat.save(loraformat.Adapter(targets=(target,)), tmp_path / "a.safetensors")
    loraformat.convert(tmp_path / "a.safetensors", "peft", tmp_path / "peft", verify=True)
    (plain,) = loraformat.load(tmp_path / "peft").targets
    assert (plain.kind, plain.rank, plain.factors["lora_B.weight"].shape) == ("lora", 6, (sum(sizes), 6))
    down, up = (target.factors[f"lora_{letter}.weight"].read() for letter in "AB")
    want, q = np.zeros((sum(sizes), 5)), sizes[0]
    within = [size // groups for size in sizes]
    for row in range(sum(sizes)):
        group, place = divmod(row, sum(within))
        if place < within[0]:
            want[row] = up[group * within[0] + place] @ down[:3]
        elif place >= within[0] + within[1]:
            want[row] = up[q + group * within[2] + place - within[0] - within[1]] @ down[3:]
    want *= target.scale
    found = plain.scale * plain.factors["lora_B.weight"].read() @ plain.factors["lora_A.weight"].read()
    assert np.allclose(found, want, atol=1e-5)
