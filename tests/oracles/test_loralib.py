"""loralib 0.1.2, the library of the LoRA paper: its layers, and the checkpoint that it was published with.

A layer of loralib in training mode is called with random factors; the plain layer with our merged weights must give the
same. The checkpoint is RoBERTa base tuned on MNLI, as microsoft/LoRA published it; the base here is of its shape with
random numbers, which is as hard to get right.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import loraformat
from builders import MemoryFactor, write_tensors
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target
from loraformat.containers.safetensors import CONTAINER
from loraformat.schemes import SCHEMES
from loraformat.strict_json import JsonValue

if TYPE_CHECKING:
    from torch import Tensor, nn

pytestmark = pytest.mark.oracle
for _package in ("torch", "loralib"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

CORPUS = Path(os.environ.get("LORAFORMAT_CORPUS", Path(__file__).parents[3] / "shared" / "corpus"))
CHECKPOINT = CORPUS / "microsoft__LoRA" / "examples" / "NLU" / "roberta_base_lora_mnli.bin"
RELATIVE = 1e-6

# --- layers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer of loralib.

    Attributes:
        make: makes it; its own merging is switched off.
        inputs: makes what it is called with.
        kind: our kind.
        slot: what it is in an adapter.
        options: what no tensor of it says.
    """

    make: "Callable[[], nn.Module]"
    inputs: "Callable[[], Tensor]"
    kind: str
    slot: SlotKind
    options: dict[str, JsonValue] = field(default_factory=dict)


def _layers() -> dict[str, Layer]:
    import loralib as lora
    import torch

    how: dict[str, Any] = {"r": 2, "lora_alpha": 6, "merge_weights": False}

    def vectors(width: int) -> "Callable[[], Tensor]":
        return lambda: torch.randn(3, width, dtype=torch.float64)

    def images(channels: int) -> "Callable[[], Tensor]":
        return lambda: torch.randn(2, channels, 7, 6, dtype=torch.float64)

    def merged(enabled: list[bool], *, turned: bool = False) -> Layer:
        slot = SlotKind.LINEAR_TRANSPOSED if turned else SlotKind.LINEAR
        return Layer(
            lambda: lora.MergedLinear(10, 12, enable_lora=enabled, fan_in_fan_out=turned, **how),
            vectors(10),
            "merged_linear",
            slot,
            {"enable_lora": list(enabled)},
        )

    return {
        "linear": Layer(lambda: lora.Linear(5, 7, **how), vectors(5), "lora", SlotKind.LINEAR),
        "linear, fan in fan out": Layer(
            lambda: lora.Linear(5, 7, fan_in_fan_out=True, **how), vectors(5), "lora", SlotKind.LINEAR_TRANSPOSED
        ),
        "embedding": Layer(
            lambda: lora.Embedding(9, 4, **how), lambda: torch.tensor([[0, 8, 3]]), "lora", SlotKind.EMBEDDING
        ),
        "query and value": merged([True, False, True]),
        "query and value, fan in fan out": merged([True, False, True], turned=True),
        "the last of four": merged([False, False, False, True]),
        "all three": merged([True, True, True]),
        "conv2d": Layer(lambda: lora.Conv2d(3, 5, 3, **how), images(3), "conv_lora", SlotKind.CONV, {"kernel_size": 3}),
        "conv2d in groups": Layer(
            lambda: lora.Conv2d(4, 6, 3, groups=2, **how),
            images(4),
            "conv_lora",
            SlotKind.CONV,
            {"kernel_size": 3, "groups": 2},
        ),
        "conv1d of size 1": Layer(
            lambda: lora.Conv1d(3, 5, 1, **how),
            lambda: torch.randn(2, 3, 6, dtype=torch.float64),
            "conv_lora",
            SlotKind.CONV,
            {"kernel_size": 1, "axes": 1},
        ),
    }


def read(layer: Layer, module: "nn.Module") -> Target:
    """Return the target that a layer's factors are."""
    ends = (
        ("lora_embedding_A", "lora_embedding_B")
        if layer.slot is SlotKind.EMBEDDING
        else ("lora_A.weight", "lora_B.weight")
    )
    arrays = (getattr(module, name).detach().numpy().copy() for name in ("lora_A", "lora_B"))
    factors = {role: MemoryFactor(role, array) for role, array in zip(ends, arrays, strict=True)}
    scaling = Scaling(ScalingRule.ALPHA_OVER_RANK, 6.0)
    return Target("m", layer.kind, layer.slot, factors, 2, scaling, options=layer.options)


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "linear, fan in fan out",
        "embedding",
        "query and value",
        "query and value, fan in fan out",
        "the last of four",
        "all three",
        "conv2d",
        "conv2d in groups",
        "conv1d of size 1",
    ],
)
def test_merged_is_trained(tmp_path: Path, name: str) -> None:
    import torch

    torch.manual_seed(len(name))
    layer = _layers()[name]
    module = layer.make().double()
    module.train()
    inner = getattr(module, "conv", module)
    with torch.no_grad():
        for factor in (module.lora_A, module.lora_B):
            factor.copy_(torch.randn_like(factor))
    inputs = layer.inputs()
    trained = module(inputs)
    weight, bias = inner.weight.detach().clone(), getattr(inner, "bias", None)
    base = write_tensors(tmp_path / "base.safetensors", {"m.weight": weight.numpy()})
    receipt = loraformat.merge(base, [Adapter((read(layer, module),))], tmp_path / "merged.safetensors")
    merged = CONTAINER.open(Path(receipt.output)).tensors["m.weight"].read()
    with torch.no_grad():
        for factor in (module.lora_A, module.lora_B):
            factor.zero_()
        untrained = module(inputs)
        inner.weight.copy_(torch.from_numpy(merged))
        found = module(inputs)
    assert bias is None or bias.abs().max() > 0
    assert (trained - untrained).abs().max() > 0.1
    torch.testing.assert_close(found, trained, rtol=RELATIVE, atol=RELATIVE * float(trained.detach().abs().max()))


