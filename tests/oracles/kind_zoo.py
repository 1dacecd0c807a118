"""One small model with every module that adapters change, and each of PEFT's kinds on it with random numbers.

This file imports torch and peft at its top: only tests that have checked for them may import it.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import torch
    from numpy.typing import NDArray
    from safetensors.numpy import save_file
    from torch import nn
    from transformers.pytorch_utils import Conv1D

Arrays = dict[str, NDArray[Any]]


class Parts(nn.Module):
    """Modules side by side, each with an input of its own, so that each is seen alone; no weight is square."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(24, 12)
        self.wide = nn.Linear(12, 36, bias=False)
        self.odd = nn.Linear(11, 17)
        self.turned = Conv1D(36, 24)
        self.conv = nn.Conv2d(4, 6, (3, 3), padding=1)
        self.point = nn.Conv2d(8, 6, 1)
        self.line = nn.Conv1d(4, 6, 3)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.table = nn.Embedding(30, 8)
        self.norm = nn.LayerNorm(12)

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name)(value) for name, value in inputs.items()}


def make_inputs(form: torch.dtype) -> dict[str, torch.Tensor]:
    """Return an input for each module."""
    dice = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=dice, dtype=torch.float64).to(form)

    return {
        "lin": draw(5, 24),
        "wide": draw(5, 12),
        "odd": draw(5, 11),
        "turned": draw(5, 24),
        "conv": draw(2, 4, 7, 5),
        "point": draw(2, 8, 4, 3),
        "line": draw(2, 4, 9),
        "grouped": draw(2, 4, 7, 5),
        "table": torch.tensor([[0, 3, 29], [7, 7, 11]]),
        "norm": draw(5, 12),
    }


@dataclass(frozen=True)
class Specimen:
    """A configuration of one kind.

    Attributes:
        make: makes the configuration for some target modules.
        targets: the modules that it adapts.
        form: the number form in which PEFT computes it.
        settle: what to do with the model after its weights were drawn.
        tolerance: how far outputs may be apart, beside the largest.
    """

    make: Callable[[list[str]], Any]
    targets: Sequence[str]
    form: torch.dtype = torch.float64
    settle: Callable[[nn.Module], None] = field(default=lambda model: None)
    tolerance: float = 1e-9


@dataclass(frozen=True)
class Trained:
    """What a specimen left behind.

    Attributes:
        base: folder with the base's `model.safetensors`.
        folder: PEFT's folder.
        before: outputs without the adapter.
        unmerged: outputs with the adapter beside the weights: what training computed.
        merged: outputs after PEFT's own merge; None where that failed.
    """

    base: Path
    folder: Path
    before: Arrays
    unmerged: Arrays
    merged: Arrays | None


