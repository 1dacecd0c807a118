"""What is known of files that do not state their scale: it is said, and never taken."""

from pathlib import Path

import numpy as np
import pytest

from builders import write_tensors
from loraformat.adapter import Adapter
from loraformat.errors import LoraformatError, refuse
from loraformat.loading import read_bundle
from loraformat.loading.known_scales import KNOWN, find_scale
from loraformat.schemes import NOT_STATED, Bundle, StatedScale

ROBERTA = "roberta.encoder.layer.{}.attention.self.{}.lora_{}"


def roberta(rank: int, width: int) -> dict[str, tuple[int, ...]]:
    down = {ROBERTA.format(n, part, "A"): (rank, width) for n in range(2) for part in ("query", "value")}
    return down | {ROBERTA.format(n, part, "B"): (width, rank) for n in range(2) for part in ("query", "value")}


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (roberta(8, 768), "--alpha 16"),
        (roberta(8, 1024), "--alpha 16"),
        ({"deberta.encoder.layer.0.attention.self.query_proj.lora_A": (16, 1536)}, "--alpha 32"),
        ({"module.transformer.h.0.attn.c_attn.lora_A": (8, 1024)}, "--alpha 32"),
        ({"double_blocks.0.processor.qkv_lora1.down.weight": (16, 3072)}, "--scale 1"),
        ({"unet:0:up": (320, 1), "unet:0:down": (1, 320)}, "--scale 1"),
    ],
    ids=str,
)
def test_whose_they_are_is_known(shapes: dict[str, tuple[int, ...]], said: str) -> None:
    found = find_scale(shapes)
    assert found is not None
    assert said in found.said


@pytest.mark.parametrize("shapes", [{}, roberta(4, 768), roberta(8, 512), {"model.q.lora_A": (8, 768)}], ids=str)
def test_another_run_is_not_taken_for_one_of_them(shapes: dict[str, tuple[int, ...]]) -> None:
    assert find_scale(shapes) is None


def test_the_names_are_told_apart() -> None:
    assert len({known.name for known in KNOWN}) == len(KNOWN)


class _Silent:
    """A scheme that has no place for a scale."""

    name = title = "silent"

    def detect(self, bundle: Bundle) -> str | None:
        return "always"

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        raise refuse("LF211", bundle.path, "no place for a scale")


def test_the_message_says_what_the_authors_used(tmp_path: Path) -> None:
    arrays = {name: np.ones(shape, np.float32) for name, shape in roberta(8, 768).items()}
    from loraformat.loading import open_bundle

    known, _ = open_bundle(write_tensors(tmp_path / "known.safetensors", arrays))
    other, _ = open_bundle(write_tensors(tmp_path / "other.safetensors", {"m.lora_A": np.ones((4, 3), np.float32)}))
    for bundle, said in ((known, True), (other, False)):
        with pytest.raises(LoraformatError) as caught:
            read_bundle(_Silent(), bundle, NOT_STATED)
        (problem,) = caught.value.problems
        assert problem.code == "LF211"
        assert "Give --alpha" in problem.advice
        assert ("RoBERTa base" in problem.advice and "--alpha 16" in problem.advice) is said
