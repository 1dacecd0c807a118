"""Exporters shorten and repeat the paths of modules: a target must find its own module, or none."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import loraformat

if TYPE_CHECKING:
    from lab import Lab

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

EXPORTERS = ("ts", "ts_nofold", "dynamo", "dynamo_noopt")
NAMESAKES = (
    "namesakes_inner_first",
    "namesakes_outer_first",
    "namesakes_inner_first_bare",
    "namesakes_outer_first_bare",
)


@pytest.mark.parametrize("target", ["fc", r"inner\.fc", r"(inner\.)?fc"])
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("model", NAMESAKES)
def test_paths_that_end_alike(lab: "Lab", tmp_path: Path, model: str, exporter: str, target: str) -> None:
    """The older exporter names a layer by its attribute alone when its parent is not called: fc, then fc_1."""
    from lab import merged_right_or_refused

    done = merged_right_or_refused(lab.exported(model, exporter), lab.trained(model, target), tmp_path / "merged.onnx")
    assert done or exporter.startswith("ts")


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_modules_that_are_called_twice(lab: "Lab", tmp_path: Path, exporter: str) -> None:
    from lab import merged_right_or_refused

    trained = lab.trained("reused")
    done = merged_right_or_refused(lab.exported("reused", exporter), trained, tmp_path / "merged.onnx")
    assert done or exporter.startswith("ts")


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
def test_a_layer_that_is_applied_three_times(lab: "Lab", tmp_path: Path, exporter: str) -> None:
    """The newer exporter stores small weights once and larger ones once for each call."""
    from lab import merged_right_or_refused

    merged_right_or_refused(lab.exported("albert", exporter), lab.trained("albert"), tmp_path / "merged.onnx")
    small = lab.trained("albert", ["query"])
    done = merged_right_or_refused(lab.exported("albert", exporter), small, tmp_path / "small.onnx")
    assert done or exporter == "ts"


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
def test_a_part_of_the_model_exported_alone(lab: "Lab", tmp_path: Path, exporter: str) -> None:
    """Targets start with `bert.`, the graph of the encoder alone does not, and the classifier is not in it."""
    import torch
    from lab import ABSOLUTE_TOLERANCE, difference
    from zoo import SPECIMENS, TEXT_AXES, Specimen, export, run_onnx, run_torch

    trained = lab.trained("bert")
    part = Specimen(
        "bert_part", lambda: SPECIMENS["bert"].make().bert, SPECIMENS["bert"].feeds, None, TEXT_AXES, ("hidden",)
    )
    base = export(part, tmp_path / "base.onnx", exporter)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [trained.folder], tmp_path / "merged.onnx")
    assert caught.value.codes == ("LF401",)
    assert caught.value.problems[0].where == "classifier"
    whole = SPECIMENS["bert"].make()
    with torch.no_grad():
        for target, delta in trained.deltas.items():
            whole.get_submodule(target).weight += torch.from_numpy(delta)
    expected = run_torch(whole.bert, part.feeds(), part.outputs)
    for options in ({}, {"strip_prefix": "bert."}):
        receipt = loraformat.merge(
            base, [trained.folder], tmp_path / "merged.onnx", allow_unmatched=["classifier"], force=True, **options
        )
        assert len(receipt.weights) == len(trained.deltas) - 1
        assert (
            difference(run_onnx(tmp_path / "merged.onnx", trained.feeds, part.outputs), expected) <= ABSOLUTE_TOLERANCE
        )


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
def test_a_graph_that_holds_the_adapter_already(lab: "Lab", tmp_path: Path, exporter: str) -> None:
    """An exported PeftModel has the branches of the adapter: merging it once more would count it twice."""
    from lab import merged_right_or_refused
    from peft import PeftModel
    from zoo import export, quiet

    trained = lab.trained("convnet")
    with quiet():
        model = PeftModel.from_pretrained(trained.specimen.make(), trained.folder).eval()
    base = export(trained.specimen, tmp_path / "peft.onnx", exporter, model)
    assert not merged_right_or_refused(base, trained, tmp_path / "merged.onnx")


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
def test_embeddings_that_peft_saves_beside_their_adapter(lab: "Lab", tmp_path: Path, exporter: str) -> None:
    """PEFT's default for an adapted embedding is to save the base's own weight as well."""
    from lab import merged_right_or_refused
    from peft import PeftModel
    from zoo import Trained, quiet

    trained = lab.trained("llama_embed")
    with quiet():
        PeftModel.from_pretrained(trained.specimen.make(), trained.folder).save_pretrained(tmp_path / "adapter")
    fields = {name: getattr(trained, name) for name in Trained.__dataclass_fields__}
    merged_right_or_refused(
        lab.exported("llama_embed", exporter),
        Trained(**fields | {"folder": tmp_path / "adapter"}),
        tmp_path / "merged.onnx",
    )


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_torch_attention_and_its_output_layer(tmp_path: Path, exporter: str) -> None:
    """PEFT adapts both weights of MultiheadAttention; it never calls the second's module, whose scope no node has."""
    import numpy as np
    import torch
    from lab import ABSOLUTE_TOLERANCE
    from peft import LoraConfig, get_peft_model
    from zoo import quiet, run_onnx

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(12, 3, batch_first=True)
            self.head = torch.nn.Linear(12, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.attn(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 5, 12)
    options = {"dynamo": True, "optimize": exporter == "dynamo"}
    if exporter.startswith("ts"):
        options = {"dynamo": False, "do_constant_folding": exporter == "ts"}
    with quiet():
        torch.onnx.export(model, (x,), tmp_path / "base.onnx", input_names=["x"], output_names=["y"], **options)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["attn", "head"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(x).numpy()
    receipt = loraformat.merge(tmp_path / "base.onnx", [tmp_path / "adapter"], tmp_path / "merged.onnx")
    assert len(receipt.weights) == 3
    found = run_onnx(tmp_path / "merged.onnx", {"x": x.numpy()})["y"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=ABSOLUTE_TOLERANCE)
