"""What LyCORIS' modules compute in training is what a merged layer computes.

Each algorithm of lycoris-lora 4.1.3 is put on a layer of every kind that it supports, given random numbers, and called
as in training; its saved tensors are merged by us into the layer's own weights, and the plain layer is called with
these. The package's own `merge_to` is no oracle: for LoHa and LoKr it squares the scale.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from numpy.typing import NDArray

import loraformat
from builders import MemoryFactor, write_tensors
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target
from loraformat.containers.safetensors import CONTAINER
from loraformat.kinds import KINDS
from loraformat.strict_json import JsonValue

if TYPE_CHECKING:
    from torch import Tensor, nn

pytestmark = pytest.mark.oracle
for _package in ("torch", "lycoris"):
    pytest.importorskip(_package, reason=f"the oracle tests need {_package}")

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Layer:
    """A layer without an adapter.

    Attributes:
        make: makes it.
        inputs: shape of what it is called with.
        slot: what it is in an adapter.
    """

    make: "Callable[[], nn.Module]"
    inputs: tuple[int, ...]
    slot: SlotKind


def _layers() -> dict[str, Layer]:
    from torch import nn

    return {
        "linear": Layer(lambda: nn.Linear(20, 16), (3, 20), SlotKind.LINEAR),
        "linear without bias": Layer(lambda: nn.Linear(12, 32, bias=False), (3, 12), SlotKind.LINEAR),
        "conv1d": Layer(lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9), SlotKind.CONV),
        "conv2d": Layer(lambda: nn.Conv2d(5, 8, (3, 2), stride=2), (2, 5, 9, 8), SlotKind.CONV),
        "conv2d 1x1": Layer(lambda: nn.Conv2d(5, 8, 1), (2, 5, 4, 3), SlotKind.CONV),
        "conv2d in groups": Layer(lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 7, 7), SlotKind.CONV),
        "conv3d": Layer(lambda: nn.Conv3d(3, 8, (2, 3, 1)), (1, 3, 5, 5, 4), SlotKind.CONV),
        "layernorm": Layer(lambda: nn.LayerNorm(12), (3, 12), SlotKind.PARAMETER),
        "groupnorm": Layer(lambda: nn.GroupNorm(2, 12), (3, 12, 5), SlotKind.PARAMETER),
    }


@dataclass(frozen=True)
class Algorithm:
    """One of LyCORIS' modules, and how what it saves is read.

    Attributes:
        module: module and class below `lycoris.modules`.
        kind: our kind.
        settings: arguments of its constructor.
        names: its tensors to our roles, where they differ; those of None are no factors.
        is_scaled: whether alpha over the rank is its scale.
        options: from its saved tensors to the target's options.
        is_double: whether it can compute in float64.
    """

    module: tuple[str, str]
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str | None] = field(default_factory=dict)
    is_scaled: bool = False
    options: Callable[[Arrays], dict[str, JsonValue]] = field(default=lambda saved: {})
    is_double: bool = True


UP_DOWN = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight", "alpha": None}
COLUMN = {**UP_DOWN, "dora_scale": "lora_magnitude_vector"}
DORA = {"lora_dim": 3, "alpha": 6, "weight_decompose": True}
NO_ALPHA: Mapping[str, str | None] = {"alpha": None}


def _bound(saved: Arrays) -> dict[str, JsonValue]:
    return {"constraint": float(saved["alpha"])}


def _side(saved: Arrays) -> dict[str, JsonValue]:
    return {"on_input": bool(saved["on_input"])}


ALGORITHMS = {
    "locon": Algorithm(("locon", "LoConModule"), "lora", {"lora_dim": 3, "alpha": 6}, UP_DOWN, is_scaled=True),
    "locon rslora": Algorithm(
        ("locon", "LoConModule"), "lora", {"lora_dim": 3, "alpha": 6, "rs_lora": True}, UP_DOWN, is_scaled=True
    ),
    "locon tucker": Algorithm(
        ("locon", "LoConModule"), "locon", {"lora_dim": 3, "alpha": 6, "use_tucker": True}, UP_DOWN, is_scaled=True
    ),
    "dora": Algorithm(("locon", "LoConModule"), "dora", DORA, COLUMN, is_scaled=True),
    "dora over inputs": Algorithm(
        ("locon", "LoConModule"), "dora", {**DORA, "wd_on_out": False}, UP_DOWN, is_scaled=True
    ),
    "loha": Algorithm(("loha", "LohaModule"), "loha", {"lora_dim": 3, "alpha": 6}, NO_ALPHA, is_scaled=True),
    "loha tucker": Algorithm(
        ("loha", "LohaModule"), "loha", {"lora_dim": 3, "alpha": 6, "use_tucker": True}, NO_ALPHA, is_scaled=True
    ),
    "loha with dora": Algorithm(
        ("loha", "LohaModule"),
        "dora_loha",
        {**DORA, "wd_on_out": True},
        {**NO_ALPHA, "dora_scale": "lora_magnitude_vector"},
        is_scaled=True,
    ),
    "loha with dora over inputs": Algorithm(
        ("loha", "LohaModule"), "dora_loha", {**DORA, "wd_on_out": False}, NO_ALPHA, is_scaled=True
    ),
    "lokr": Algorithm(
        ("lokr", "LokrModule"), "lokr", {"lora_dim": 2, "alpha": 6, "factor": 2}, NO_ALPHA, is_scaled=True
    ),
    "lokr, both decomposed": Algorithm(
        ("lokr", "LokrModule"),
        "lokr",
        {"lora_dim": 1, "alpha": 6, "factor": 4, "decompose_both": True},
        NO_ALPHA,
        is_scaled=True,
    ),
    "lokr tucker": Algorithm(
        ("lokr", "LokrModule"),
        "lokr",
        {"lora_dim": 1, "alpha": 6, "factor": 2, "use_tucker": True},
        NO_ALPHA,
        is_scaled=True,
    ),
    "lokr whole": Algorithm(
        ("lokr", "LokrModule"), "lokr", {"lora_dim": 9, "alpha": 6, "factor": 2, "full_matrix": True}, NO_ALPHA
    ),
    "lokr with dora over inputs": Algorithm(
        ("lokr", "LokrModule"),
        "dora_lokr",
        {**DORA, "lora_dim": 2, "factor": 2, "wd_on_out": False},
        NO_ALPHA,
        is_scaled=True,
    ),
    "full": Algorithm(("full", "FullModule"), "diff"),
    "norm": Algorithm(("norms", "NormModule"), "diff"),
    "glora": Algorithm(
        ("glora", "GLoRAModule"), "lycoris_glora", {"lora_dim": 3, "alpha": 6}, NO_ALPHA, is_scaled=True
    ),
    "ia3 on outputs": Algorithm(("ia3", "IA3Module"), "lycoris_ia3", {}, {"on_input": None}, options=_side),
    "ia3 on inputs": Algorithm(
        ("ia3", "IA3Module"), "lycoris_ia3", {"train_on_input": True}, {"on_input": None}, options=_side
    ),
    "diag-oft": Algorithm(
        ("diag_oft", "DiagOFTModule"), "lycoris_oft", {"lora_dim": 4}, NO_ALPHA, options=_bound, is_double=False
    ),
    "diag-oft rescaled": Algorithm(
        ("diag_oft", "DiagOFTModule"),
        "lycoris_oft",
        {"lora_dim": 4, "rescaled": True, "constraint": 0.01},
        NO_ALPHA,
        options=_bound,
        is_double=False,
    ),
    "boft": Algorithm(
        ("boft", "ButterflyOFTModule"), "lycoris_boft", {"lora_dim": 4}, NO_ALPHA, options=_bound, is_double=False
    ),
    "boft rescaled": Algorithm(
        ("boft", "ButterflyOFTModule"),
        "lycoris_boft",
        {"lora_dim": 4, "rescaled": True, "constraint": 0.02},
        NO_ALPHA,
        options=_bound,
        is_double=False,
    ),
}
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
MATRICES = ("linear", "linear without bias", *CONVOLUTIONS, "conv2d 1x1")
SUPPORTED = {
    "locon": (*MATRICES, "conv2d in groups"),
    "locon tucker": (*CONVOLUTIONS, "conv2d in groups"),
    "loha tucker": CONVOLUTIONS,
    "lokr tucker": CONVOLUTIONS,
    "norm": ("layernorm", "groupnorm"),
}
CASES = [(algorithm, layer) for algorithm in ALGORITHMS for layer in SUPPORTED.get(algorithm, MATRICES)]


def train(algorithm: Algorithm, layer: "nn.Module") -> "tuple[nn.Module, dict[str, NDArray[Any]]]":
    """Return LyCORIS' module on a layer, with random numbers in place of trained ones, and what it saves."""
    from importlib import import_module

    file, name = algorithm.module
    module = getattr(import_module(f"lycoris.modules.{file}"), name)("m", layer, 1.0, **algorithm.settings)
    module = module.double() if algorithm.is_double else module
    _shake(module)
    module.apply_to()
    return module.eval(), {key: tensor.detach().numpy().copy() for key, tensor in module.state_dict().items()}


