"""From any scheme to any other and back, for adapters that nobody chose: bit by bit, where the other can hold them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builders import MemoryFactor
from laws.scheme_laws import MAY_BE_REFUSED, SchemeLaws, compare, find_against, find_suites, is_changed, store
from loraformat.adapter import Adapter, Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.base_facts import BaseFacts
from loraformat.conversion._engine import Converted, Rounding, Source, convert_source, verify_bundle
from loraformat.dtypes import BY_NAME
from loraformat.schemes import SCHEMES, Bundle, WritingScheme
from schemes import decoders as d
from schemes import modules as m

FLUX = BaseFacts("config.json", architecture="FluxTransformer2DModel")
MODELS: dict[str, tuple[d.Modules, BaseFacts]] = {
    "Llama": (d.blocks(d.TRANSFORMERS, (0,)), d.LLAMA),
    "Qwen": (d.blocks(d.TRANSFORMERS, (3,)), d.QWEN),
    "Stable Diffusion": ({f"unet.{name}": sizes for name, sizes in m.SD1_DIFFUSERS.items()}, BaseFacts()),
    "FLUX": ({f"transformer.{name}": sizes for name, sizes in m.FLUX_BFL.items()}, FLUX),
}
WRITERS = sorted(name for name, scheme in SCHEMES if isinstance(scheme, WritingScheme))
VALUES = st.one_of(st.sampled_from([1.0, 2.0, 0.5, 16.0, 3.0]), st.floats(0.0078125, 64.0, width=32))
SCALINGS = st.builds(Scaling, st.sampled_from(ScalingRule), VALUES)


SUITES: dict[str, SchemeLaws] = {suite.scheme.name: suite for suite in reversed(find_suites())}
"""Scheme to its first suite, which knows how its files are read again."""


@st.composite
def adapters(draw: Any) -> tuple[Adapter, BaseFacts]:
    """Return a low-rank adapter of some modules of a model: each with its own rank, or all with one."""
    modules, facts = MODELS[draw(st.sampled_from(sorted(MODELS)))]
    names = draw(st.lists(st.sampled_from(sorted(modules)), min_size=1, max_size=5, unique=True))
    form = BY_NAME[draw(st.sampled_from(["float32", "float16", "bfloat16"]))].numpy()
    one = draw(st.none() | SCALINGS)
    is_dora = draw(st.booleans())
    dice = np.random.default_rng(draw(st.integers(0, 99)))
    targets = []
    for name in sorted(names):
        out, inner, *kernel = modules[name]
        rank = draw(st.sampled_from([1, 2, 3]))
        arrays = {"lora_A.weight": (rank, inner, *kernel), "lora_B.weight": (out, rank, *(1 for _ in kernel))}
        arrays |= {"lora_magnitude_vector": (1, out, 1, 1) if kernel else (out,)} if is_dora else {}
        factors: dict[str, Factor] = {
            role: MemoryFactor(f"{name}.{role}", dice.standard_normal(shape).astype(form))
            for role, shape in arrays.items()
        }
        slot = SlotKind.CONV if kernel else SlotKind.LINEAR
        scaling = one or draw(SCALINGS)
        targets.append(Target(name, "dora" if is_dora else "lora", slot, factors, rank, scaling))
    return Adapter(tuple(targets)), facts


def write(adapter: Adapter, bundle: Bundle, scheme: str, facts: BaseFacts) -> Converted | None:
    """Return the adapter in a scheme; None where that has no place or no name for it."""
    writer = SCHEMES.find(scheme)
    assert isinstance(writer, WritingScheme)
    converted = convert_source(Source(bundle.path, bundle, adapter, ""), writer, facts, Rounding())
    against = {problem.code for problem in find_against(converted)}
    assert against <= MAY_BE_REFUSED, against
    return None if against else converted


def read(converted: Converted, facts: BaseFacts) -> tuple[Adapter, Bundle]:
    """Return what a reader of the scheme finds in the files."""
    bundle = replace(SUITES[converted.scheme.name].reopen(converted.written, Path("a")), facts=facts)
    return converted.scheme.read(bundle, converted.written.stated), bundle


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(adapters(), st.sampled_from(WRITERS), st.sampled_from(WRITERS))
def test_there_and_back(made: tuple[Adapter, BaseFacts], one: str, other: str) -> None:
    adapter, facts = made
    first = write(adapter, Bundle(Path("a"), {each.name: each for each in adapter.factors()}), one, facts)
    if first is None:
        return
    source, bundle = read(first, facts)
    second = write(source, bundle, other, facts)
    if second is None:
        return
    again, stored = read(second, facts)
    rounded = any(problem.code == "LF320" for problem in second.problems)
    assert verify_bundle(second, stored, Rounding()).relative <= (1e-6 if rounded else 1e-15)
    if is_changed(second) or not SUITES[other].carries:
        return
    back = write(again, stored, one, facts)
    assert back is not None
    assert compare(store(back.written.tensors), store(first.written.tensors)) == []
