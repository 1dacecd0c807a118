"""A scale that only a file's annotations state: whose are heeded, and whose are not."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from builders import MemoryFactor
from loraformat.errors import LoraformatError
from loraformat.loading import choose_scheme
from loraformat.schemes import NOT_STATED, Bundle, StatedScale
from schemes import modules as m

A, B = "lora_A.weight", "lora_B.weight"
RANK = 2


def read(
    modules: m.Modules, metadata: Mapping[str, str], stated: StatedScale = NOT_STATED, *, alpha: float | None = None
) -> tuple[set[float], set[str]]:
    """Return the scales of a file with these annotations, and the codes of what is said of it."""
    bundle = Bundle(Path("a.safetensors"), m.lora(modules, A, B, alpha=alpha), metadata)
    adapter = choose_scheme(bundle, None)[0].read(bundle, stated)
    return {target.scale for target in adapter.targets}, {problem.code for problem in adapter.problems}


WAN = m.behind("diffusion_model.", m.WAN_NATIVE)


@pytest.mark.parametrize("key", ["alpha", "lora_alpha", "network_alpha", "transformer.lora_alpha"])
def test_a_number_that_the_writer_states(key: str) -> None:
    scales, codes = read(WAN, {key: "8", "rank": "2"})
    assert scales == {8 / RANK}
    assert "LF326" in codes
    assert "LF321" not in codes


def test_tensors_and_the_user_come_first() -> None:
    assert read(WAN, {"alpha": "8"}, alpha=3.0)[0] == {3 / RANK}
    assert read(WAN, {"alpha": "8"}, StatedScale(multiplier=0.5))[0] == {0.5}


@pytest.mark.parametrize("metadata", [{"ss_network_alpha": "8"}, {"alpha": "-"}, {"alpha": "nan"}, {"alpha": "0"}])
def test_what_is_no_such_number(metadata: Mapping[str, str]) -> None:
    """Converters that multiply kohya's alpha into the factors leave `ss_network_alpha` where it was."""
    scales, codes = read(WAN, metadata)
    assert scales == {1.0}
    assert "LF321" in codes


@pytest.mark.parametrize(
    "metadata",
    [
        {"alpha": "8", "lora_alpha": "4"},
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"q": 1}})},
    ],
)
def test_annotations_that_cannot_be_followed(metadata: Mapping[str, str]) -> None:
    with pytest.raises(LoraformatError) as caught:
        read(WAN, metadata)
    assert caught.value.codes == ("LF327",)


def test_what_diffusers_writes_holds_whatever_the_modules_are_called() -> None:
    """diffusers' loader takes `lora_adapter_metadata` before it looks at a key."""
    fields = {"transformer.r": RANK, "transformer.lora_alpha": 6, "transformer.use_rslora": True}
    scales, codes = read(WAN, {"lora_adapter_metadata": json.dumps(fields)})
    assert scales == {6 / RANK**0.5}
    assert "LF326" in codes


def test_a_model_that_no_table_has_keeps_its_annotation() -> None:
    """`save_lora_adapter` names no component: its fields hold for all."""
    names = {"mixer.block.to_q": (6, 5), "mixer.block.to_k": (7, 5)}
    bundle = Bundle(
        Path("a.safetensors"),
        {key: MemoryFactor(key, np.ones(each.shape, np.float32)) for key, each in m.lora(names, A, B).items()},
        {"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": 5})},
    )
    scheme, evidence = choose_scheme(bundle, None)
    assert scheme.name == "diffusers"
    assert "lora_adapter_metadata" in evidence
    assert {target.scale for target in scheme.read(bundle, NOT_STATED).targets} == {2.5}