def read(algorithm: Algorithm, slot: SlotKind, saved: Arrays) -> Target:
    """Return the target that saved tensors are, in our roles."""
    roles = {algorithm.names.get(name, name): array for name, array in saved.items()}
    lengths = roles.get("lora_magnitude_vector")
    if lengths is not None:  # A column there, and as PEFT has it here.
        roles["lora_magnitude_vector"] = lengths.reshape(1, *lengths.shape[:1], *lengths.shape[2:])[
            0 if lengths.ndim == 2 else ...
        ]
    factors = {role: MemoryFactor(role, array) for role, array in roles.items() if role is not None}
    scaling, rank = Scaling(ScalingRule.MULTIPLIER, 1.0), 0
    if algorithm.is_scaled:
        kind = KINDS.find(algorithm.kind)
        assert kind is not None
        rank = kind.rank(factors)
    if rank:  # LoKr of two whole matrices has none, and LyCORIS gives it the scale 1.
        scaling = Scaling(ScalingRule.ALPHA_OVER_RANK, float(saved["alpha"]))
    return Target("m", algorithm.kind, slot, factors, rank, scaling, options=algorithm.options(saved))


def merge(layer: "nn.Module", target: Target, folder: Path) -> "dict[str, Tensor]":
    """Return the layer's weights with the target merged into them, by way of files."""
    import torch

    weights = {f"m.{name}": tensor.detach().numpy() for name, tensor in layer.state_dict().items()}
    base = write_tensors(folder / "base.safetensors", weights)
    receipt = loraformat.merge(base, [Adapter((target,))], folder / "merged.safetensors")
    tensors = CONTAINER.open(Path(receipt.output)).tensors
    return {name.removeprefix("m."): torch.from_numpy(tensor.read()) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("algorithm", "layer"), CASES, ids=[" on ".join(case) for case in CASES])
