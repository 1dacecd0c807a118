"""Biases of zeros, which exporters and optimisers leave out, and adapters that change them: PEFT's unmerged model.

Every new classifier is such a case. Graphs are exported for real, also by the exporter that keeps zeros, and taken
through tools; each test says how many biases the graph lacks, so that none can pass for want of work.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

import loraformat
from loraformat.receipt import Receipt

if TYPE_CHECKING:
    from torch import nn
    from zoo import Specimen, Trained

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

HEADS: dict[str, tuple[str, dict[str, Any], int]] = {
    "bert": (r"classifier\.", {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}, 1),
    "distilbert": (
        r"classifier\.",
        {"target_modules": ["q_lin", "v_lin"], "modules_to_save": ["classifier", "pre_classifier"]},
        2,
    ),
    "vit": (r"classifier\.", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}, 1),
}
"""Models with a head whose biases are zeros, as transformers makes it: which they are, PEFT's fields, how many."""

WHOLE: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": ({"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}, 8),
    "qwen2_tied": ({"target_modules": ["q_proj", "v_proj", "down_proj"], "bias": "all"}, 0),
    "llama": ({"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}, 0),
    "vit": ({"target_modules": ["q_proj", "fc1", "projection"], "bias": "all"}, 2),
    "convnet": ({"target_modules": ["stem", "block.0"], "bias": "lora_only", "modules_to_save": ["head"]}, 3),
}
"""Models all of whose biases are zeros, PEFT's fields, and how many of those that change the newer exporter drops.

It drops those of Gemm and Conv; of a MatMul, whose bias is an Add, it keeps them, stored once.
"""


def with_zeros(name: str, pattern: str = "") -> "Specimen":
    """Return a specimen whose biases are zeros, those whose names match alone."""
    import re

    import torch
    import zoo_wide  # noqa: F401 - more models
    from zoo import SPECIMENS

    specimen = SPECIMENS[name]

    def make() -> "nn.Module":
        model = specimen.make()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith(".bias") and re.search(pattern, key):
                    parameter.zero_()
        return model

    return replace(specimen, make=make)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], "tuple[Trained, Path]"]:
    """Return what trains an adapter and exports its base, each once."""
    from peft import LoraConfig
    from zoo import export, train

    root = tmp_path_factory.mktemp("biases")

    @cache
    def trained(name: str, head: bool) -> "Trained":
        pattern, fields = (HEADS[name][0], HEADS[name][1]) if head else ("", WHOLE[name][0])
        config = LoraConfig(r=3, lora_alpha=6, **fields)
        return train(with_zeros(name, pattern), root / f"{name}-{head}", seed=5, lora=config)

    @cache
    def exported(name: str, head: bool, exporter: Any) -> Path:
        return export(trained(name, head).specimen, root / f"{name}-{head}-{exporter}" / "base.onnx", exporter)

    def find(name: str, exporter: str, *, head: bool = False) -> "tuple[Trained, Path]":
        return trained(name, head), exported(name, head, exporter)

    return find


def check(base: Path, trained: "Trained", output: Path, lacking: int, tolerance: float = 1e-4) -> Receipt:
    """Merge and compare with PEFT, and the graph with the base's: only what the receipt names is more."""
    from lab import difference
    from zoo import run_onnx

    receipt = loraformat.merge(base, [trained.folder], output, new_biases=True)
    added = [weight for weight in receipt.weights if weight.added]
    assert len(added) == lacking
    names = trained.specimen.outputs
    assert difference(run_onnx(output, trained.feeds, names), trained.unmerged) <= tolerance
    assert trained.effect > 100 * tolerance
    before, after = (onnx.load(each, load_external_data=False).graph.node for each in (base, output))
    sums = Counter(Add=sum(weight.added.startswith("Add after") for weight in added))
    assert Counter(node.op_type for node in after) - Counter(node.op_type for node in before) == sums
    found = loraformat.verify(output, base, [trained.folder], run=True)
    assert found.holds, [str(problem) for problem in found.problems]
    return receipt


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("exporter", ["dynamo", "dynamo_noopt", "ts"])
def test_a_new_head(make: Any, tmp_path: Path, name: str, exporter: str) -> None:
    """A fresh classifier saved whole: exporters that keep its zeros need no option, and get nothing more."""
    trained, base = make(name, exporter, head=True)
    lacking = HEADS[name][2] if exporter == "dynamo" else 0
    receipt = check(base, trained, tmp_path / "out.onnx", lacking)
    assert {problem.code for problem in receipt.problems} <= {"LF632", "LF417"}
    if lacking:
        with pytest.raises(loraformat.LoraformatError) as caught:
            loraformat.merge(base, [trained.folder], tmp_path / "refused.onnx")
        assert caught.value.codes == ("LF401",)
        assert "--new-biases" in caught.value.problems[0].advice


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("exporter", ["dynamo", "ts"])
def test_every_bias_of_a_model(make: Any, tmp_path: Path, name: str, exporter: str) -> None:
    """Those of modules without LoRA too: PEFT's `bias="all"`."""
    trained, base = make(name, exporter)
    check(base, trained, tmp_path / "out.onnx", WHOLE[name][1] if exporter == "dynamo" else 0)


