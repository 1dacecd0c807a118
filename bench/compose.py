"""Seconds to bring the sum of three adapters to their own rank: from the factors, beside the SVD of the dense sum.

    python bench/compose.py                      # all targets of a 7B Llama from factors, one of each shape dense
    python bench/compose.py --layers 4 --dense 0 # ours alone, on four layers

Three adapters of rank 16 on the seven matrices of each layer (4096 x 4096, 11008 x 4096, 4096 x 11008), with singular
values that fall as those of trained adapters do, are composed to rank 16. The peer is what PEFT's `svd` combination
does: form the sum, `torch.linalg.svd` in float32, cut; with numpy's SVD where torch is missing. It is measured on the
first target of each of the first `--dense` shapes, and the ratio is that of the same target. Printed are also how far
the two results lie apart, and the largest sine between the kept subspaces.
"""

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import loraformat
from loraformat.adapter import Adapter, Scaling, ScalingRule, SlotKind, Target
from loraformat.dtypes import BY_NAME, Dtype

HIDDEN, INNER, RANK, ALPHA, LAYERS = 4096, 11008, 16, 32.0, 32
WEIGHTS = (0.7, -0.3, 0.5)
MATRICES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


@dataclass(frozen=True, eq=False)
class Held:
    """A factor in memory."""

    name: str
    array: NDArray[np.float32]

    @property
    def dtype(self) -> Dtype:
        return BY_NAME["float32"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def elements(self) -> int:
        return self.array.size

    def read(self) -> NDArray[np.float32]:
        return self.array


def build_adapter(rng: np.random.Generator, layers: int) -> Adapter:
    """Return an adapter on every matrix of `layers` layers."""
    targets = []
    for layer in range(layers):
        for module, (out, inner) in MATRICES.items():
            name = f"model.layers.{layer}.{module}"
            falling = np.geomspace(1, 0.03, RANK).astype(np.float32)
            down = rng.standard_normal((RANK, inner), np.float32) / np.float32(inner**0.5)
            up = rng.standard_normal((out, RANK), np.float32) / np.float32(out**0.5) * falling
            factors = {"lora_A.weight": Held("A", down), "lora_B.weight": Held("B", up)}
            targets.append(
                Target(name, "lora", SlotKind.LINEAR, factors, RANK, Scaling(ScalingRule.ALPHA_OVER_RANK, ALPHA))
            )
    return Adapter(tuple(sorted(targets, key=lambda target: target.name)))


def pick(adapters: list[Adapter], name: str) -> list[tuple[Adapter, float]]:
    """Return the adapters with one target each, and their weights."""
    alone = (Adapter(tuple(target for target in adapter.targets if target.name == name)) for adapter in adapters)
    return list(zip(alone, WEIGHTS, strict=True))


def time_ours(items: list[tuple[Adapter, float]], rounds: int) -> tuple[list[float], Adapter]:
    """Return the seconds of each round, checks and all, and the result."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        made = loraformat.compose(items, rank=RANK)
        seconds.append(time.perf_counter() - start)
    return seconds, made


def time_dense(items: list[tuple[Adapter, float]]) -> tuple[float, NDArray[Any], NDArray[Any], str]:
    """Return the seconds that the dense way takes, its B and A, and the library that did it."""
    pairs = []
    for adapter, weight in items:
        (target,) = adapter.targets
        down, up = (target.factors[f"lora_{side}.weight"].read() for side in "AB")
        pairs.append((up, down, np.float32(target.scale * weight)))
    try:
        import torch
    except ImportError:
        start = time.perf_counter()
        left, sizes, right = np.linalg.svd(sum(weight * (up @ down) for up, down, weight in pairs))
        seconds = time.perf_counter() - start
        return seconds, left[:, :RANK] * sizes[:RANK], right[:RANK], f"numpy {np.__version__}"
    start = time.perf_counter()
    dense = sum(float(weight) * (torch.from_numpy(up) @ torch.from_numpy(down)) for up, down, weight in pairs)
    full, values, rows = torch.linalg.svd(dense, full_matrices=True)  # PEFT's default
    seconds = time.perf_counter() - start
    name = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    return seconds, (full[:, :RANK] * values[:RANK]).numpy(), rows[:RANK].numpy(), name


def widest_angle(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the largest sine between the column spaces of two matrices (n, rank)."""
    first, second = (np.linalg.qr(matrix.astype(np.float64))[0] for matrix in (one, other))
    return float(np.linalg.norm(second - first @ (first.T @ second), 2))


def compare_target(adapters: list[Adapter], name: str, rounds: int) -> None:
    """Print both ways on one target."""
    items = pick(adapters, name)
    seconds, made = time_ours(items, rounds)
    ours = statistics.median(seconds)
    dense, up, down, library = time_dense(items)
    (target,) = made.targets
    found_down, found_up = (target.factors[f"lora_{side}.weight"].read() for side in "AB")
    # ‖BA − B'A'‖ by QR of the stacked factors.
    left, right = np.linalg.qr(np.hstack([found_up, -up]).astype(float))[1], np.vstack([found_down, down]).astype(float)
    size = np.linalg.norm(np.linalg.qr(up.astype(float))[1] @ down.astype(float))
    apart = np.linalg.norm(left @ right) / size
    angles = widest_angle(found_up, up), widest_angle(found_down.T, down.T)
    print(f"{name}  {up.shape[0]} x {down.shape[1]}")
    print(
        f"  from factors   {ours * 1e3:.1f} ms  ({min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f}, {rounds} rounds)"
    )
    print(f"  dense          {dense:.2f} s  ({library})")
    print(f"  ratio          {dense / ours:.0f} x")
    print(f"  apart          {apart:.2g} relative; largest sine between subspaces {max(angles):.2g}")


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--dense", type=int, default=1, help="shapes on which the dense way is measured (default 1)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    adapters = [build_adapter(rng, arguments.layers) for _ in WEIGHTS]
    print(f"machine          {os.cpu_count()} processors, numpy {np.__version__}")
    seconds, made = time_ours(list(zip(adapters, WEIGHTS, strict=True)), 1)
    print(
        f"whole adapter    {len(made.targets)} targets, 3 x rank {RANK} to rank {RANK}: {seconds[0]:.2f} s from factors"
    )
    shapes = {shape: f"model.layers.0.{module}" for module, shape in reversed(MATRICES.items())}
    order = sorted(shapes, key=lambda shape: shape[0] * shape[1])
    for shape in order[: arguments.dense]:
        compare_target(adapters, shapes[shape], arguments.rounds)


if __name__ == "__main__":
    main()