def test_merged_is_trained(tmp_path: Path, algorithm: str, layer: str) -> None:
    import torch
    from torch.func import functional_call

    how, what = ALGORITHMS[algorithm], _layers()[layer]
    torch.manual_seed(len(algorithm) + len(layer))
    form = torch.float64 if how.is_double else torch.float32
    plain = what.make().to(form).eval()
    inputs = torch.randn(what.inputs, dtype=form)
    before, weights = plain(inputs), {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    adapted, saved = train(how, plain)
    trained = adapted(inputs)
    fresh = what.make().to(form).eval()
    fresh.load_state_dict(weights)
    merged = merge(fresh, read(how, what.slot, saved), tmp_path)
    found = functional_call(fresh, merged, (inputs,))
    relative = 1e-6 if how.is_double else 2e-5
    assert (trained - before).abs().max() > 0.01
    torch.testing.assert_close(found, trained, rtol=relative, atol=relative * float(trained.detach().abs().max()))


# --- files -----------------------------------------------------------------------------------------------------------

_BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
PLACES = {
    "linear": f"{_BLOCK}.attn1.to_q",
    "linear without bias": f"{_BLOCK}.attn1.to_k",
    "conv1d": "down_blocks.0.resnets.0.conv1",
    "conv2d": "down_blocks.0.resnets.0.conv2",
    "conv2d 1x1": "down_blocks.0.attentions.0.proj_in",
    "conv2d in groups": "down_blocks.0.downsamplers.0.conv",
    "conv3d": "down_blocks.0.resnets.1.conv1",
    "layernorm": f"{_BLOCK}.norm1",
    "groupnorm": "down_blocks.0.attentions.0.norm",
}
"""Layers to what they are called: modules of Stable Diffusion, whose names are flat in a file."""


def build(layers: "Mapping[str, nn.Module]") -> "nn.Module":
    """Return a model with the layers at their places."""
    from torch import nn

    root = nn.Module()
    for name, layer in layers.items():
        *parents, last = PLACES[name].split(".")
        owner = root
        for each in parents:
            if not hasattr(owner, each):
                owner.add_module(each, nn.Module())
            owner = getattr(owner, each)
        owner.add_module(last, layer)
    return root


def save(how: Algorithm, model: "nn.Module", path: Path) -> "nn.Module":
    """Put the package's own network on a model, give it random numbers, and save it as the package does."""
    from lycoris.wrapper import LycorisNetwork, network_module_dict

    settings = {"alpha": 1, **how.settings}
    dim, alpha = settings.pop("lora_dim", 4), settings.pop("alpha")
    algorithm = next((name for name, each in network_module_dict.items() if each.__name__ == how.module[1]), "full")
    before = {name: getattr(LycorisNetwork, name) for name in ("LORA_PREFIX", "TARGET_REPLACE_MODULE")}
    LycorisNetwork.apply_preset({"lora_prefix": "lora_unet"})
    try:
        network = LycorisNetwork(
            model,
            lora_dim=dim,
            conv_lora_dim=dim,
            alpha=alpha,
            conv_alpha=alpha,
            network_module=algorithm,
            train_norm=how.module[1] == "NormModule",
            **settings,
        )
    finally:
        for name, value in before.items():
            setattr(LycorisNetwork, name, value)
    network.apply_to()  # Only now are its modules its own.
    network = network.double() if how.is_double else network
    _shake(network)
    network.save_weights(str(path), None, {})
    return network.eval()


def _shake(module: "nn.Module") -> None:
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_file_of_the_package_is_read_and_merged(tmp_path: Path, algorithm: str) -> None:
    import torch
    from torch.func import functional_call

    how = ALGORITHMS[algorithm]
    names = SUPPORTED.get(algorithm, MATRICES)
    torch.manual_seed(len(algorithm))
    form = torch.float64 if how.is_double else torch.float32
    layers = {name: _layers()[name].make().to(form).eval() for name in names}
    model = build(layers)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    base = write_tensors(tmp_path / "base.safetensors", {name: each.numpy() for name, each in weights.items()})
    inputs = {name: torch.randn(_layers()[name].inputs, dtype=form) for name in names}
    network = save(how, model, tmp_path / "adapter.safetensors")
    trained = {name: layers[name](inputs[name]).detach() for name in names}
    network.restore()

    adapter = loraformat.load(tmp_path / "adapter.safetensors")
    assert adapter.scheme == "kohya"
    assert {target.kind for target in adapter.targets} == {how.kind}
    receipt = loraformat.merge(base, [tmp_path / "adapter.safetensors"], tmp_path / "merged.safetensors")
    merged = CONTAINER.open(Path(receipt.output)).tensors
    relative = 1e-6 if how.is_double else 2e-5
    for name in names:
        prefix = f"{PLACES[name]}."
        mine = {key.removeprefix(prefix): each.read() for key, each in merged.items() if key.startswith(prefix)}
        fresh = _layers()[name].make().to(form).eval()
        found = functional_call(fresh, {key: torch.from_numpy(each) for key, each in mine.items()}, (inputs[name],))
        plain = {key.removeprefix(prefix): each for key, each in weights.items() if key.startswith(prefix)}
        assert (trained[name] - functional_call(fresh, plain, (inputs[name],))).abs().max() > 0.01, name
        torch.testing.assert_close(
            found, trained[name], rtol=relative, atol=relative * float(trained[name].abs().max())
        )


def test_every_algorithm_of_the_package_is_tried() -> None:
    """But for those that save what another saves."""
    from importlib import import_module
    from pkgutil import iter_modules

    package = import_module("lycoris.modules")
    files = {module.name for module in iter_modules(package.__path__)}
    elsewhere = {"base", "dylora", "tlora"}
    assert files - elsewhere == {how.module[0] for how in ALGORITHMS.values()}