def run(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Arrays:
    with torch.no_grad():
        return {name: output.double().numpy() for name, output in model(**inputs).items()}


def train(specimen: Specimen, root: Path, seed: int = 0) -> Trained:
    """Return a specimen with random numbers in every trained parameter, saved as PEFT saves it."""
    torch.manual_seed(seed)
    model = Parts().to(specimen.form).eval()
    base = root / "base"
    base.mkdir(parents=True)
    save_file({name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}, base / "model.safetensors")
    inputs = make_inputs(specimen.form)
    inputs = {name: value for name, value in inputs.items() if name in specimen.targets}
    before = run(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, specimen.make(list(specimen.targets)), autocast_adapter_dtype=False)
        adapted = adapted.to(specimen.form).eval()
        _draw(adapted, seed)
        specimen.settle(adapted)
        unmerged = run(adapted, inputs)
        adapted.save_pretrained(root / "adapter")
        try:
            merged = run(adapted.merge_and_unload(), inputs)
        except (RuntimeError, ValueError, NotImplementedError):
            merged = None
    return Trained(base / "model.safetensors", root / "adapter", before, unmerged, merged)


def _draw(model: nn.Module, seed: int) -> None:
    dice = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # AdaLoRA's ranknum has a gradient and is not saved: PEFT itself starts from init_r again.
            if parameter.requires_grad and "ranknum" not in name:
                noise = torch.randn(parameter.shape, generator=dice, dtype=torch.float64) * 0.2
                parameter.add_(noise.to(parameter.dtype))


def _settle_peanut(model: nn.Module) -> None:
    """Make the network's numbers larger, so that what comes out of it is not next to nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "peanut_" in name:
                parameter *= 3


LINEAR = ("lin", "wide")
SPECIMENS: dict[str, Specimen] = {
    "dora": Specimen(
        lambda t: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=t),
        (*LINEAR, "conv", "point", "line", "table"),
    ),
    "dora turned": Specimen(
        lambda t: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, fan_in_fan_out=True, target_modules=t), ("turned",)
    ),
    "adalora": Specimen(
        lambda t: peft.AdaLoraConfig(init_r=5, target_r=3, total_step=10, tinit=1, tfinal=1, target_modules=t), LINEAR
    ),
    "loha": Specimen(
        lambda t: peft.LoHaConfig(r=3, alpha=5, init_weights=False, target_modules=t),
        (*LINEAR, "conv", "point", "line"),
        tolerance=1e-7,
    ),
    "loha effective": Specimen(
        lambda t: peft.LoHaConfig(r=3, alpha=5, use_effective_conv2d=True, target_modules=t),
        ("lin", "conv", "point", "line"),
        tolerance=1e-7,
    ),
    "lokr": Specimen(lambda t: peft.LoKrConfig(r=2, alpha=5, target_modules=t), (*LINEAR, "conv", "point", "line")),
    "lokr both": Specimen(
        lambda t: peft.LoKrConfig(r=1, alpha=5, decompose_both=True, target_modules=t),
        (*LINEAR, "conv", "point", "line"),
    ),
    "lokr effective": Specimen(
        lambda t: peft.LoKrConfig(r=1, alpha=5, use_effective_conv2d=True, target_modules=t), ("lin", "conv")
    ),
    "lokr full": Specimen(
        lambda t: peft.LoKrConfig(r=64, alpha=5, target_modules=t), (*LINEAR, "conv", "point", "line")
    ),
    "ia3": Specimen(
        lambda t: peft.IA3Config(target_modules=t, feedforward_modules=["wide", "point"]), (*LINEAR, "conv", "point")
    ),
    "ia3 turned": Specimen(
        lambda t: peft.IA3Config(target_modules=t, feedforward_modules=[], fan_in_fan_out=True), ("turned",)
    ),
    "ia3 grouped": Specimen(lambda t: peft.IA3Config(target_modules=t, feedforward_modules=["grouped"]), ("grouped",)),
    "oft": Specimen(lambda t: peft.OFTConfig(r=0, oft_block_size=4, target_modules=t), (*LINEAR, "point", "table")),
    "oft exact": Specimen(
        lambda t: peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, target_modules=t), (*LINEAR, "table")
    ),
    "oft shared": Specimen(
        lambda t: peft.OFTConfig(r=0, oft_block_size=4, block_share=True, coft=True, eps=0.1, target_modules=t),
        LINEAR,
        tolerance=1e-7,
    ),
    "boft": Specimen(lambda t: peft.BOFTConfig(boft_block_size=4, target_modules=t), (*LINEAR, "conv", "point")),
    "vera": Specimen(lambda t: peft.VeraConfig(r=5, target_modules=t), LINEAR),
    "vera turned": Specimen(lambda t: peft.VeraConfig(r=5, fan_in_fan_out=True, target_modules=t), ("turned",)),
    "vera drawn": Specimen(
        lambda t: peft.VeraConfig(r=5, save_projection=False, projection_prng_key=11, target_modules=t), LINEAR
    ),
    "pvera drawn": Specimen(
        lambda t: peft.PveraConfig(r=5, save_projection=False, projection_prng_key=12, target_modules=t), LINEAR
    ),
    "pvera": Specimen(lambda t: peft.PveraConfig(r=5, target_modules=t), LINEAR),
    "hra": Specimen(lambda t: peft.HRAConfig(r=4, target_modules=t), (*LINEAR, "conv", "point")),
    "hra gs": Specimen(lambda t: peft.HRAConfig(r=4, apply_GS=True, target_modules=t), (*LINEAR, "conv")),
    "fourierft": Specimen(
        lambda t: peft.FourierFTConfig(n_frequency=40, scaling=150, target_modules=t),
        LINEAR,
        torch.float32,
        tolerance=2e-5,
    ),
    "fourierft turned": Specimen(
        lambda t: peft.FourierFTConfig(n_frequency=40, scaling=150, fan_in_fan_out=True, target_modules=t),
        ("turned",),
        torch.float32,
        tolerance=2e-5,
    ),
    "waveft": Specimen(lambda t: peft.WaveFTConfig(n_frequency=40, use_idwt=False, target_modules=t), LINEAR),
    **{
        f"waveft {family}": Specimen(
            lambda t, family=family: peft.WaveFTConfig(  # type: ignore[misc]
                n_frequency=40, wavelet_family=family, target_modules=t
            ),
            (*LINEAR, "odd"),
        )
        for family in ("db1", "db2", "db7", "sym4", "sym9")
    },
    "randlora": Specimen(lambda t: peft.RandLoraConfig(r=5, randlora_alpha=7, target_modules=t), LINEAR),
    "vblora": Specimen(
        lambda t: peft.VBLoRAConfig(r=3, num_vectors=9, vector_length=4, topk=2, target_modules=t), LINEAR
    ),
    "vblora topk": Specimen(
        lambda t: peft.VBLoRAConfig(
            r=3, num_vectors=9, vector_length=4, topk=2, save_only_topk_weights=True, target_modules=t
        ),
        LINEAR,
    ),
    "miss": Specimen(lambda t: peft.MissConfig(r=5, target_modules=t), LINEAR),
    "miss mini": Specimen(lambda t: peft.MissConfig(r=4, mini_r=3, init_weights="mini", target_modules=t), LINEAR),
    "miss bat": Specimen(lambda t: peft.MissConfig(r=4, init_weights="bat", target_modules=t), LINEAR),
    "shira": Specimen(lambda t: peft.ShiraConfig(r=2, target_modules=t), LINEAR),
    "c3a": Specimen(lambda t: peft.C3AConfig(block_size=4, target_modules=t), LINEAR, tolerance=1e-6),
    "road 1": Specimen(lambda t: peft.RoadConfig(variant="road_1", group_size=4, target_modules=t), LINEAR),
    "road 2": Specimen(lambda t: peft.RoadConfig(variant="road_2", group_size=6, target_modules=t), LINEAR),
    "road 4": Specimen(lambda t: peft.RoadConfig(variant="road_4", group_size=4, target_modules=t), LINEAR),
    "delora": Specimen(lambda t: peft.DeloraConfig(r=3, target_modules=t), LINEAR),
    "gralora": Specimen(lambda t: peft.GraloraConfig(r=4, alpha=7, gralora_k=2, target_modules=t), LINEAR),
    "gralora hybrid": Specimen(
        lambda t: peft.GraloraConfig(r=4, alpha=7, gralora_k=2, hybrid_r=3, target_modules=t), LINEAR
    ),
    "hira": Specimen(lambda t: peft.HiraConfig(r=3, target_modules=t), (*LINEAR, "conv", "point", "line", "table")),
    "hira turned": Specimen(lambda t: peft.HiraConfig(r=3, fan_in_fan_out=True, target_modules=t), ("turned",)),
    "glora": Specimen(lambda t: peft.GloraConfig(r=3, target_modules=t), (*LINEAR, "odd")),
    "glora of one path": Specimen(
        lambda t: peft.GloraConfig(config_A_B="none", config_C="vector", config_D_E="none", target_modules=t), ("lin",)
    ),
    "glora vector": Specimen(
        lambda t: peft.GloraConfig(config_A_B="vector", config_C="none", config_D_E="vector", target_modules=t), LINEAR
    ),
    "glora constant": Specimen(
        lambda t: peft.GloraConfig(config_A_B="constant", config_C="none", config_D_E="constant", target_modules=t),
        LINEAR,
    ),
    "deft": Specimen(lambda t: peft.DeftConfig(r=3, alpha=5, target_modules=t), LINEAR, tolerance=1e-6),
    "deft qr": Specimen(
        lambda t: peft.DeftConfig(r=3, decomposition_method="qr", target_modules=t), LINEAR, tolerance=1e-6
    ),
    "deft turned": Specimen(
        lambda t: peft.DeftConfig(r=3, fan_in_fan_out=True, target_modules=t), ("turned",), tolerance=1e-6
    ),
    "para": Specimen(lambda t: peft.DeftConfig(r=3, para=True, target_modules=t), LINEAR, tolerance=1e-6),
    "osf": Specimen(lambda t: peft.OSFConfig(effective_rank=5, target_modules=t), LINEAR, tolerance=2e-6),
    "kasa": Specimen(
        lambda t: peft.LoraConfig(r=3, lora_alpha=5, kasa_config=peft.KasaConfig(), target_modules=t),
        LINEAR,
        tolerance=2e-6,
    ),
    "peanut": Specimen(lambda t: peft.PeanutConfig(r=4, depth=2, target_modules=t), LINEAR, settle=_settle_peanut),
    "peanut gelu": Specimen(
        lambda t: peft.PeanutConfig(r=4, depth=1, act_fn="gelu", target_modules=t), LINEAR, settle=_settle_peanut
    ),
    "peanut silu": Specimen(
        lambda t: peft.PeanutConfig(r=4, depth=0, act_fn="silu", target_modules=t), LINEAR, settle=_settle_peanut
    ),
    "unilora": Specimen(
        lambda t: peft.UniLoraConfig(r=3, theta_d_length=40, save_indices=True, target_modules=t), LINEAR
    ),
    "frod": Specimen(
        lambda t: peft.FrodConfig(progressbar=False, sparse_rate=0.1, target_modules=t),
        (*LINEAR, "odd"),
        torch.float32,
        tolerance=1e-5,
    ),
    "beft": Specimen(lambda t: peft.BeftConfig(target_modules=t), ("lin",)),
    "ln_tuning": Specimen(lambda t: peft.LNTuningConfig(target_modules=t), ("norm",)),
    "tinylora": Specimen(
        lambda t: peft.TinyLoraConfig(r=2, u=5, weight_tying=1.0, target_modules=t), (*LINEAR, "table")
    ),
    **{
        f"tinylora tied {tying}": Specimen(
            lambda t, tying=tying: peft.TinyLoraConfig(r=2, u=5, weight_tying=tying, target_modules=t),  # type: ignore[misc]
            ("lin", "wide", "odd", "table"),
        )
        for tying in (0.0, 0.5)
    },
    "supertuning": Specimen(lambda t: peft.SupertuningConfig(sparsity=0.8, target_modules=t), LINEAR),
    "supra": Specimen(lambda t: peft.SupertuningConfig(sparsity=0.8, r=3, lora_alpha=5, target_modules=t), LINEAR),
}