def _extend(specimen: "Specimen", source: Path, path: Path) -> Path:
    from onnx_paths import optimise

    return optimise("EXTENDED")(specimen, source, path)


def _fuse(specimen: "Specimen", source: Path, path: Path) -> Path:
    from onnx_paths import fuse_transformer

    return fuse_transformer(specimen, source, path)


def _halve(specimen: "Specimen", source: Path, path: Path) -> Path:
    from zoo import to_float16

    return to_float16(source, path)


def _quantise(specimen: "Specimen", source: Path, path: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic
    from zoo import quiet

    with quiet():
        quantize_dynamic(source, path)
    return path


TOOLS = {"ORT extended": _extend, "ORT transformers": _fuse, "float16": _halve, "dynamic int8": _quantise}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_new_head_behind_a_tool(make: Any, tmp_path: Path, name: str, tool: str) -> None:
    """Of weights without names the checkpoint finds the numbers, and their biases are theirs."""
    from lab import difference
    from safetensors.torch import save_file
    from zoo import run_onnx

    trained, source = make(name, "dynamo", head=True)
    (tmp_path / "base").mkdir()
    base, output = TOOLS[tool](trained.specimen, source, tmp_path / "base" / "base.onnx"), tmp_path / "out.onnx"
    save_file(trained.specimen.make().state_dict(), tmp_path / "checkpoint.safetensors")
    options = {"base_checkpoint": tmp_path / "checkpoint.safetensors"} if tool == "dynamic int8" else {}
    receipt = loraformat.merge(base, [trained.folder], output, new_biases=True, **options)
    assert sum(bool(weight.added) for weight in receipt.weights) == HEADS[name][2]
    names = trained.specimen.outputs
    own = difference(run_onnx(base, trained.feeds, names), trained.base)
    assert difference(run_onnx(output, trained.feeds, names), trained.unmerged) <= 2 * own + 1e-6 < trained.effect / 2
    found = loraformat.verify(output, base, [trained.folder], run=True, **options)
    assert found.holds, [str(problem) for problem in found.problems]


@pytest.mark.parametrize("exporter", ["dynamo", "ts"])
def test_differences_of_a_conv_nets_biases(make: Any, tmp_path: Path, exporter: str) -> None:
    """LyCORIS' `full`: `diff` and `diff_b` of every layer, as the package computes with them."""
    torch = pytest.importorskip("torch")
    lycoris = pytest.importorskip("lycoris", reason="the oracle tests need lycoris")
    from zoo import run_onnx, run_torch

    trained, base = make("convnet", exporter)
    model, feeds = trained.specimen.make().eval(), trained.specimen.feeds()
    torch.manual_seed(3)
    own = lycoris.LycorisNetwork
    before = {key: value for key, value in vars(own).items() if key.isupper()}
    own.apply_preset({"target_module": [type(model).__name__], "lora_prefix": "lycoris"})
    try:
        network = lycoris.create_lycoris(model, 1.0, linear_dim=4, linear_alpha=4, algo="full", bypass_mode=False)
    finally:
        for key, value in before.items():
            setattr(own, key, value)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    network.save_weights(str(tmp_path / "adapter.safetensors"), None, {})
    expected = run_torch(model, feeds, trained.specimen.outputs)
    receipt = loraformat.merge(base, [tmp_path / "adapter.safetensors"], tmp_path / "out.onnx", new_biases=True)
    found = run_onnx(tmp_path / "out.onnx", trained.feeds, trained.specimen.outputs)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-4)
        assert np.abs(values - trained.base[name]).max() > 0.1
    assert sum(bool(weight.added) for weight in receipt.weights) == (5 if exporter == "dynamo" else 0)
    assert loraformat.verify(tmp_path / "out.onnx", base, [tmp_path / "adapter.safetensors"], run=True).holds