# --- the paper's checkpoint ------------------------------------------------------------------------------------------

needs_checkpoint = pytest.mark.skipif(
    not CHECKPOINT.is_file() or SCHEMES.find("loralib") is None,
    reason=f"the checkpoint is read by the scheme loralib from {CHECKPOINT}; LORAFORMAT_CORPUS names another corpus",
)
TOKENS, VOCABULARY = 6, 1000


@dataclass(frozen=True)
class Roberta:
    """A model of the checkpoint's shape, and what loralib makes of it.

    Attributes:
        folder: with `base.safetensors` and `base.onnx`.
        inputs: what both were called with.
        plain: logits without the adapter.
        adapted: logits with it, in loralib's own modules.
    """

    folder: Path
    inputs: "dict[str, Tensor]"
    plain: "Tensor"
    adapted: "Tensor"

    def make(self) -> "nn.Module":
        return make_roberta()


def make_roberta() -> "nn.Module":
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    config = RobertaConfig(  # A small vocabulary: the checkpoint changes no embedding.
        vocab_size=VOCABULARY,
        num_labels=3,
        max_position_embeddings=514,
        type_vocab_size=1,
        attn_implementation="eager",
    )
    model = RobertaForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # Equal ones, as before training, the exporter would store once for all modules.
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def adapt(model: "nn.Module") -> "nn.Module":
    """Put loralib's layers into a model and load the checkpoint, as microsoft/LoRA's examples do."""
    import loralib as lora
    import torch

    for block in model.roberta.encoder.layer:
        attention = block.attention.self
        for name in ("query", "value"):
            plain = getattr(attention, name)
            wide = lora.Linear(plain.in_features, plain.out_features, r=8, lora_alpha=16, merge_weights=False)
            wide.weight.data, wide.bias.data = plain.weight.data, plain.bias.data
            setattr(attention, name, wide)
    saved = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)
    missing, unexpected = model.load_state_dict(saved, strict=False)
    assert not unexpected
    assert not [name for name in missing if "lora_" in name]
    return model.eval()


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Roberta]:
    import torch
    from safetensors.torch import save_file

    pytest.importorskip("transformers", reason="the model is one of transformers")
    folder = tmp_path_factory.mktemp("roberta")
    model = make_roberta()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "base.safetensors")
    tokens = torch.randint(5, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The exporter is the older one, and says so.
        plain = model(**inputs).logits
        torch.onnx.export(
            model,
            (inputs["input_ids"], inputs["attention_mask"]),
            str(folder / "base.onnx"),
            input_names=list(inputs),
            output_names=["logits"],
            dynamo=False,
        )
        adapted = adapt(model)(**inputs).logits
    yield Roberta(folder, inputs, plain, adapted)
    for path in folder.iterdir():  # A gigabyte and a half.
        path.unlink()


@needs_checkpoint
def test_its_trained_numbers_are_those_of_the_paper() -> None:
    """Table 2 of arXiv 2106.09685: 0.3 M for RoBERTa base. The classifier beside them is not counted there."""
    found = loraformat.inspect(CHECKPOINT, alpha=16).as_json()
    assert (found["scheme"], found["ranks"], found["scales"]) == ("loralib", {"8": 24}, {"2": 24})
    assert found["parameters_by_kind"]["lora"] == 24 * 8 * (768 + 768) == 294_912
    assert f"{found['parameters_by_kind']['lora'] / 1e6:.1f} M" == "0.3 M"
    assert found["parameters_by_kind"]["replace"] == (768 + 1) * 768 + (768 + 1) * 3
    assert found["parameters"] == sum(found["parameters_by_kind"].values())


@needs_checkpoint
def test_its_scale_is_asked_for_and_known(tmp_path: Path) -> None:
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.load(CHECKPOINT)
    (problem,) = caught.value.problems
    assert problem.code == "LF211"
    assert "--alpha 16" in problem.advice


@needs_checkpoint
def test_it_is_merged_into_a_checkpoint(tmp_path: Path, roberta: Roberta) -> None:
    import torch
    from safetensors.torch import load_file

    receipt = loraformat.merge(roberta.folder / "base.safetensors", [CHECKPOINT], tmp_path / "m.safetensors", alpha=16)
    model = roberta.make()
    model.load_state_dict(load_file(receipt.output))
    with torch.no_grad():
        found = model(**roberta.inputs).logits
    assert (roberta.adapted - roberta.plain).abs().max() > 0.01
    torch.testing.assert_close(found, roberta.adapted, rtol=0, atol=1e-5)
    assert len(receipt.weights) == 24 + 4
    Path(receipt.output).unlink()


@needs_checkpoint
def test_it_is_merged_into_an_onnx_export(tmp_path: Path, roberta: Roberta) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="it runs the merged graph")
    receipt = loraformat.merge(roberta.folder / "base.onnx", [CHECKPOINT], tmp_path / "m.onnx", alpha=16)
    session = onnxruntime.InferenceSession(receipt.output, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in roberta.inputs.items()})
    np.testing.assert_allclose(found, roberta.adapted.numpy(), rtol=0, atol=1e-5)
    Path(receipt.output).unlink()
