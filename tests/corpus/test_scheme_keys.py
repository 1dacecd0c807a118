"""Names and shapes of real adapters, without their numbers: each is detected, read, written again and accounted for.

The lists are of others and not part of this project; see `test_verdicts.py`. Expectations are from their README and
from what their authors' tools do.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import loraformat
from builders import MemoryFactor
from loraformat.adapter import Adapter
from loraformat.base_facts import NO_FACTS
from loraformat.conversion import list_pairs
from loraformat.conversion._engine import Rounding, Source, convert_source, find_writer
from loraformat.loading.readers import choose_scheme
from loraformat.schemes import NOT_STATED, Bundle, StatedScale, WritingScheme

CORPUS = Path(os.environ.get("LORAFORMAT_CORPUS", Path(__file__).parents[3] / "shared" / "corpus"))
if not CORPUS.is_dir():
    pytest.skip(f"no folder {CORPUS}; LORAFORMAT_CORPUS names another", allow_module_level=True)


@dataclass(frozen=True)
class Expected:
    """What a list is read as.

    Attributes:
        scheme: its scheme.
        kinds: how many targets of each kind.
        first: some target's name.
        into: schemes to the codes of what stands against writing it there; none where it can be written.
        stated: what the user must say.
    """

    scheme: str
    kinds: Mapping[str, int]
    first: str
    into: Mapping[str, frozenset[str]]
    stated: StatedScale = NOT_STATED


NOTHING: frozenset[str] = frozenset()
NO_PLACE, NO_SPLIT = frozenset({"LF312"}), frozenset({"LF315"})

LISTS = {
    "anima_lora_peft_format": Expected(
        "dotted",
        {"lora": 6},
        "transformer.blocks.0.mlp.layer1",
        {"dotted": NOTHING, "native": NOTHING, "kohya": NOTHING, "diffusers": NOTHING},
    ),
    "flux_control_lora_format": Expected(
        "dotted",
        {"lora": 313, "padded_lora": 1, "replace": 152},
        "transformer.double_blocks.0.img_attn.norm.query_norm",
        {"dotted": NOTHING, "native": NOTHING, "diffusers": NOTHING},
    ),
    "flux_dora_onetrainer_format": Expected(
        "kohya",
        {"dora": 506},
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
        {"native": NOTHING, "diffusers": NO_PLACE, "dotted": NO_SPLIT},
    ),
    "flux_lokr_bfl_format": Expected(
        "dotted",
        {"lokr": 6},
        "transformer.double_blocks.0.img_attn.qkv",
        {"kohya": NOTHING, "native": NOTHING, "diffusers": NO_PLACE | frozenset({"LF316"})},  # Of no FLUX's sizes.
    ),
    "flux_lora_diffusers_format": Expected(
        "diffusers",
        {"lora": 494},
        "transformer.single_transformer_blocks.0.proj_mlp",
        {"kohya": NOTHING, "dotted": NOTHING, "native": NOTHING, "peft": NOTHING},
    ),
    "flux_lora_kohya_format": Expected(
        "kohya",
        {"lora": 304},
        "transformer.double_blocks.0.img_attn.qkv",
        {"diffusers": NOTHING, "dotted": NOTHING, "native": NOTHING, "peft": NOTHING},
    ),
    "flux_lora_xlabs_format": Expected(
        "xlabs",
        {"lora": 12},
        "transformer.double_blocks.0.img_attn.qkv",
        {"diffusers": NOTHING, "kohya": NOTHING},
        StatedScale(multiplier=1.0),
    ),
    "qwen_image_lora_kohya_format": Expected(
        "kohya",
        {"lokr": 8},
        "transformer.transformer_blocks.0.attn.to_k",
        {"dotted": NOTHING, "native": NOTHING, "diffusers": NO_PLACE},
    ),
}


def read(name: str) -> tuple[Bundle, Adapter]:
    """Return a list as tensors of zeros that share their numbers, and what it is read as."""
    listed = json.loads((CORPUS / "keys" / f"{name}.json").read_text())
    tensors = {
        key: MemoryFactor(key, np.broadcast_to(np.float32(4.0) if key.endswith("alpha") else np.float32(0), shape))
        for key, shape in listed.items()
    }
    bundle = Bundle(Path(f"{name}.safetensors"), tensors)
    scheme, evidence = choose_scheme(bundle, None)
    assert evidence
    return bundle, scheme.read(bundle, LISTS[name].stated)


def test_every_list_is_expected() -> None:
    assert {path.stem for path in (CORPUS / "keys").glob("*.json")} == set(LISTS)


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_read(name: str) -> None:
    _, adapter = read(name)
    expected = LISTS[name]
    assert adapter.scheme == expected.scheme
    assert Counter(target.kind for target in adapter.targets) == expected.kinds
    assert expected.first in {target.name for target in adapter.targets}
    assert not [problem for problem in adapter.problems if problem.severity == "error"]


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_written_again_under_its_own_names(name: str) -> None:
    bundle, adapter = read(name)
    scheme = find_writer(adapter.scheme) if adapter.scheme != "xlabs" else None
    if scheme is None:
        pytest.skip("XLabs' scheme is only read")
    assert isinstance(scheme, WritingScheme)
    written = scheme.write(adapter, NO_FACTS)
    assert {key: each.shape for key, each in written.tensors.items()} == {
        key: each.shape for key, each in bundle.tensors.items()
    }


@pytest.mark.parametrize(("name", "scheme"), [(name, scheme) for name, each in LISTS.items() for scheme in each.into])
def test_a_list_is_converted_or_refused_for_the_right_reason(name: str, scheme: str) -> None:
    bundle, adapter = read(name)
    converted = convert_source(Source(bundle.path, bundle, adapter, ""), find_writer(scheme), NO_FACTS, Rounding())
    against = {problem.code for problem in converted.problems if problem.severity == "error"}
    assert against == LISTS[name].into[scheme]
    assert against or not converted.account.refused


REAL = (
    ("KohakuBlueleaf__LyCORIS/result/smart_falcon_4_lokr.safetensors", "kohya", ("kohya", "dotted", "native")),
    (
        "catundchat__stable-diffusion-v1.5-lora/pytorch_lora_weights.safetensors",
        "diffusers",
        ("diffusers", "kohya", "peft"),
    ),
    (
        "FaithSang__anime-lora-gnerator/model/pytorch_lora_weights.safetensors",
        "diffusers",
        ("diffusers", "kohya", "peft"),
    ),
    ("guilhermmeabreu__lab_08", "peft", ("native", "peft")),
    ("abrhaleyarefaine1997__gpt2-tigrinya-lora", "peft", ("native", "peft")),
    ("Tashu014__lora-imdb-distilbert", "peft", ("native", "peft")),
)
"""A real file, its scheme, and schemes that it goes to and comes back from."""


@pytest.mark.parametrize(("place", "scheme", "way"), REAL)
def test_a_real_file_comes_back_bit_by_bit(place: str, scheme: str, way: tuple[str, ...], tmp_path: Path) -> None:
    source = CORPUS / place
    for step, name in enumerate((*way, scheme)):
        output = tmp_path / f"{step}"
        done = loraformat.convert(source, name, output, verify=True)
        assert done.proof is not None
        assert (done.proof.relative, done.account.refused) == (0.0, ())
        source = output
    first, last = (_store(path) for path in (CORPUS / place, source))
    assert first == last


def _store(path: Path) -> dict[str, tuple[object, ...]]:
    from loraformat.loading import open_bundle

    bundle, _ = open_bundle(path)
    return {name: (each.dtype, each.shape, each.read().tobytes()) for name, each in bundle.tensors.items()}


def test_two_files_of_one_adapter_agree(tmp_path: Path) -> None:
    """FaithSang saved the same adapter with PEFT and with diffusers; only the second file says its scale."""
    folder = CORPUS / "FaithSang__anime-lora-gnerator" / "model"
    loraformat.convert(folder / "adapter_model.safetensors", "diffusers", tmp_path / "p.safetensors", alpha=16)
    loraformat.convert(folder / "pytorch_lora_weights.safetensors", "diffusers", tmp_path / "d.safetensors")
    one, other = (loraformat.load(tmp_path / name) for name in ("p.safetensors", "d.safetensors"))
    assert {target.scale for target in one.targets} == {4.0}
    assert [(each.name, each.scaling) for each in one.targets] == [(each.name, each.scaling) for each in other.targets]
    for left, right in zip(one.targets, other.targets, strict=True):
        for role, factor in left.factors.items():
            np.testing.assert_array_equal(factor.read(), right.factors[role].read())


EVERYWHERE = {
    "Tashu014__lora-imdb-distilbert": None,
    "abrhaleyarefaine1997__gpt2-tigrinya-lora": None,
    "ao-wei__gemma3-270m-svg-lora-partb/adapter": 16.0,
    "microsoft__LoRA/examples/NLU/roberta_base_lora_mnli.bin": 16.0,
    "cloneofsimo__lora/example_loras/lora_disney.safetensors": 1.0,
    "catundchat__stable-diffusion-v1.5-lora/pytorch_lora_weights.safetensors": None,
    "wyek1n__MLX-CLI/adapters/0000100_adapters.safetensors": 16.0,
}
"""Real files of each scheme that has one, and the alpha that a user must state."""


@pytest.mark.parametrize("place", EVERYWHERE)
def test_a_real_file_goes_everywhere_or_is_refused_as_the_table_of_pairs_says(place: str) -> None:
    """Nothing is refused but for what the pair has no place for, and nothing is left out."""
    pairs = {(pair.source, pair.target): pair for pair in list_pairs()}
    for writer in (each.name for each in loraformat.list_schemes() if each.writes):
        plan = loraformat.plan_conversion(CORPUS / place, writer, alpha=EVERYWHERE[place])
        pair = pairs[plan.origin, plan.scheme]
        explained = {
            "LF312": bool(pair.kinds or pair.slots),
            "LF310": pair.models != "all",
            "LF341": pair.models != "all",
            "LF316": pair.models != "none",  # Several families have these names: as LF311, --base decides.
            "LF311": True,
            "LF313": pair.scale != "",
        }
        against = {problem.code for problem in plan.problems if problem.severity == "error"}
        assert {code for code in against if not explained.get(code)} == set(), (writer, against)
        assert against or not plan.account.refused, writer
        assert str(pair) != "=" or against <= {"LF311", "LF316"}, writer
