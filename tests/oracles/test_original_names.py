"""The original repositories' names, and the orders of their rows, against diffusers' converters of whole checkpoints.

Every weight of a model, under the name that a table has for it, becomes a LoRA that is that weight (A is the identity).
What our tables make of it must be the weight that diffusers' converter puts under the same name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import MemoryFactor
from loraformat.adapter import Adapter
from loraformat.base_facts import NO_FACTS
from loraformat.conversion import respell_by
from loraformat.schemes import NOT_STATED, Bundle
from loraformat.schemes.dotted import SCHEME
from loraformat.spellings import Reading, SpellingTable, all_tables

torch = pytest.importorskip("torch", reason="needs torch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
pytestmark = pytest.mark.oracle

from diffusers.loaders import single_file_utils as peer  # noqa: E402

TABLES = {table.name: table for table in all_tables()}
CONVERTERS = {
    "auraflow-transformer": peer.convert_auraflow_transformer_checkpoint_to_diffusers,
    "cosmos-transformer": peer.convert_cosmos_transformer_checkpoint_to_diffusers,
    "flux1-transformer": peer.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2-transformer": peer.convert_flux2_transformer_checkpoint_to_diffusers,
    "flux3-transformer": peer.convert_flux3_transformer_checkpoint_to_diffusers,
    "hunyuan-video-transformer": peer.convert_hunyuan_video_transformer_to_diffusers,
    "krea2-transformer": peer.convert_krea2_transformer_checkpoint_to_diffusers,
    "ltx-transformer": peer.convert_ltx_transformer_checkpoint_to_diffusers,
    "ltx2-transformer": peer.convert_ltx2_transformer_to_diffusers,
    "lumina2-transformer": peer.convert_lumina2_to_diffusers,
    "mochi-transformer": peer.convert_mochi_transformer_checkpoint_to_diffusers,
    "sd3-transformer": peer.convert_sd3_transformer_checkpoint_to_diffusers,
    "wan-transformer": peer.convert_wan_transformer_to_diffusers,
    "z-image-transformer": peer.convert_z_image_transformer_checkpoint_to_diffusers,
}
ROWS = {"hunyuan-video-transformer": 7 * 3072, "flux1-transformer": 7 * 3072, "lumina2-transformer": 3840}
"""Rows of every weight, where a converter knows the sizes of the published model."""
DOUBLED = "joint_blocks.1.context_block.adaLN_modulation.1"
"""A shift and a scale alone, which SD3 has in its last block, and diffusers in the other order."""
COLUMNS, DEPTHS = 2, {"mochi-transformer": 48, "flux1-transformer": 2}
SPELLINGS = {"hunyuan-video-transformer": "original"}
UNKNOWN = {
    "flux1-transformer": ("distilled_guidance_layer.",),  # Chroma's, which has a converter of its own.
    "ltx2-transformer": ("prompt_adaln_single.", "audio_prompt_adaln_single."),  # Of LTX-2.3.
    "wan-transformer": ("blocks.{i}.modulation", "vace_blocks.{i}.modulation", "head.modulation"),  # No modules.
    "flux3-transformer": ("content_mode_blocks.video", "content_mode_blocks.audio"),
}
"""Names that a converter leaves alone, by how they begin."""


class Forgiving(dict[str, Any]):
    """A checkpoint that has whatever else a converter asks for, biases and norms above all."""

    def __init__(self, weights: Mapping[str, Any], rows: int) -> None:
        super().__init__(weights)
        self.other = torch.zeros(rows, COLUMNS)

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, self.other)


def weights(table: SpellingTable, spelling: str) -> dict[str, Any]:
    """Return a weight of numbers of its own for each module that has a matrix."""
    dice = torch.Generator().manual_seed(3)
    found = {}
    for row in table.rows:
        path = row.paths.get(spelling, ("",))[0]
        if not path or "norm" in path.rpartition(".")[2] or path.startswith(UNKNOWN.get(table.name, ("-",))):
            continue
        for number in range(DEPTHS.get(table.name, 2) if "{i}" in path else 1):
            module = path.format(i=number)
            rows = 2 * COLUMNS if module == DOUBLED else ROWS.get(table.name, 6 * 7)
            found[module] = torch.randn(rows, COLUMNS, generator=dice)
    return found


def read(tensors: Mapping[str, Any]) -> Adapter:
    factors = {
        f"diffusion_model.{module}.{role}": tensor
        for module, weight in tensors.items()
        for role, tensor in (("lora_A.weight", np.eye(COLUMNS)), ("lora_B.weight", weight.numpy()))
    }
    bundle = {key: MemoryFactor(key, value.astype(np.float32)) for key, value in factors.items()}
    return SCHEME.read(Bundle(Path("a.safetensors"), bundle), NOT_STATED)


@pytest.mark.parametrize("name", CONVERTERS)
def test_every_weight_is_where_diffusers_puts_it(name: str) -> None:
    table, spelling = TABLES[name], SPELLINGS.get(name, TABLES[name].spellings[0])
    made = weights(table, spelling)

    def spell(reading: Reading, component: str) -> str | None:
        return "diffusers" if (reading.table.name, reading.spelling) == (name, spelling) else None

    spelled, problems = respell_by(read(made), spell, NO_FACTS)
    assert not [problem for problem in problems if problem.severity == "error"]
    whole = {f"{module}.weight": weight for module, weight in made.items()}
    expected = CONVERTERS[name](Forgiving(whole, ROWS.get(name, 6 * 7)))
    last = f"transformer_blocks.{DEPTHS.get(name, 2) - 1}."
    for target in spelled.targets:
        key = f"{target.name.removeprefix('transformer.')}.weight"
        if key not in expected:
            assert key.startswith(last), "the last block of Mochi and of SD3 has less of the text's stream"
            continue
        up, down = (target.factors[role].read() for role in ("lora_B.weight", "lora_A.weight"))
        np.testing.assert_array_equal(up @ down, expected[key].numpy(), err_msg=key)
    assert len(spelled.targets) >= len(made)
