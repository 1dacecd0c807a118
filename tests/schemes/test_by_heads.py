"""MiniMax-H3's q, k and v by heads, as DiffSynth-Studio writes them: read one below the other, written as found."""

from pathlib import Path

import numpy as np
import pytest

import loraformat
from builders import write_tensors
from loraformat.adapter import Adapter
from loraformat.loading import load_adapter, open_base
from loraformat.problems import Problem
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes.dotted import SCHEME
from schemes import modules as m

QKV, OUT, TIME = "blocks.0.attn.qkv_proj", "blocks.0.attn.out_proj", "time_embedder.proj_in"
HEADS, SIZE, INNER = 3, 128, 10
DOWN, UP = "lora_A.default.weight", "lora_B.default.weight"
RNG = np.random.default_rng(6)


def read(modules: m.Modules, down: str = DOWN, up: str = UP) -> tuple[Adapter, dict[str, object]]:
    tensors = dict(m.lora(modules, down, up))
    return SCHEME.read(Bundle(Path("a.safetensors"), tensors), NOT_STATED), tensors  # type: ignore[arg-type]


def errors(adapter: Adapter) -> list[Problem]:
    return [problem for problem in adapter.problems if problem.severity == "error"]


def by_heads(parts: list[np.ndarray]) -> np.ndarray:
    """Return q, k and v, each of heads, as the file has them: q, k and v of the first head, of the second ..."""
    return np.concatenate([part[SIZE * head : SIZE * (head + 1)] for head in range(HEADS) for part in parts])


def test_every_part_gets_its_own_rows(tmp_path: Path) -> None:
    parts = [RNG.standard_normal((HEADS * SIZE, 2), np.float32) for _ in range(3)]
    down = RNG.standard_normal((2, INNER), np.float32)
    tensors = {f"{QKV}.{DOWN}": down, f"{QKV}.{UP}": by_heads(parts)}
    source = write_tensors(tmp_path / "diffsynth.safetensors", tensors)
    done = loraformat.convert(source, "diffusers", tmp_path / "split.safetensors")
    assert [problem.severity for problem in done.problems if problem.code == "LF328"] == ["note"]
    split = {target.name.rpartition(".")[2]: target for target in load_adapter(tmp_path / "split.safetensors").targets}
    for name, expected in zip(("to_q", "to_k", "to_v"), parts, strict=True):
        np.testing.assert_array_equal(split[name].factors["lora_B.weight"].read(), expected)
    base = write_tensors(
        tmp_path / "base.safetensors",
        {f"transformer_blocks.0.attn.{name}.weight": np.zeros((HEADS * SIZE, INNER), np.float32) for name in split},
    )
    loraformat.merge(base, source, tmp_path / "merged.safetensors", scale=1.0)
    merged = open_base(tmp_path / "merged.safetensors").list_tensors()
    for tensor, expected in zip(sorted(merged, key=lambda each: "qkv".index(each.name[-8])), parts, strict=True):
        np.testing.assert_allclose(tensor.read(), expected @ down, rtol=1e-5, atol=1e-5)


def test_it_is_written_back_by_heads() -> None:
    adapter, tensors = read({QKV: (3 * HEADS * SIZE, INNER), OUT: (INNER, HEADS * SIZE)})
    written = SCHEME.write(adapter, Bundle(Path("a"), {}).facts).tensors
    assert set(written) == set(tensors)
    for key, factor in written.items():
        np.testing.assert_array_equal(factor.read(), tensors[key].read())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("modules", "keys"),
    [
        pytest.param({QKV: (3 * HEADS * SIZE, INNER)}, ("lora_A.weight", "lora_B.weight"), id="other tools' keys"),
        pytest.param({QKV: (3 * HEADS * SIZE, INNER), "blocks.0.mixer": (4, 6)}, (DOWN, UP), id="another model"),
        pytest.param({TIME: (8, INNER)}, (DOWN, UP), id="nothing fused"),
    ],
)
def test_other_files_are_left_as_they_are(modules: m.Modules, keys: tuple[str, str]) -> None:
    adapter, tensors = read(modules, *keys)
    assert "LF328" not in {problem.code for problem in adapter.problems}
    for target in adapter.targets:
        stored = tensors[f"{target.name.removeprefix('transformer.')}.{keys[1]}"]
        np.testing.assert_array_equal(target.factors["lora_B.weight"].read(), stored.read())  # type: ignore[attr-defined]


def test_rows_of_no_heads_are_refused() -> None:
    (problem,) = errors(read({QKV: (3 * HEADS * 40, INNER)})[0])
    assert (problem.code, problem.where) == ("LF315", f"transformer.{QKV}")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_base_of_the_same_names_may_have_them_in_another_order(tmp_path: Path, prefix: str) -> None:
    weight = np.zeros((3 * HEADS * SIZE, INNER), np.float32)
    base = write_tensors(tmp_path / "base.safetensors", {f"{prefix}{QKV}.weight": weight})
    factors = {f"{QKV}.lora_A.weight": weight[:2], f"{QKV}.lora_B.weight": weight[:, :2]}
    adapter = write_tensors(tmp_path / "adapter.safetensors", factors)
    receipt = loraformat.merge(base, adapter, tmp_path / "merged.safetensors", scale=1.0)
    assert [problem.severity for problem in receipt.problems if problem.code == "LF329"] == ["warning"]
