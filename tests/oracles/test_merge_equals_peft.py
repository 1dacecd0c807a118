"""A merged ONNX model computes what PEFT computes, for real exports of real architectures."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

if TYPE_CHECKING:
    from lab import Lab

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

EXPORTERS = ("ts", "ts_nofold", "dynamo", "dynamo_noopt")
# The newer exporter takes seconds each: what it does without optimisation is seen on three models of three shapes.
UNOPTIMISED = ("llama", "bert", "resnet")
MODELS = ("llama", "llama_embed", "gpt2", "bert", "vit", "convnet", "resnet")
CASES = [
    (model, exporter)
    for model in MODELS
    for exporter in EXPORTERS
    # BatchNorm is folded into the convolutions there: see test_refusals.py.
    if not (model == "resnet" and exporter in ("ts", "dynamo"))
    if not (exporter == "dynamo_noopt" and model not in UNOPTIMISED)
]


@pytest.mark.parametrize(("model", "exporter"), CASES)
def test_float32(lab: "Lab", tmp_path: Path, model: str, exporter: str) -> None:
    from lab import ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE, difference, merge_checked, note, scale_of
    from zoo import run_onnx

    trained, base = lab.trained(model), lab.exported(model, exporter)
    # A merge that does nothing must not pass.
    assert trained.effect > 1e-2 > 10 * ABSOLUTE_TOLERANCE
    receipt = merge_checked(base, trained, tmp_path / "merged.onnx")
    assert len(receipt.weights) == len(trained.deltas)
    found = run_onnx(tmp_path / "merged.onnx", trained.feeds, trained.specimen.outputs)
    apart, as_peft = difference(found, trained.unmerged), difference(found, trained.merged)
    note(
        f"fp32 {model} {exporter}",
        effect=trained.effect,
        base=difference(run_onnx(base, trained.feeds, trained.specimen.outputs), trained.base),
        unmerged=apart,
        merged=as_peft,
        scale=scale_of(trained.merged),
        targets=len(trained.deltas),
    )
    assert apart <= ABSOLUTE_TOLERANCE
    assert as_peft <= RELATIVE_TOLERANCE * scale_of(trained.merged)


HALVES = [
    ("llama", "ts", "fp16"),
    ("llama", "dynamo", "fp16"),
    ("gpt2", "ts", "fp16"),
    ("gpt2", "dynamo", "fp16"),
    ("bert", "ts", "fp16"),
    ("bert", "dynamo", "fp16"),
    ("convnet", "ts", "fp16"),
    ("vit", "dynamo", "fp16"),
    ("bert", "ts", "fp16_common"),
    ("bert", "dynamo", "fp16_common"),
    ("llama", "ts", "half"),
    ("llama", "dynamo", "half"),
]


@pytest.mark.parametrize(("model", "exporter", "form"), HALVES)
def test_float16(lab: "Lab", tmp_path: Path, model: str, exporter: str, form: str) -> None:
    """The measure is what float16 costs the base itself, by size of output; each weight is checked to half a unit."""
    from lab import difference, merge_checked, note, peak
    from zoo import initializers, run_onnx

    if form == "fp16_common":
        pytest.importorskip("onnxconverter_common", reason="this test needs onnxconverter-common")
    trained, base = lab.trained(model), lab.exported(model, exporter, form)
    receipt = merge_checked(base, trained, tmp_path / "merged.onnx")
    halves = initializers(base)
    assert {halves[weight.name].dtype for weight in receipt.weights} == {np.dtype(np.float16)}
    names = trained.specimen.outputs
    cost = difference(run_onnx(base, trained.feeds, names), trained.base) / peak(trained.base)
    apart = difference(run_onnx(tmp_path / "merged.onnx", trained.feeds, names), trained.unmerged)
    apart_by_size = apart / peak(trained.unmerged)
    note(f"{form} {model} {exporter}", effect=trained.effect, unmerged=apart, relative=apart_by_size, base=cost)
    assert apart_by_size <= 2.5 * cost
    assert trained.effect > 10 * apart


EXTERNAL = [
    ("bert", "ts", "one_file"),
    ("bert", "ts", "many_files"),
    ("bert", "dynamo", "one_file"),
    ("llama", "dynamo", "many_files"),
    ("bert", "dynamo", "torch_data"),
]


@pytest.mark.parametrize(("model", "exporter", "form"), EXTERNAL)
def test_external_data(lab: "Lab", tmp_path: Path, model: str, exporter: str, form: str) -> None:
    from lab import ABSOLUTE_TOLERANCE, difference, merge_checked
    from zoo import run_onnx

    trained, base = lab.trained(model), lab.exported(model, exporter, form)
    before = {path.name: path.read_bytes() for path in base.parent.iterdir()}
    assert any(_is_external(base))
    output = tmp_path / "out" / "merged.onnx"
    output.parent.mkdir()
    merge_checked(base, trained, output)
    found = run_onnx(output, trained.feeds, trained.specimen.outputs)
    assert difference(found, trained.unmerged) <= ABSOLUTE_TOLERANCE
    # The merged model stands on its own, and the base is as it was.
    assert {path.name: path.read_bytes() for path in base.parent.iterdir()} == before


def _is_external(path: Path) -> list[bool]:
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return [tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors]


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
def test_a_model_that_is_merged_twice_is_the_sum_of_both(lab: "Lab", tmp_path: Path, exporter: str) -> None:
    """The merged model is an ordinary base: its evidence is intact and its weights are where they were."""
    from lab import ABSOLUTE_TOLERANCE, difference
    from zoo import run_onnx

    import loraformat

    first, second = lab.trained("llama"), lab.trained("llama_second")
    base = lab.exported("llama", exporter)
    loraformat.merge(base, [first.folder], tmp_path / "once.onnx")
    twice = loraformat.merge(tmp_path / "once.onnx", [second.folder], tmp_path / "twice.onnx")
    loraformat.merge(base, [first.folder, second.folder], tmp_path / "both.onnx")
    assert twice.parent is not None
    outputs = [run_onnx(tmp_path / name, first.feeds) for name in ("twice.onnx", "both.onnx")]
    assert difference(*outputs) <= ABSOLUTE_TOLERANCE / 10
    onnx.checker.check_model(tmp_path / "twice.onnx", full_check=True)
