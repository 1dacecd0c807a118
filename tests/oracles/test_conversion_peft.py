"""PEFT loads the folders that conversion writes, and each of its layers then changes its weight as the source says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loraformat
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target

torch = pytest.importorskip("torch", reason="needs torch")
peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = pytest.mark.oracle

from builders import MemoryFactor  # noqa: E402

Linear = torch.nn.Linear
SHAPES = {"layers.0.q_proj": (6, 5), "layers.0.k_proj": (4, 5), "layers.1.q_proj": (6, 5), "x.layers.1.q_proj": (6, 5)}
SCALINGS = {
    "one for all": [Scaling(ScalingRule.ALPHA_OVER_RANK, 16.0)] * 4,
    "each its own": [Scaling(ScalingRule.ALPHA_OVER_RANK, alpha) for alpha in (16.0, 3.5, 1.0, 7.0)],
    "by the root": [Scaling(ScalingRule.ALPHA_OVER_SQRT_RANK, alpha) for alpha in (16.0, 16.0, 2.0, 16.0)],
    "multipliers": [Scaling(ScalingRule.MULTIPLIER, each) for each in (1.0, 0.3, 20.0, 1.0)],
    "two rules": [Scaling(ScalingRule.ALPHA_OVER_SQRT_RANK, 8.0), *[Scaling(ScalingRule.ALPHA_OVER_RANK, 8.0)] * 3],
}


class Nested(torch.nn.Module):  # type: ignore[name-defined, misc]
    """A model of linear modules under the paths of `SHAPES`."""

    def __init__(self) -> None:
        super().__init__()
        for path, (out, inner) in SHAPES.items():
            *parents, last = path.split(".")
            owner: Any = self
            for name in parents:
                if not hasattr(owner, name):
                    owner.add_module(name, torch.nn.Module())
                owner = getattr(owner, name)
            owner.add_module(last, Linear(inner, out, bias=False))


def make_adapter(scalings: list[Scaling], ranks: tuple[int, ...] = (2, 4, 2, 3), **roles: bool) -> Adapter:
    dice = np.random.default_rng(3)
    targets = []
    for (name, (out, inner)), scaling, rank in zip(SHAPES.items(), scalings, ranks, strict=True):
        arrays = {
            "lora_A.weight": dice.standard_normal((rank, inner)),
            "lora_B.weight": dice.standard_normal((out, rank)),
        }
        if roles.get("dora"):
            arrays["lora_magnitude_vector"] = np.abs(dice.standard_normal(out)) + 1
        factors = {role: MemoryFactor(role, array.astype(np.float32)) for role, array in arrays.items()}
        targets.append(Target(name, "dora" if roles.get("dora") else "lora", SlotKind.LINEAR, factors, rank, scaling))
    return Adapter(tuple(sorted(targets, key=lambda target: target.name)))


def write_folder(adapter: Adapter, folder: Path) -> Path:
    """Write through the face: first as our own file, then converted."""
    native = folder / "native.safetensors"
    from loraformat.containers.safetensors import CONTAINER
    from loraformat.schemes.native import write_tensors

    tensors, metadata = write_tensors(adapter)
    with native.open("wb") as sink:
        CONTAINER.write(sink, [(name, each.dtype, each.shape, each.read) for name, each in tensors.items()], metadata)
    loraformat.convert(native, "peft", folder / "peft", verify=True)
    return folder / "peft"


@pytest.mark.parametrize("name", SCALINGS)
def test_peft_loads_every_scaling(name: str, tmp_path: Path) -> None:
    adapter = make_adapter(SCALINGS[name])
    model = peft.PeftModel.from_pretrained(Nested(), write_folder(adapter, tmp_path))
    wrapped = dict(model.base_model.model.named_modules())
    for target in adapter.targets:
        layer = wrapped[target.name]
        down, up = (target.factors[role].read().astype(np.float64) for role in ("lora_A.weight", "lora_B.weight"))
        ours = target.scale * (up @ down)
        theirs = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(theirs, ours, rtol=2e-6, atol=1e-6)


def test_peft_merges_a_dora_that_was_converted(tmp_path: Path) -> None:
    """W' = m · (W + sBA) / ‖W + sBA‖ by rows, from the paper (arXiv 2402.09353)."""
    adapter = make_adapter(SCALINGS["each its own"], dora=True)
    base = Nested()
    before = {
        name: module.weight.detach().numpy().astype(np.float64)
        for name, module in base.named_modules()
        if name in SHAPES
    }
    merged = peft.PeftModel.from_pretrained(base, write_folder(adapter, tmp_path)).merge_and_unload()
    for target in adapter.targets:
        down, up, size = (
            target.factors[role].read().astype(np.float64)
            for role in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        changed = before[target.name] + target.scale * (up @ down)
        expected = size[:, None] * changed / np.linalg.norm(changed, axis=1, keepdims=True)
        found = dict(merged.named_modules())[target.name].weight.detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_no_module_is_adapted_that_the_source_does_not_name(tmp_path: Path) -> None:
    """`layers.1.q_proj` is the end of `x.layers.1.q_proj`: ranks and alphas must not leak to it."""
    adapter = make_adapter(SCALINGS["each its own"])
    config = peft.LoraConfig.from_pretrained(write_folder(adapter, tmp_path))
    assert set(config.target_modules) == set(SHAPES)
    for target in adapter.targets:
        fitting = [pattern for pattern in config.rank_pattern if _fits(pattern, target.name)]
        assert [config.rank_pattern[each] for each in fitting] == ([] if target.rank == config.r else [target.rank])


def _fits(pattern: str, name: str) -> bool:
    import re

    return re.match(rf"(.*\.)?({pattern})$", name) is not None
