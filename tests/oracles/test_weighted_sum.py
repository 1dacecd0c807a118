"""Two adapters with weights, merged at once, are the sum that torch makes of the same numbers."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from lab import Lab
    from torch import nn
    from zoo import Trained

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

WEIGHTS = (0.7, -0.3)


def _summed(model: "nn.Module", adapters: "list[Trained]") -> "nn.Module":
    """Add weight times delta to the parameters of a torch model, in float32."""
    import torch

    with torch.no_grad():
        for trained, weight in zip(adapters, WEIGHTS, strict=True):
            for target, delta in trained.deltas.items():
                model.get_submodule(target).weight += weight * torch.from_numpy(delta)
    return model


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
def test_two_adapters_with_weights(lab: "Lab", tmp_path: Path, exporter: str) -> None:
    from lab import ABSOLUTE_TOLERANCE, assert_only_these_changed, assert_same_graph, difference, note
    from zoo import export, initializers, run_onnx, run_torch

    import loraformat

    first, second = lab.trained("llama"), lab.trained("llama_second")
    assert set(second.deltas) < set(first.deltas)
    base, output = lab.exported("llama", exporter), tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, list(zip((first.folder, second.folder), WEIGHTS, strict=True)), output)
    assert_same_graph(base, output)
    assert_only_these_changed(base, output, receipt)
    assert [adapter.weight for adapter in receipt.adapters] == list(WEIGHTS)
    assert [adapter.targets for adapter in receipt.adapters] == [len(first.deltas), len(second.deltas)]
    assert len(receipt.weights) == len(first.deltas)

    specimen = first.specimen
    model = _summed(specimen.make(), [first, second])
    expected = run_torch(model, specimen.feeds(), specimen.outputs)
    found = run_onnx(output, first.feeds, specimen.outputs)
    note(f"sum llama {exporter}", unmerged=difference(found, expected), effect=difference(expected, first.base))
    assert difference(found, expected) <= ABSOLUTE_TOLERANCE
    # Neither adapter alone, nor both without their weights, would pass.
    for other in (first.base, first.unmerged, second.unmerged):
        assert difference(expected, other) > 100 * ABSOLUTE_TOLERANCE

    again = export(specimen, tmp_path / "again.onnx", exporter, model)
    merged, exported = initializers(output), initializers(again)
    assert merged.keys() == exported.keys()
    for name, numbers in merged.items():
        np.testing.assert_allclose(numbers, exported[name], rtol=0, atol=2e-7, err_msg=name)


def test_the_second_adapter_alone_with_weight_one_is_peft(lab: "Lab", tmp_path: Path) -> None:
    """The sum above is only as good as the second adapter: use_rslora, a rank of its own."""
    from lab import ABSOLUTE_TOLERANCE, difference, merge_checked
    from zoo import run_onnx

    second = lab.trained("llama_second")
    merge_checked(lab.exported("llama", "ts"), second, tmp_path / "merged.onnx")
    found = run_onnx(tmp_path / "merged.onnx", second.feeds, second.specimen.outputs)
    assert difference(found, second.unmerged) <= ABSOLUTE_TOLERANCE
