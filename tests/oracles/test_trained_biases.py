"""Biases that PEFT trains beside its types (`bias: all`, `*_only`) take the place of the base's."""

import json
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


def compute(model: Any, specimen: Any) -> Any:
    from kind_zoo import make_inputs, run

    inputs = make_inputs(specimen.form).items()
    return run(model.to(specimen.form).eval(), {each: value for each, value in inputs if each in specimen.targets})


def load_by_peft(base: Path, folder: Path, specimen: Any) -> Any:
    import peft
    from kind_zoo import Parts
    from safetensors.torch import load_file

    model = Parts().to(specimen.form)
    model.load_state_dict(load_file(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)


@pytest.mark.parametrize("which", ["all", "only"])
@pytest.mark.parametrize("name", names())
def test_a_trained_bias(name: str, which: str, tmp_path: Path) -> None:
    from kind_zoo import SPECIMENS, Parts, train
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
    found = compute(model, specimen)
    for each, expected in left.unmerged.items():
        size = float(np.abs(expected).max())
        assert np.abs(found[each] - expected).max() < specimen.tolerance * size, each
    own = loraformat.save(loraformat.load(left.folder), tmp_path / "own.safetensors")
    loraformat.merge(left.base, [own], tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes()[-64:] == (tmp_path / "merged.safetensors").read_bytes()[-64:]
    loraformat.convert(own, "peft", tmp_path / "peft")
    if "topk" in name:  # PEFT itself does not read them in float64.
        return
    for each, output in compute(load_by_peft(left.base, tmp_path / "peft", specimen), specimen).items():
        np.testing.assert_allclose(output, left.unmerged[each], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("which", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["dora", "kasa"])
def test_a_new_configuration_says_so(name: str, which: str, tmp_path: Path) -> None:
    from kind_zoo import SPECIMENS, train
    from safetensors.numpy import load_file

    def make(targets: list[str]) -> Any:
        config = SPECIMENS[name].make(targets)
        config.bias = which
        return config

    specimen = replace(SPECIMENS[name], make=make)
    left = train(specimen, tmp_path)
    bare = replace(loraformat.load(left.folder), provenance={})
    loraformat.convert(loraformat.save(bare, tmp_path / "own.safetensors"), "peft", tmp_path / "peft")
    kept, written = (load_file(folder / "adapter_model.safetensors") for folder in (left.folder, tmp_path / "peft"))
    assert kept.keys() == written.keys()
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["bias"] == which
    for each, output in compute(load_by_peft(left.base, tmp_path / "peft", specimen), specimen).items():
        np.testing.assert_allclose(output, left.unmerged[each], rtol=1e-12, atol=1e-12)


def test_biases_alone_are_loaded_by_peft(tmp_path: Path) -> None:
    """BitFit's file has no factor: as LN_TUNING, PEFT takes the biases of modules of any class."""
    from kind_zoo import SPECIMENS, Parts
    from safetensors.numpy import save_file

    specimen = replace(SPECIMENS["lokr"], targets=("lin", "conv", "norm", "wide"))
    model, dice = Parts(), np.random.default_rng(2)
    save_file({name: tensor.numpy() for name, tensor in model.state_dict().items()}, tmp_path / "base.safetensors")
    biases = {f"{name}.bias": dice.normal(size=size) for name, size in (("lin", 12), ("conv", 6), ("norm", 12))}
    save_file(biases, tmp_path / "bitfit.safetensors")
    loraformat.convert(tmp_path / "bitfit.safetensors", "peft", tmp_path / "peft")
    found = compute(load_by_peft(tmp_path / "base.safetensors", tmp_path / "peft", specimen), specimen)
    before = compute(model, specimen)
    for name in specimen.targets:
        if name != "wide":
            shape = (-1, 1, 1) if name == "conv" else (-1,)
            before[name] += (
                biases[f"{name}.bias"] - dict(model.named_parameters())[f"{name}.bias"].detach().numpy()
            ).reshape(shape)
        np.testing.assert_allclose(found[name], before[name], rtol=1e-12, atol=1e-12)
    again = loraformat.load(tmp_path / "peft")
    assert {(target.name, target.kind) for target in again.targets} == {(n, "replace") for n in ("lin", "conv", "norm")}
