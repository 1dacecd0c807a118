"""PEANuT against the network written out for each column of the weight."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from kind_examples import SCALES, draw_factors, draw_sizes, make_target, mapped
from laws.kind_laws import MapExample, MappingKindLaws
from loraformat.adapter import Scaling, ScalingRule, SlotKind
from loraformat.kinds.peanut import FUNCTIONS, KIND


def apply(name: str, number: float) -> float:
    """Return one number by the textbook."""
    formulas = {
        "relu": max(number, 0.0),
        "tanh": math.tanh(number),
        "silu": number / (1 + math.exp(-number)),
        "gelu": number * (1 + math.erf(number / math.sqrt(2))) / 2,
    }
    return formulas[name]


@st.composite
def peanut_examples(draw: st.DrawFn) -> MapExample:
    (out, inner), rank, depth = draw_sizes(draw), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    shapes = {"peanut_A.weight": (rank, out), "peanut_B.weight": (out, rank)}
    shapes |= {f"peanut_{half}.{i}.weight": (rank, rank) for half in ("encoders", "decoders") for i in range(depth)}
    scaling, act = (
        Scaling(ScalingRule.MULTIPLIER, draw(SCALES)),
        draw(st.sampled_from(["relu", "tanh", "silu", "gelu"])),
    )
    target = make_target("peanut", SlotKind.LINEAR, draw_factors(draw, shapes), rank, scaling, {"act_fn": act})
    function = np.vectorize(lambda number: apply(act, number), otypes=[float])

    def formula(arrays: Any, base: Any) -> Any:
        result = base.copy()
        for column in range(inner):
            states = [function(arrays["peanut_A.weight"] @ base[:, column])]
            for layer in range(depth):
                states.append(function(arrays[f"peanut_encoders.{layer}.weight"] @ states[-1]))
            hidden = states.pop()
            for layer in range(depth):
                hidden = function(arrays[f"peanut_decoders.{layer}.weight"] @ hidden) + states.pop()
            result[:, column] += target.scale * arrays["peanut_B.weight"] @ hidden
        return result

    return mapped(draw, target, (out, inner), formula, slack=5e-2)


class TestPeanut(MappingKindLaws):
    kind = KIND

    def examples(self) -> st.SearchStrategy[MapExample]:
        return peanut_examples()


def test_functions_at_some_places() -> None:
    """`torch.nn.functional` at -1.5, 0 and 2."""
    places = np.array([-1.5, 0.0, 2.0])
    expected = {
        "relu": [0, 0, 2],
        "gelu": [-0.1002108, 0, 1.9544997],
        "gelu_new": [-0.1004284, 0, 1.9545977],
        "gelu_pytorch_tanh": [-0.1004284, 0, 1.9545977],
        "leaky_relu": [-0.015, 0, 2],
        "linear": [-1.5, 0, 2],
        "sigmoid": [0.1824255, 0.5, 0.8807971],
        "silu": [-0.2736383, 0, 1.7615942],
        "swish": [-0.2736383, 0, 1.7615942],
        "tanh": [-0.9051483, 0, 0.9640276],
    }
    assert set(expected) == set(FUNCTIONS)
    for name, values in expected.items():
        np.testing.assert_allclose(FUNCTIONS[name](places), values, atol=1e-6)


@pytest.mark.parametrize("options", [{"act_fn": "mish"}, {"act_fn": 1}])
def test_other_functions_are_refused(options: dict[str, Any]) -> None:
    arrays = {"peanut_A.weight": np.ones((2, 5)), "peanut_B.weight": np.ones((5, 2))}
    target = make_target("peanut", SlotKind.LINEAR, arrays, 2, options=options)
    assert [problem.code for problem in KIND.check(target)] == ["LF230"]
