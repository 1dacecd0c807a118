"""Biases that PEFT trains beside its types (`bias: all`, `*_only`) take the place of the base's."""

import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

ITS_OWN = "GLORA"
"""It changes the bias by factors of its own."""


def names() -> list[str]:
    """Return a specimen of each type that has the option."""
    from kind_zoo import SPECIMENS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {name: specimen.make(list(specimen.targets)) for name, specimen in SPECIMENS.items()}
    found = {str(config.peft_type.value): name for name, config in made.items() if "lin" in SPECIMENS[name].targets}
    with_option = {name for name, config in made.items() if "bias" in {each.name for each in fields(config)}}
    return sorted({name for peft_type, name in found.items() if peft_type != ITS_OWN} & with_option)


@pytest.mark.parametrize("which", ["all", "only"])
@pytest.mark.parametrize("name", names())
def test_a_trained_bias(name: str, which: str, tmp_path: Path) -> None:
    from kind_zoo import SPECIMENS, Parts, make_inputs, run, train
    from safetensors.torch import load_file

    specimen = SPECIMENS[name]

    def make(targets: list[str]) -> Any:
        config = specimen.make(targets)
        config.bias = "all" if which == "all" else f"{str(config.peft_type.value).lower()}_only"
        return config

    left = train(replace(specimen, make=make), tmp_path)
    receipt = loraformat.merge(left.base, [left.folder], tmp_path / "merged.safetensors")
    biases = {weight.name for weight in receipt.weights if weight.name.endswith(".bias")}
    assert "lin.bias" in biases
    assert ("norm.bias" in biases) is (which == "all")
    model = Parts().to(specimen.form).eval()
    model.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    found = run(model, {each: value for each, value in make_inputs(specimen.form).items() if each in specimen.targets})
    for each, expected in left.unmerged.items():
        size = float(np.abs(expected).max())
        assert np.abs(found[each] - expected).max() < specimen.tolerance * size, each
    own = loraformat.save(loraformat.load(left.folder), tmp_path / "own.safetensors")
    loraformat.merge(left.base, [own], tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes()[-64:] == (tmp_path / "merged.safetensors").read_bytes()[-64:]
