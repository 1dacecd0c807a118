"""cloneofsimo's numbered modules: which number is which module, by the order whose sizes agree."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import MemoryFactor
from laws.scheme_laws import SchemeLaws
from loraformat.errors import LoraformatError
from loraformat.schemes import NOT_STATED, Bundle, StatedScale
from loraformat.schemes.cloneofsimo import SCHEME

STATED = StatedScale(multiplier=1.0)


def zeros(name: str, *shape: int) -> MemoryFactor:
    return MemoryFactor(name, np.broadcast_to(np.float32(0), shape))


def unet(gate_first: bool) -> dict[str, Any]:
    """Return the factors of all attention modules of Stable Diffusion 1, written from the structure of its UNet."""
    block = [1, 1, 1, 1, 8, 1, 1, 1, 1] if gate_first else [1, 1, 1, 1, 1, 1, 1, 1, 8]
    widths = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
    outs = [width * each for width in widths for each in block]
    return numbered("unet", outs)


def numbered(component: str, outs: Sequence[int]) -> dict[str, Any]:
    named = {}
    for index, out in enumerate(outs):
        named |= {
            f"{component}:{index}:{end}": zeros(f"{component}:{index}:{end}", *shape)
            for end, shape in (("up", (out, 4)), ("down", (4, 7)))
        }
    return named


def pairs(outs: Sequence[int]) -> dict[str, Any]:
    return {
        str(index): zeros(str(index), *((outs[index // 2], 4) if index % 2 == 0 else (4, 7)))
        for index in range(2 * len(outs))
    }


def bundle_of(tensors: Mapping[str, Any]) -> Bundle:
    return Bundle(Path("lora.safetensors"), tensors)


class TestCloneofsimo(SchemeLaws):
    scheme = SCHEME
    stated = STATED

    def examples(self) -> Mapping[str, Bundle]:
        token = {"<s1>": MemoryFactor("<s1>", np.ones(768, np.float32))}
        return {
            "safeloras": bundle_of(unet(True) | numbered("text_encoder", [768] * 48) | token),
            "newer diffusers": bundle_of(unet(False)),
            "a pickled list": bundle_of(pairs([768] * 48)),
        }


def test_numbers_are_modules() -> None:
    for gate_first, number in ((True, 4), (False, 8)):
        tensors = unet(gate_first)
        adapter = SCHEME.read(bundle_of(tensors), STATED)
        names = {id(target.factors["lora_B.weight"]): target.name for target in adapter.targets}
        first = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
        assert names[id(tensors["unet:0:up"])] == f"{first}.attn1.to_q"
        assert names[id(tensors[f"unet:{number}:up"])] == f"{first}.ff.net.0.proj"
        assert names[id(tensors["unet:143:up"])].startswith("unet.mid_block.attentions.0.")
        assert len(names) == 144


def test_text_encoders_start_with_the_key() -> None:
    """transformers defines k, v, q, out in this order."""
    tensors = pairs([768] * 48)
    adapter = SCHEME.read(bundle_of(tensors), STATED)
    names = {id(target.factors["lora_B.weight"]): target.name.rpartition("self_attn.")[2] for target in adapter.targets}
    assert [names[id(tensors[str(2 * index)])] for index in range(4)] == ["k_proj", "v_proj", "q_proj", "out_proj"]


def test_other_numbers_of_modules_are_refused() -> None:
    adapter = SCHEME.read(bundle_of(numbered("unet", [320] * 5)), STATED)
    assert [problem.code for problem in adapter.problems] == ["LF314"]


def test_the_scale_must_be_said() -> None:
    with pytest.raises(LoraformatError) as caught:
        SCHEME.read(bundle_of(pairs([768] * 48)), NOT_STATED)
    assert caught.value.codes == ("LF211",)


def test_token_embeddings_are_carried_and_go_nowhere() -> None:
    adapter = SCHEME.read(TestCloneofsimo().examples()["safeloras"], STATED)
    assert [(target.name, target.kind) for target in adapter.targets][:1] == [("bundle_emb.<s1>", "token embedding")]
