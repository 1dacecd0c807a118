"""What tools make of an exported model, merged: with the checkpoint everything resolves; by names, nothing wrong does.

The whole table is `bench/onnx_exports.py`; these are the paths that differ from one another.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lab import Lab

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

NAMED = [
    ("bert", "ts", "ORT transformer optimiser"),
    ("bert", "dynamo", "ORT extended"),
    ("bert", "ts", "bfloat16 + Cast"),
    ("bert", "ts", "Constant nodes"),
    ("llama", "dynamo", "onnxslim"),
    ("llama", "dynamo", "float16"),
    ("gpt2", "ts", "ORT transformer optimiser"),
    ("qwen3", "dynamo", "ORT extended"),
    ("phi3", "dynamo_noopt", "ORT extended"),
    ("t5", "dynamo", "ORT extended"),
    ("t5", "dynamo", "onnxslim"),
    ("whisper", "dynamo", "ORT extended"),
    ("whisper", "dynamo", "onnxsim"),
    ("vit", "dynamo", "onnxsim"),
    ("mixtral", "ts", "ORT basic"),
    ("mixtral", "dynamo", "Constant nodes"),
    ("mixtral", "dynamo", "ORT extended"),
    ("gpt_oss", "dynamo", "float16"),
    ("gpt_oss", "dynamo", "ORT extended"),
    ("unet", "dynamo", "ORT basic"),
]
"""Graphs where something is left of every module's name, and no number is folded into it."""
CASES = [
    *NAMED,
    ("llama", "ts", "without names"),
    ("llama", "dynamo", "without names"),
    ("gpt_oss", "ts", "without names"),
    ("resnet", "ts", "ORT extended"),
    ("resnet", "dynamo", "ORT extended"),
    ("resnet", "ts_nofold", "ORT basic"),
    ("resnet", "ts_nofold", "onnxsim"),
    ("resnet", "dynamo", "onnxslim"),
]
COARSE = {"float16": 1e-2, "bfloat16 + Cast": 5e-2}


@pytest.mark.parametrize(("model", "exporter", "tool"), CASES)
def test_with_the_checkpoint(lab: "Lab", tmp_path: Path, model: str, exporter: str, tool: str) -> None:
    from lab import ABSOLUTE_TOLERANCE, difference
    from onnx_paths import make
    from zoo import run_onnx

    import loraformat

    base, trained = _make(make, lab, model, exporter, tool), lab.trained(model)
    allowed = COARSE.get(tool, ABSOLUTE_TOLERANCE)
    assert trained.effect > 10 * allowed
    checkpoint = _save_checkpoint(lab, model)
    receipt = loraformat.merge(base, [trained.folder], tmp_path / "merged.onnx", base_checkpoint=checkpoint)
    assert {target for weight in receipt.weights for target in weight.targets} == set(trained.deltas)
    merged = run_onnx(tmp_path / "merged.onnx", trained.feeds, trained.specimen.outputs)
    assert difference(merged, trained.unmerged) <= allowed


@pytest.mark.parametrize(("model", "exporter", "tool"), CASES)
def test_by_names(lab: "Lab", tmp_path: Path, model: str, exporter: str, tool: str) -> None:
    from lab import ABSOLUTE_TOLERANCE, difference
    from onnx_paths import make
    from zoo import run_onnx

    import loraformat

    base, trained = _make(make, lab, model, exporter, tool), lab.trained(model)
    codes: set[str] = set()
    try:
        loraformat.merge(base, [trained.folder], tmp_path / "merged.onnx")
    except loraformat.LoraformatError as error:
        codes = set(error.codes)
    assert codes <= {"LF401", "LF404", "LF407"}
    assert not (codes and (model, exporter, tool) in NAMED)
    if codes:
        return
    merged = run_onnx(tmp_path / "merged.onnx", trained.feeds, trained.specimen.outputs)
    assert difference(merged, trained.unmerged) <= COARSE.get(tool, ABSOLUTE_TOLERANCE)


@pytest.mark.parametrize("model", ["llama", "bert", "vit", "gpt2"])
def test_a_stamped_adapter_needs_no_names(lab: "Lab", tmp_path: Path, model: str) -> None:
    from lab import ABSOLUTE_TOLERANCE, difference
    from onnx_paths import make
    from zoo import run_onnx

    import loraformat

    base, trained = make(lab, model, "dynamo", "without names"), lab.trained(model)
    stamped = loraformat.stamp(trained.folder, _save_checkpoint(lab, model))
    receipt = loraformat.merge(base, [stamped], tmp_path / "merged.onnx")
    assert {target for weight in receipt.weights for target in weight.targets} == set(trained.deltas)
    merged = run_onnx(tmp_path / "merged.onnx", trained.feeds, trained.specimen.outputs)
    assert difference(merged, trained.unmerged) <= ABSOLUTE_TOLERANCE


def _make(make: object, lab: "Lab", model: str, exporter: str, tool: str) -> Path:
    import zoo_wide  # noqa: F401 - more models

    if tool.startswith("onnxs"):
        pytest.importorskip(tool, reason=f"this test needs {tool}")
    return make(lab, model, exporter, tool)  # type: ignore[operator]


def _save_checkpoint(lab: "Lab", model: str) -> Path:
    import zoo
    from safetensors.torch import save_model

    path = lab.root / f"checkpoint-{model}.safetensors"
    if not path.exists():
        save_model(zoo.SPECIMENS[model].make(), str(path))
    return path
