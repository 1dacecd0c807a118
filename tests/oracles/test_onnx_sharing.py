"""Weights that exporters store once for several modules: the adapted module alone changes, as in PEFT's unmerged model.

PEFT's own merge changes both: it is no oracle here.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

import loraformat

if TYPE_CHECKING:
    from lab import Lab
    from zoo import Trained

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

ENDS = {
    "gpt2": ("wte", "lm_head"),
    "llama_tied": ("embed_tokens", "lm_head"),
    "qwen2_tied": ("embed_tokens", "lm_head"),
}
EMBEDDING, HEAD, BOTH = [0], [1], [0, 1]
TIED = [
    ("gpt2", "ts_nofold", EMBEDDING, "fp32", "copy"),
    ("gpt2", "ts_nofold", HEAD, "fp32", "copy"),
    ("gpt2", "ts_nofold", BOTH, "fp32", "copy"),
    ("llama_tied", "ts_nofold", HEAD, "one_file", "share"),
    ("llama_tied", "dynamo_noopt", EMBEDDING, "many_files", "copy"),
    ("llama_tied", "dynamo_noopt", BOTH, "one_file", "copy"),
    ("qwen2_tied", "ts_nofold", EMBEDDING, "one_file", "share"),
    ("qwen2_tied", "dynamo_noopt", HEAD, "one_file", "copy"),
    ("qwen2_tied", "dynamo_noopt", HEAD, "fp32", "copy"),
    ("llama_tied", "ts_nofold", BOTH, "fp16", "copy"),
]


def _check(base: Path, trained: "Trained", merged: Path, allowed: float, copies: int, **options: Any) -> None:
    from lab import difference
    from zoo import run_onnx

    assert trained.effect > 100 * allowed
    receipt = loraformat.merge(base, [trained.folder], merged, **options)
    found = run_onnx(merged, trained.feeds, trained.specimen.outputs)
    assert difference(found, trained.unmerged) <= allowed
    assert sum(bool(weight.copied_from) for weight in receipt.weights) == copies
    before, after = (onnx.load(path, load_external_data=False).graph for path in (base, merged))
    assert len(after.initializer) == len(before.initializer) + copies
    assert [node.op_type for node in after.node] == [node.op_type for node in before.node]
    assert loraformat.verify(merged, base, [trained.folder]).holds


@pytest.mark.parametrize(("model", "exporter", "ends", "form", "external_data"), TIED)
def test_tied_tables(
    lab: "Lab", tmp_path: Path, model: str, exporter: Any, ends: list[int], form: str, external_data: str
) -> None:
    """Both adapted: they part, and one of them keeps the tensor."""
    import zoo_wide  # noqa: F401 - more models

    trained = lab.trained(model, [ENDS[model][end] for end in ends])
    base = lab.exported(model, exporter, form)
    merged = (base.parent if external_data == "share" else tmp_path) / f"{'-'.join(map(str, ends))}.merged.onnx"
    allowed = 2e-2 if form == "fp16" else 1e-4
    options = {"external_data": external_data, "force": True}
    _check(base, trained, merged, allowed, 1, **options)


@pytest.mark.parametrize(("targets", "copies"), [(["a"], 1), (["b"], 1), (["a", "b"], 1), (["b", "c"], 1)])
@pytest.mark.parametrize("exporter", ["ts", "ts_nofold", "dynamo"])
@pytest.mark.parametrize("model", ["twins_2d", "twins_3d"])
def test_layers_of_equal_numbers(
    lab: "Lab", tmp_path: Path, model: str, exporter: Any, targets: list[str], copies: int
) -> None:
    _check(lab.exported(model, exporter), lab.trained(model, targets), tmp_path / "merged.onnx", 1e-4, copies)


@pytest.mark.parametrize("exporter", ["ts_nofold", "dynamo_noopt"])
def test_two_adapters_one_for_each_end(lab: "Lab", tmp_path: Path, exporter: Any) -> None:
    """Logits are linear in the head: two merges apart tell what both at once must give."""
    from zoo import run_onnx

    base, ends = lab.exported("llama_tied", exporter), ENDS["llama_tied"]
    embedding, head = (lab.trained("llama_tied", [end]) for end in ends)
    merged = tmp_path / "merged.onnx"
    loraformat.merge(base, [embedding.folder, head.folder], merged)
    assert loraformat.verify(merged, base, [embedding.folder, head.folder]).holds
    again, other = tmp_path / "again.onnx", tmp_path / "other.onnx"
    loraformat.merge(base, [embedding.folder], other)
    loraformat.merge(other, [head.folder], again)
    outputs = [run_onnx(path, head.feeds, head.specimen.outputs)["logits"] for path in (merged, again)]
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-4)
    assert np.abs(outputs[0] - head.unmerged["logits"]).max() > 1e-2


@pytest.mark.parametrize("end", [0, 1])
def test_tied_tables_without_names(lab: "Lab", tmp_path: Path, end: int) -> None:
    """The checkpoint's numbers are those of both readers; a lookup and a product are told apart by what they are."""
    import zoo
    from lab import difference
    from onnx_paths import forget_names
    from safetensors.torch import save_model

    specimen = zoo.SPECIMENS["llama_tied"]
    trained = lab.trained("llama_tied", [ENDS["llama_tied"][end]])
    base = forget_names(specimen, lab.exported("llama_tied", "ts_nofold"), tmp_path / "base.onnx")
    save_model(specimen.make(), str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    merged = tmp_path / "merged.onnx"
    loraformat.merge(base, [trained.folder], merged, base_checkpoint=tmp_path / "model.safetensors")
    assert difference(zoo.run_onnx(merged, trained.feeds, specimen.outputs), trained.unmerged) <= 1e-4


@pytest.mark.parametrize("ends", [EMBEDDING, HEAD, BOTH])
@pytest.mark.parametrize("exporter", ["ts_nofold", "dynamo_noopt"])
def test_tied_tables_in_codes_of_8_bits(lab: "Lab", tmp_path: Path, exporter: Any, ends: list[int]) -> None:
    """What onnxruntime's quantiser makes of a tied table: one tensor of codes, one scale, one zero point."""
    from lab import difference
    from zoo import run_onnx

    quantization = pytest.importorskip("onnxruntime.quantization")
    trained = lab.trained("qwen2_tied", [ENDS["qwen2_tied"][end] for end in ends])
    exported, base = lab.exported("qwen2_tied", exporter), tmp_path / "base.onnx"
    quantization.quantize_dynamic(exported, base, weight_type=quantization.QuantType.QInt8, reduce_range=True)
    receipt = loraformat.merge(base, [trained.folder], tmp_path / "merged.onnx")
    assert sum(bool(weight.copied_from) for weight in receipt.weights) == 1
    outputs = trained.specimen.outputs
    plain, coded, merged = (
        run_onnx(path, trained.feeds, outputs) for path in (exported, base, tmp_path / "merged.onnx")
    )
    noise = difference(coded, plain)
    assert difference(merged, trained.unmerged) < 2 * noise < trained.effect / 10
    assert loraformat.verify(tmp_path / "merged.onnx", base, [trained.folder], run=True).holds


@pytest.mark.parametrize("own_type", [False, True])
@pytest.mark.parametrize(
    ("exporter", "form"),
    [("ts", "fp32"), ("dynamo", "one_file"), ("dynamo_noopt", "cloned"), ("ts_nofold", "fp32")],
    ids=["folded", "optimised", "cloned", "one tensor"],
)
def test_trained_tokens_of_tied_tables(tmp_path: Path, exporter: Any, form: str, own_type: bool) -> None:
    """PEFT gives the head the table's rows; it saves them once, but twice for a type of their own."""
    import peft
    import torch
    import zoo
    from lab import difference

    specimen, tokens = zoo.SPECIMENS["llama_tied"], [5, 61, 82, 17]
    config: Any = peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=tokens)
    if own_type:
        config = peft.TrainableTokensConfig(token_indices=tokens)
    trained = zoo.train(specimen, tmp_path / "adapter", lora=config)
    model = specimen.make()
    if form == "cloned":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    base = zoo.export(specimen, tmp_path / "base.onnx", exporter, model)
    base = zoo.to_external(base, tmp_path / "external.onnx", one_file=True) if form == "one_file" else base
    merged = tmp_path / "merged.onnx"
    receipt = loraformat.merge(base, [trained.folder], merged)
    noted = [problem.code for problem in receipt.problems if problem.code in ("LF411", "LF648", "LF649")]
    assert noted == ((["LF411"] if exporter == "ts_nofold" else []) if own_type else ["LF648"])
    assert trained.effect > 1e-2
    assert difference(zoo.run_onnx(merged, trained.feeds, specimen.outputs), trained.unmerged) <= 1e-4
    assert loraformat.verify(merged, base, [trained.folder], run=True).holds
    if own_type:
        return
    loraformat.merge(base, [trained.folder], tmp_path / "table.onnx", untie=True)
    alone = zoo.run_onnx(tmp_path / "table.onnx", trained.feeds, specimen.outputs)
    assert difference(alone, trained.unmerged) > 1e-2
