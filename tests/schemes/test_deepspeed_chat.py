"""DeepSpeed-Chat: factors as `(in, rank)` and `(rank, out)`, and a scale that the user states."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from laws.scheme_laws import SchemeLaws
from loraformat.errors import LoraformatError
from loraformat.schemes import NOT_STATED, Bundle, StatedScale
from loraformat.schemes.deepspeed_chat import SCHEME
from schemes import decoders as d

NAME = "model.layers.0.self_attn.q_proj"
DICE = np.random.default_rng(0)
DOWN, UP = DICE.standard_normal((5, 2)).astype(np.float32), DICE.standard_normal((2, 7)).astype(np.float32)
BUNDLE = Bundle(Path("adapter"), d.tensors({f"{NAME}.lora_right_weight": DOWN, f"{NAME}.lora_left_weight": UP}))


class TestDeepSpeedChat(SchemeLaws):
    scheme = SCHEME
    stated = StatedScale(alpha=4.0)

    def examples(self) -> Mapping[str, Bundle]:
        return {"one module": BUNDLE}


def test_the_change() -> None:
    (target,) = SCHEME.read(BUNDLE, StatedScale(alpha=4.0)).targets
    found = target.scale * target.factors["lora_B.weight"].read() @ target.factors["lora_A.weight"].read()
    assert np.allclose(found, 2.0 * (DOWN @ UP).T, atol=1e-6)


def test_the_scale_is_asked_for() -> None:
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(BUNDLE, NOT_STATED)
    assert caught.value.codes == ("LF211",)
