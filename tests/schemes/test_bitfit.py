"""BitFit: nothing but biases and a head."""

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
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes.bitfit import SCHEME
from schemes import decoders as d

LAYER = "roberta.encoder.layer.0."
BIASES = {f"{LAYER}attention.self.query.bias": 6, f"{LAYER}output.LayerNorm.bias": 4}
HEAD = {"classifier.out_proj.weight": (3, 4), "classifier.out_proj.bias": (3,)}


def arrays_of(shapes: Mapping[str, Any]) -> dict[str, Any]:
    dice = np.random.default_rng(8)
    return {name: dice.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def bundle_of(shapes: Mapping[str, Any]) -> Bundle:
    return Bundle(Path("bitfit.bin"), d.tensors(arrays_of(shapes)))


class TestBitFit(SchemeLaws):
    scheme = SCHEME

    def examples(self) -> Mapping[str, Bundle]:
        return {"biases": bundle_of(BIASES), "biases and a head": bundle_of(BIASES | HEAD)}


@pytest.mark.parametrize(
    "more",
    [
        {f"{LAYER}output.dense.weight": (4, 4)},
        {f"{LAYER}attention.self.query.lora_A": (2, 4)},
        {"base_model.model.q.bias": (4,)},
    ],
)
def test_anything_else_speaks_against_it(more: Mapping[str, Any]) -> None:
    assert SCHEME.detect(bundle_of(BIASES | HEAD)) is not None
    assert SCHEME.detect(bundle_of({**BIASES, **HEAD, **more})) is None
    assert SCHEME.detect(bundle_of(HEAD)) is None


def test_they_take_the_place_of_the_base_s(tmp_path: Path) -> None:
    trained = arrays_of(BIASES | HEAD)
    others = {f"{LAYER}attention.self.query.weight": np.ones((6, 4), np.float32)}
    base = write_tensors(tmp_path / "base.safetensors", {name: array * 0 for name, array in trained.items()} | others)
    adapter = write_tensors(tmp_path / "bitfit.safetensors", trained)
    targets = loraformat.load(adapter).targets
    assert {(target.kind, target.slot) for target in targets} == {("replace", SlotKind.PARAMETER)}
    loraformat.merge(base, [adapter], tmp_path / "merged.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    assert all((merged[name] == array).all() for name, array in (trained | others).items())


def test_nothing_is_stated_of_a_scale() -> None:
    assert {target.scale for target in SCHEME.read(bundle_of(BIASES), NOT_STATED).targets} == {1.0}
