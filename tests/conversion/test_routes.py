"""Which model names are of, where several have them: by depths, rows and proportions, or because it does not matter."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from loraformat.adapter import Adapter
from loraformat.base_facts import NO_FACTS
from loraformat.conversion import respell_by
from loraformat.conversion._respelling import respell
from loraformat.problems import Problem
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes.diffusers import SCHEME as DIFFUSERS
from loraformat.schemes.dotted import SCHEME as DOTTED
from loraformat.spellings import read_names
from schemes import modules as m

A, B = "lora_A.weight", "lora_B.weight"
H = 24


def written(names: m.Modules, scheme: str = "diffusers") -> tuple[set[str], list[Problem]]:
    """Return what dotted names of a transformer become, and what stands against it."""
    tensors = m.lora(m.behind("diffusion_model.", names), A, B)
    adapter = DOTTED.read(Bundle(Path("a.safetensors"), tensors), NOT_STATED)
    respelled, problems = respell(adapter, scheme, NO_FACTS)
    return {target.name.removeprefix("transformer.") for target in respelled.targets}, problems


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"single_blocks.0.linear1": (7 * H, H)}, "single_transformer_blocks.0.proj_mlp"),
        ({"single_blocks.0.linear1": (9 * H, H)}, "single_transformer_blocks.0.attn.to_qkv_mlp_proj"),
        ({"double_blocks.0.img_mlp.0": (4 * H, H)}, "transformer_blocks.0.ff.net.0.proj"),
        ({"double_blocks.0.img_mlp.0": (6 * H, H)}, "transformer_blocks.0.ff.linear_in"),
        ({"double_blocks.0.img_mlp.2": (H, 3 * H)}, "transformer_blocks.0.ff.linear_out"),
        ({"layers.0.attention.qkv": (5 * H, 3 * H)}, "layers.0.attn.to_q"),
        ({"layers.0.attention.qkv": (3 * H, H), "layers.0.attention.out": (H, H)}, "layers.0.attention.to_out.0"),
    ],
)
def test_proportions_tell_models_apart(names: m.Modules, expected: str) -> None:
    """FLUX.1 and FLUX.2 share names; so do Lumina 2 and Z-Image."""
    found, problems = written(names)
    assert not problems
    assert expected in found


def test_tables_that_agree_need_not_be_told_apart() -> None:
    """The double blocks of FLUX.1, FLUX.2 and HunyuanVideo have one name for the fused projections in each spelling."""
    found, problems = written({"double_blocks.0.img_attn.qkv": (3 * H, H), "double_blocks.1.txt_attn.proj": (H, H + 1)})
    assert not problems
    assert found == {
        *(f"transformer_blocks.0.attn.to_{name}" for name in "qkv"),
        "transformer_blocks.1.attn.to_add_out",
    }


def test_the_fused_projections_of_hunyuans_refiner_share_one_a() -> None:
    block = "txt_in.individual_token_refiner.blocks.0.self_attn_qkv"
    tensors = m.lora({f"diffusion_model.{block}": (3 * H, H + 1)}, A, B)
    adapter = DOTTED.read(Bundle(Path("a.safetensors"), tensors), NOT_STATED)
    respelled, problems = respell(adapter, "diffusers", NO_FACTS)
    assert not problems
    refiner = "transformer.context_embedder.token_refiner.refiner_blocks.0.attn"
    assert [target.name for target in respelled.targets] == [f"{refiner}.to_{name}" for name in "kqv"]
    down = tensors[f"diffusion_model.{block}.{A}"].read()
    for part, name in enumerate("qkv"):
        (target,) = (each for each in respelled.targets if each.name.endswith(name))
        np.testing.assert_array_equal(target.factors[A].read(), down)
        rows = tensors[f"diffusion_model.{block}.{B}"].read()[part * H : (part + 1) * H]
        np.testing.assert_array_equal(target.factors[B].read(), rows)


def test_what_nothing_tells_is_asked() -> None:
    """A proportion that neither has."""
    _, problems = written({"double_blocks.0.img_mlp.0": (12 * H, H + 5)})
    assert [problem.code for problem in problems] == ["LF316"]


@pytest.mark.parametrize(("block", "tables"), [(18, {"flux1-transformer"}), (59, set()), (10**9, set())])
def test_a_block_that_a_model_does_not_have(block: int, tables: set[str]) -> None:
    """Qwen-Image has sixty blocks with the names of FLUX.1's, which has nineteen."""
    known = {each.table.name for each in read_names([f"transformer_blocks.{block}.attn.to_q"]) if not each.missed}
    assert known & {"flux1-transformer", "flux2-transformer"} == tables
    assert "qwen-image-transformer" in known


def test_a_number_of_five_thousand_digits_is_none() -> None:
    assert not [each for each in read_names([f"double_blocks.{'9' * 5000}.img_attn.qkv"]) if not each.missed]


def test_a_spelling_that_lacks_a_module() -> None:
    """DiffSynth fuses what BFL fuses, and has blocks alone in the table."""
    names: Mapping[str, tuple[int, ...]] = {"transformer_blocks.0.attn.to_q": (H, H), "x_embedder": (H, 4)}
    adapter: Adapter = DIFFUSERS.read(
        Bundle(Path("a.safetensors"), m.lora(m.behind("transformer.", names), A, B)), NOT_STATED
    )

    def spell(reading: object, component: str) -> str | None:
        return "diffsynth" if getattr(reading, "table", None) and reading.table.name.startswith("flux1") else None  # type: ignore[attr-defined]

    _, problems = respell_by(adapter, spell, NO_FACTS)
    assert [problem.code for problem in problems] == ["LF310"]


@pytest.mark.parametrize("stem", ["layers.0.attention", "context_refiner.1.attention"])
def test_a_fused_weight_beside_its_parts_is_refused(stem: str) -> None:
    """Z-Image's `qkv` and `to_q`: no one spelling has both, and either alone would lose a change."""
    names = {f"{stem}.qkv": (3 * H, H), f"{stem}.to_q": (H, H), "layers.0.attention.out": (H, H)}
    (problem,) = written(names)[1]
    assert problem.code == "LF302"
    assert all(f"{stem}.{each}" in f"{problem.where} {problem.found}" for each in ("qkv", "to_q"))
    assert "Keep the fused module or its parts" in problem.advice
