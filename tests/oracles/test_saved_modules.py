"""Modules that PEFT trains and saves whole: the merged model computes what PEFT computes with them in place.

The adapters here are of bert: a classifier that was trained beside LoRA, biases and norms. A merge that leaves them out
would be a model that nobody trained, so each test also shows that their effect is far larger than what is allowed.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import loraformat
from loraformat.adapter import Adapter

if TYPE_CHECKING:
    from lab import Lab
    from zoo import Trained

pytestmark = pytest.mark.oracle
for _package in ("torch", "peft", "transformers", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

CORPUS = Path(os.environ.get("LORAFORMAT_CORPUS", Path(__file__).parents[3] / "shared" / "corpus"))
EXPORTERS = ("ts", "ts_nofold", "dynamo", "dynamo_noopt")
ATTENTION = ["query", "value"]
HEAD = ("classifier.bias", "classifier.weight")


def train(folder: Path, targets: list[str], **fields: Any) -> "Trained":
    """Train bert with LoRA on `targets` and whatever else the fields of the configuration ask for."""
    from peft import LoraConfig
    from zoo import SPECIMENS
    from zoo import train as train_one

    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, **fields)
    return train_one(SPECIMENS["bert"], folder, seed=5, lora=config)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> "Trained":
    folder = tmp_path_factory.mktemp("classifier")
    return train(folder, ATTENTION, task_type="SEQ_CLS", modules_to_save=["classifier"])


@pytest.fixture(scope="module")
def biases(tmp_path_factory: pytest.TempPathFactory) -> "Trained":
    """Every bias of the model and those of its norms, beside LoRA of a module that has none."""
    return train(tmp_path_factory.mktemp("biases"), ["word_embeddings"], bias="all")


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory) -> "Trained":
    return train(tmp_path_factory.mktemp("norms"), ATTENTION, modules_to_save=["LayerNorm", "position_embeddings"])


def refusal(base: Path, adapter: Path, output: Path) -> set[str]:
    """Merge; return the reason codes of a refusal, nothing when there was none."""
    try:
        loraformat.merge(base, [adapter], output)
    except loraformat.LoraformatError as error:
        return set(error.codes)
    return set()


def replaced(adapter: Adapter) -> dict[str, Any]:
    """Return the values of every replaced parameter by name."""
    saved = [target for target in adapter.targets if target.kind == "replace"]
    return {f"{target.name}.{role}": factor.read() for target in saved for role, factor in target.factors.items()}


def check(base: Path, trained: "Trained", output: Path, expected: Mapping[str, Any]) -> None:
    """Check the merged numbers, and that neither the base nor the adapter without what was saved whole is as near."""
    from lab import ABSOLUTE_TOLERANCE, assert_same_graph, changed_initializers, difference
    from zoo import initializers, run_onnx

    adapter = loraformat.load(trained.folder)
    assert set(replaced(adapter)) == set(expected)
    receipt = loraformat.merge(base, [adapter], output)
    assert_same_graph(base, output)
    assert changed_initializers(base, output) == {weight.name for weight in receipt.weights}
    assert len(receipt.weights) == len(expected) + len(trained.deltas)
    assert receipt.problems == ()
    names = trained.specimen.outputs
    assert difference(run_onnx(output, trained.feeds, names), trained.unmerged) <= ABSOLUTE_TOLERANCE
    assert trained.effect > 100 * ABSOLUTE_TOLERANCE
    partial = replace(adapter, targets=tuple(each for each in adapter.targets if each.kind != "replace"))
    loraformat.merge(base, [partial], output.with_name("partial.onnx"))
    without = difference(run_onnx(output.with_name("partial.onnx"), trained.feeds, names), trained.unmerged)
    assert without > 100 * ABSOLUTE_TOLERANCE
    stored = initializers(output)
    for name, values in replaced(adapter).items():
        if name in stored:
            np.testing.assert_array_equal(stored[name], values)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_classifier_beside_lora(lab: "Lab", tmp_path: Path, classifier: "Trained", exporter: str) -> None:
    check(lab.exported("bert", exporter), classifier, tmp_path / "merged.onnx", dict.fromkeys(HEAD))


def test_a_classifier_that_nobody_asked_for(lab: "Lab", tmp_path: Path) -> None:
    """PEFT adds it by itself for this task."""
    trained = train(tmp_path / "adapter", ATTENTION, task_type="SEQ_CLS")
    check(lab.exported("bert", "ts"), trained, tmp_path / "merged.onnx", dict.fromkeys(HEAD))


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
def test_trained_biases(lab: "Lab", tmp_path: Path, biases: "Trained", exporter: str) -> None:
    from zoo import SPECIMENS

    names = [name for name, _ in SPECIMENS["bert"].make().named_parameters() if name.endswith(".bias")]
    assert len(names) > 15
    check(lab.exported("bert", exporter), biases, tmp_path / "merged.onnx", dict.fromkeys(names))


@pytest.mark.parametrize("exporter", ["ts", "dynamo"])
def test_norms_and_a_table(lab: "Lab", tmp_path: Path, norms: "Trained", exporter: str) -> None:
    from zoo import SPECIMENS

    found = [name for name, _ in SPECIMENS["bert"].make().named_parameters()]
    names = [name for name in found if ".LayerNorm." in name or "position_embeddings" in name]
    check(lab.exported("bert", exporter), norms, tmp_path / "merged.onnx", dict.fromkeys(names))


def test_half_of_a_classifier(lab: "Lab", tmp_path: Path, classifier: "Trained") -> None:
    from zoo import initializers

    base = lab.exported("bert", "ts")
    loraformat.merge(base, [(classifier.folder, 0.5)], tmp_path / "half.onnx")
    before, after = initializers(base), initializers(tmp_path / "half.onnx")
    for name, values in replaced(loraformat.load(classifier.folder)).items():
        np.testing.assert_allclose(after[name], (before[name] + values) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_bias_beside_factors_is_merged_with_them(lab: "Lab", tmp_path: Path, bias: str) -> None:
    """PEFT 0.21 saves the bias of an adapted module as `base_layer.bias`."""
    from lab import ABSOLUTE_TOLERANCE, assert_same_graph, difference
    from zoo import run_onnx

    trained, base = train(tmp_path / "adapter", ATTENTION, bias=bias), lab.exported("bert", "ts")
    loraformat.merge(base, [trained.folder], tmp_path / "merged.onnx")
    assert_same_graph(base, tmp_path / "merged.onnx")
    found = run_onnx(tmp_path / "merged.onnx", trained.feeds, trained.specimen.outputs)
    assert difference(found, trained.unmerged) <= ABSOLUTE_TOLERANCE
    assert trained.effect > 100 * ABSOLUTE_TOLERANCE


@pytest.mark.parametrize("exporter", ["ts", "ts_nofold", "dynamo", "dynamo_noopt"])
def test_a_norm_of_one_plus_weight_is_never_mistaken_for_its_weight(tmp_path: Path, exporter: str) -> None:
    """Gemma's: folded, the sum stands in the place of the weight, of the same shape and under the module's own path."""
    import torch
    from peft import LoraConfig
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    from zoo import TEXT_AXES, Specimen, _randomised, _tokens, export
    from zoo import train as train_one

    def make() -> torch.nn.Module:
        config = Gemma3TextConfig(
            vocab_size=97,
            hidden_size=24,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=10,
            max_position_embeddings=64,
            use_cache=False,
            attn_implementation="eager",
        )
        return _randomised(lambda: Gemma3ForCausalLM(config))

    def configure() -> LoraConfig:
        return LoraConfig(r=3, lora_alpha=6, target_modules=["down_proj"], modules_to_save=["input_layernorm"])

    specimen = Specimen("gemma", make, lambda: _tokens(97), configure, TEXT_AXES)
    trained = train_one(specimen, tmp_path / "adapter")
    base, output = export(specimen, tmp_path / "base.onnx", exporter), tmp_path / "merged.onnx"
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.merge(base, [trained.folder], output)
    assert set(caught.value.codes) == {"LF401"}
    assert all("input_layernorm" in problem.where for problem in caught.value.problems)
    assert not output.exists()


def test_a_real_adapter_with_two_heads(tmp_path: Path) -> None:
    """distilbert's classifier and the pre_classifier that PEFT took along: PEFT's own merged model, to rounding."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    from transformers import DistilBertConfig, DistilBertForSequenceClassification
    from zoo import _randomised, quiet

    folder = CORPUS / "Tashu014__lora-imdb-distilbert"
    if not folder.exists():
        pytest.skip(f"no {folder.name} in the corpus")
    adapter = loraformat.load(folder)
    heads = replaced(adapter)
    assert set(heads) == {f"{name}.{role}" for name in ("classifier", "pre_classifier") for role in ("weight", "bias")}
    labels, width = heads["classifier.weight"].shape
    config = DistilBertConfig(vocab_size=211, dim=width, num_labels=labels)
    model = _randomised(lambda: DistilBertForSequenceClassification(config))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(before, tmp_path / "base.safetensors")
    receipt = loraformat.merge(tmp_path / "base.safetensors", [folder], tmp_path / "merged.safetensors")
    assert len(receipt.weights) == 12 + 4
    with quiet():
        expected = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged.safetensors")
    assert found.keys() == expected.keys() == before.keys()
    changed = {weight.name for weight in receipt.weights}
    for name, tensor in found.items():
        assert torch.equal(tensor, before[name]) == (name not in changed), name
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
        if name in heads:
            assert torch.equal(tensor, expected[name])
            np.testing.assert_array_equal(tensor.numpy(), heads[name])
