"""Roles in real exports of which no name is left: all targets come to their weights, or the merge is refused.

What is merged must equal PEFT's unmerged model, so that one wrong weight would show.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import loraformat

if TYPE_CHECKING:
    from lab import Lab

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

MODELS = ("llama", "qwen2_tied", "gpt2", "bert", "distilbert", "vit")
HEADS = {"llama": "lm_head", "gpt2": "score", "bert": "classifier", "distilbert": "classifier", "vit": "classifier"}
FOUND = [(model, exporter, "") for model in MODELS for exporter in ("ts", "dynamo")]
FOUND += [("llama", "dynamo", "ORT extended"), ("bert", "dynamo", "onnxslim"), ("llama", "ts", "float16")]
REFUSED_OR_RIGHT = [
    (model, "dynamo", tool)
    for model in ("llama", "gpt2", "bert", "vit")
    for tool in ("onnxslim", "onnxsim", "ORT extended", "ORT transformer optimiser")
]
REFUSED_OR_RIGHT += [(model, "dynamo", "") for model in ("t5", "whisper", "convnet", "resnet")]
REFUSED_OR_RIGHT += [("gpt2", "dynamo_noopt", ""), ("llama", "ts_nofold", "")]


def _merge(lab: "Lab", folder: Path, model: str, exporter: Any, tool: str) -> set[str]:
    """Merge by roles alone and compare; return the reason codes of a refusal."""
    import zoo_wide  # noqa: F401 - more models
    from lab import difference
    from onnx_paths import forget_names, make
    from zoo import SPECIMENS, run_onnx

    source = make(lab, model, exporter, tool) if tool else lab.exported(model, exporter)
    base, trained = forget_names(SPECIMENS[model], source, folder / "base.onnx"), lab.trained(model)
    allowed = 1e-2 if tool == "float16" else 1e-4
    assert trained.effect > 10 * allowed
    try:
        loraformat.merge(base, [trained.folder], folder / "merged.onnx", resolve="structure")
    except loraformat.LoraformatError as error:
        return set(error.codes)
    merged = run_onnx(folder / "merged.onnx", trained.feeds, trained.specimen.outputs)
    assert difference(merged, trained.unmerged) <= allowed
    return set()


@pytest.mark.parametrize(("model", "exporter", "tool"), FOUND)
def test_all_targets_are_found(lab: "Lab", tmp_path: Path, model: str, exporter: str, tool: str) -> None:
    assert not _merge(lab, tmp_path, model, exporter, tool)


@pytest.mark.parametrize(("model", "exporter", "tool"), REFUSED_OR_RIGHT)
def test_nothing_wrong_is_found(lab: "Lab", tmp_path: Path, model: str, exporter: str, tool: str) -> None:
    if tool.startswith("onnxs"):
        pytest.importorskip(tool, reason=f"this test needs {tool}")
    print(model, exporter, tool, sorted(_merge(lab, tmp_path, model, exporter, tool)))
