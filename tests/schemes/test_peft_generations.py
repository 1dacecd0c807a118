"""Patterns of ranks and alphas as older versions of PEFT read them.

The numbers of `FACTS` are those of the modules that these versions made.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import MemoryFactor
from loraformat.adapter import Adapter
from loraformat.base_facts import NO_FACTS
from loraformat.errors import LoraformatError
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes._peft.generations import Numbers, find_readings
from loraformat.schemes._peft.patterns import fits_behind_dot, fits_unbound
from loraformat.schemes.peft import SCHEME

SINCE_0_14 = {"exclude_modules": None, "lora_bias": False, "eva_config": None}
SINCE_0_15 = SINCE_0_14 | {"trainable_token_indices": None}
OWN_RANK = {"rank_pattern": {"layers.1.v": 3}, "alpha_pattern": {"v": 8}}
V = "model.layers.1.v"


def make_bundle(peft_type: str, shapes: dict[str, tuple[int, ...]], **fields: Any) -> Bundle:
    tensors = {key: MemoryFactor(key, np.ones(shape, np.float32)) for key, shape in shapes.items()}
    return Bundle(Path("adapter"), tensors, config={"peft_type": peft_type, **fields})


def lora(rank: int, target: str = V, **fields: Any) -> Bundle:
    prefix = f"base_model.model.{target}"
    shapes = {f"{prefix}.lora_A.weight": (rank, 5), f"{prefix}.lora_B.weight": (7, rank)}
    return make_bundle("LORA", shapes, **{"r": 2, "lora_alpha": 4, **fields})


def loha(rank: int, **fields: Any) -> Bundle:
    prefix = f"base_model.model.{V}.hada_w"
    sides = {f"{prefix}{side}_{end}": shape for side in "12" for end, shape in (("a", (7, rank)), ("b", (rank, 5)))}
    return make_bundle("LOHA", sides, **{"r": 2, "alpha": 4, **fields})


def read(bundle: Bundle) -> Adapter:
    return SCHEME.read(bundle, NOT_STATED)


def outcome(bundle: Bundle) -> tuple[float | None, list[str]]:
    """Return the alpha of the one target, and what is said."""
    try:
        adapter = read(bundle)
    except LoraformatError as error:
        return None, list(error.codes)
    (target,) = adapter.targets
    return target.scaling.value, [each.code for each in adapter.problems]


@pytest.mark.parametrize("pattern", ["v", "1.v", "v|q", r"layers\.\d\.v", r"model\..*\.v", "^model.layers.1.v", V, ""])
@pytest.mark.parametrize("name", [V, "v", "model.q", "layers.1.v", "model.layers.1.qv", "model.vv.x"])
def test_patterns_fit_as_in_older_versions(pattern: str, name: str) -> None:
    assert fits_behind_dot(pattern, name) == bool(re.match(rf".*\.{pattern}$", name))
    assert fits_unbound(pattern, name) == bool(re.match(rf"(.*\.)?{pattern}$", name))


CROSSED = {"rank_pattern": {"layers.1.v": 3}, "alpha_pattern": {"v": 2}}
FACTS: list[tuple[dict[str, Any], str, list[tuple[int, int]]]] = [
    (OWN_RANK, V, [(3, 4), (3, 8), (3, 8)]),
    (CROSSED, "layers.1.v", [(2, 2), (3, 2), (3, 2)]),
    ({"alpha_pattern": {"layers.1.v": 2, "v": 8}}, "layers.1.v", [(2, 8), (2, 8), (2, 2)]),
    ({"rank_pattern": {"v": 3}, "alpha_pattern": {"v": 8}}, V, [(3, 8), (3, 8), (3, 8)]),
    ({"rank_pattern": {V: 3}, "alpha_pattern": {V: 8, "model.layers.0.v": 1}}, V, [(3, 8), (3, 8), (3, 8)]),
    ({"alpha_pattern": {"^model.layers.1.v": 8}}, V, [(2, 4), (2, 4), (2, 8)]),
    ({"rank_pattern": {"q|v": 3}}, V, [(2, 4), (2, 4), (3, 4)]),
    ({"rank_pattern": {"v|layers.1": 3}, "alpha_pattern": {"layers.1|q": 8}}, V, [(3, 4), (3, 8), (3, 4)]),
]
"""Patterns beside r 2 and lora_alpha 4, target, and its rank and alpha by PEFT 0.13.2, 0.14.0 and 0.15.2."""


@pytest.mark.parametrize(("patterns", "target", "made"), FACTS, ids=str)
def test_each_version_has_its_reading(patterns: Any, target: str, made: list[tuple[int, int]]) -> None:
    tables = [patterns.get(name, {}) for name in ("rank_pattern", "alpha_pattern")]
    readings = find_readings({"peft_type": "LORA"})
    assert [each.choose(target, *tables, Numbers(2, 4)) for each in reversed(readings)] == made


@pytest.mark.parametrize(("patterns", "target", "made"), FACTS, ids=str)
@pytest.mark.parametrize("version", range(3))
def test_what_a_version_made_is_read_as_it_was_made_or_refused(
    patterns: Any, target: str, made: list[tuple[int, int]], version: int
) -> None:
    rank, alpha = made[version]
    found, said = outcome(lora(rank, target, **([{}, SINCE_0_14, SINCE_0_15][version]), **patterns))
    if found is None:
        assert version < 2
        assert said == ["LF248"]
    elif not any(
        key.startswith("^") for key in patterns.get("alpha_pattern", {})
    ):  # Only newer ones have a use for it.
        assert found == alpha


def test_what_cannot_be_told_is_refused() -> None:
    assert outcome(lora(3, **OWN_RANK)) == (None, ["LF248"])
    assert outcome(lora(3, **SINCE_0_14, **OWN_RANK)) == (8, [])
    assert outcome(lora(3, **SINCE_0_15, **OWN_RANK)) == (8, [])
    with pytest.raises(LoraformatError, match=r"alpha 8 by PEFT since 0\.15, rank 3, alpha 4 by PEFT 0\.6 to 0\.13"):
        read(lora(3, **OWN_RANK))


def test_ranks_tell_the_version() -> None:
    assert outcome(lora(2, "layers.1.v", **CROSSED)) == (2, ["LF249"])
    assert outcome(lora(3, "layers.1.v", **CROSSED)) == (2, [])
    (problem,) = read(lora(2, "layers.1.v", **CROSSED)).problems
    assert (problem.severity, "the rank of layers.1.v" in problem.found) == ("warning", True)


@pytest.mark.parametrize("make", [lora, loha])
@pytest.mark.parametrize("alpha", [4, 8])
def test_the_mends_help(make: Any, alpha: int) -> None:
    assert outcome(make(3, **OWN_RANK)) == (None, ["LF248"])
    assert outcome(make(3, rank_pattern={V: 3}, alpha_pattern={V: alpha})) == (alpha, [])
    assert outcome(make(3, peft_version="0.15.0", **OWN_RANK)) == (8, [])


def test_what_an_older_reading_gave_is_read_again_as_it_was() -> None:
    """The patterns that we write begin with `^`: none that an older PEFT could have a use for."""
    both = lora(2, "layers.1.v", **CROSSED)
    adapter = read(replace(both, tensors={**both.tensors, **lora(2, "layers.1.q").tensors}))
    written = SCHEME.write(adapter, NO_FACTS)
    again = read(Bundle(Path("adapter"), written.tensors, config=written.config))
    assert [target.scaling.value for target in again.targets] == [4, 2]
    assert [each.code for each in (*written.problems, *again.problems)] == []


def test_loha_and_lokr_had_one_key_until_0_14() -> None:
    assert outcome(loha(3, exclude_modules=None, **OWN_RANK)) == (None, ["LF248"])
    assert outcome(loha(2, rank_pattern={"layers.1.v": 3, "v": 2}, alpha_pattern={"v": 8})) == (8, [])
    assert outcome(loha(3, rank_pattern={"v": 3}, alpha_pattern={"v": 8, V: 1})) == (8, [])
    shapes = {f"base_model.model.{V}.lokr_w1": (2, 3), f"base_model.model.{V}.lokr_w2": (3, 4)}
    fields = {"r": 2, "alpha": 4, "rank_dropout": 0.0, **OWN_RANK}
    assert outcome(make_bundle("LOKR", shapes, **fields, exclude_modules=None)) == (None, ["LF248"])
    assert outcome(make_bundle("LOKR", shapes, **fields)) == (1, ["LF247"])  # Before 0.14 it had no scale.
