"""The project's own scheme: which tensor belongs to which target, and what is refused on writing."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from builders import MemoryFactor, find_errors
from laws.scheme_laws import SchemeLaws, comparable
from loraformat.adapter import Adapter, BaseBinding, Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.errors import LoraformatError
from loraformat.fingerprint import Fingerprint
from loraformat.manifest import MANIFEST_KEY, build_manifest
from loraformat.schemes import NOT_STATED, Bundle, StatedScale
from loraformat.schemes.native import SCHEME, write_tensors

EIGHT = Scaling(ScalingRule.ALPHA_OVER_RANK, 8.0)


ONE = Scaling(ScalingRule.MULTIPLIER, 1.0)
SHARED = {"vera_A": (2, 7), "vera_B": (6, 2)}


def make_factors(*roles: str, first: int = 2) -> dict[str, Factor]:
    dice = np.random.default_rng(len(roles))
    shapes = {"A": (first, 5), "B": (7, first)}
    return {role: MemoryFactor(role, dice.standard_normal(shapes["B" if "_B" in role else "A"])) for role in roles}


def linear(name: str) -> Target:
    return Target(name, "lora", SlotKind.LINEAR, make_factors("lora_A.weight", "lora_B.weight"), 2, EIGHT)


def table(name: str) -> Target:
    scaling = Scaling(ScalingRule.ALPHA_OVER_SQRT_RANK, 3.0)
    factors = make_factors("lora_embedding_A", "lora_embedding_B")
    return Target(name, "lora", SlotKind.EMBEDDING, factors, 2, scaling, Fingerprint((7, 5), tuple(range(16))))


def bundle_of(adapter: Adapter, path: str = "a.safetensors") -> Bundle:
    tensors, metadata = write_tensors(adapter)
    return Bundle(Path(path), tensors, metadata)


FULL = Adapter(
    targets=(linear("model.a"), table("model.embed"), linear("model.q")),
    base=BaseBinding("some/base", "r1"),
    metadata={"x.note": "Grüße"},
    provenance={"peft": {"r": 2, "nested": [1, None, 0.5]}},
)


class TestNative(SchemeLaws):
    scheme = SCHEME

    def examples(self) -> Mapping[str, Bundle]:
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
        return {
            "one target": bundle_of(Adapter((linear("model.q"),))),
            "everything": bundle_of(FULL),
            "nested names": bundle_of(Adapter((linear("m"), linear("m.a"), linear("m.a.b")))),
            "beside PEFT's configuration": replace(bundle_of(FULL), config=config),
            "beside other metadata": replace(bundle_of(FULL), metadata={**bundle_of(FULL).metadata, "format": "pt"}),
        }


def codes_of(adapter_or_bundle: Adapter | Bundle) -> list[str]:
    bundle = adapter_or_bundle
    if isinstance(bundle, Adapter):
        bundle = bundle_of(bundle)
    return [problem.code for problem in find_errors(lambda: SCHEME.read(bundle, NOT_STATED))]


def test_everything_that_was_said_comes_back() -> None:
    again = SCHEME.read(bundle_of(FULL), NOT_STATED)
    assert list(map(comparable, again.targets)) == list(map(comparable, FULL.targets))
    assert (again.base, again.metadata, again.provenance) == (FULL.base, FULL.metadata, FULL.provenance)
    assert not again.problems


def test_a_stated_scale_does_not_touch_what_the_manifest_says() -> None:
    adapter = SCHEME.read(bundle_of(FULL), StatedScale(alpha=1000.0))
    assert [target.scaling for target in adapter.targets] == [target.scaling for target in FULL.targets]


def test_a_tensor_belongs_to_the_longest_target_before_a_dot() -> None:
    adapter = SCHEME.read(bundle_of(Adapter((linear("m.q"), linear("m.q.a"), linear("m.qa")))), NOT_STATED)
    assert [sorted(target.factors) for target in adapter.targets] == [["lora_A.weight", "lora_B.weight"]] * 3


def test_a_target_that_is_the_beginning_of_another_word_owns_nothing_of_it() -> None:
    bundle = bundle_of(Adapter((linear("model.q"),)))
    stray = MemoryFactor("s", np.ones(3))
    assert codes_of(replace(bundle, tensors={**bundle.tensors, "model.q_proj.lora_A.weight": stray})) == ["LF202"]


def test_several_strays_are_all_named() -> None:
    bundle = bundle_of(Adapter((linear("model.q"),)))
    strays = {name: MemoryFactor(name, np.ones(3)) for name in ("x", "y.z", "model.k.lora_A.weight")}
    assert codes_of(replace(bundle, tensors=strays | dict(bundle.tensors))) == ["LF202"] * 3


def test_a_target_without_tensors() -> None:
    bundle = bundle_of(Adapter((linear("m.a"), linear("m.b"))))
    kept = {key: factor for key, factor in bundle.tensors.items() if key.startswith("m.a.")}
    assert set(codes_of(replace(bundle, tensors=kept))) == {"LF201"}


def test_a_manifest_without_targets() -> None:
    bundle = Bundle(Path("a"), {}, {MANIFEST_KEY: build_manifest(Adapter(())).decode()})
    assert codes_of(bundle) == ["LF212"]


def test_no_manifest_at_all() -> None:
    assert codes_of(Bundle(Path("a"), {}, {})) == ["LF122"]


def test_a_kind_that_is_not_known_is_kept_and_refused_by_name() -> None:
    """`save` after `load` must not turn it into another kind."""
    target = replace(linear("m.q"), kind="dora of 2031")
    again = SCHEME.read(bundle_of(Adapter((target,))), NOT_STATED)
    assert comparable(again.targets[0]) == comparable(target)
    problems = find_errors(lambda: again)
    assert [problem.code for problem in problems] == ["LF209"]
    assert "dora of 2031" in problems[0].found


def test_an_adapter_without_targets_is_not_written() -> None:
    with pytest.raises(LoraformatError) as caught:
        write_tensors(Adapter(()))
    assert caught.value.codes == ("LF212",)


def test_two_targets_of_one_name_are_not_written() -> None:
    with pytest.raises(LoraformatError) as caught:
        write_tensors(Adapter((linear("m.q"), linear("m.q"))))
    assert caught.value.codes == ("LF302",)


def test_a_tensor_that_would_be_read_back_as_another_targets_is_not_written() -> None:
    """`x` with the role `a.weight` and a target `x.a`: the longest target would own `x.a.weight`."""
    whole = Target("x", "replace", SlotKind.PARAMETER, make_factors("a.weight"), 0, EIGHT)
    with pytest.raises(LoraformatError) as caught:
        write_tensors(Adapter((whole, linear("x.a"))))
    assert caught.value.codes == ("LF302",)


def test_numbers_that_json_readers_disagree_about_are_not_written() -> None:
    for bad in (2**53 + 1, float("nan"), float("inf")):
        with pytest.raises(LoraformatError) as caught:
            write_tensors(replace(FULL, provenance={"peft": {"seed": bad}}))
        assert caught.value.codes == ("LF104",)


def test_a_scale_that_is_not_finite_is_not_written() -> None:
    target = replace(linear("m.q"), scaling=Scaling(ScalingRule.MULTIPLIER, float("inf")))
    with pytest.raises(LoraformatError) as caught:
        write_tensors(Adapter((target,)))
    assert caught.value.codes == ("LF104",)


def test_a_tensor_that_targets_share_is_stored_once() -> None:
    """Of VeRA's random factors there is one pair, whatever the number of targets."""
    shared = {role: MemoryFactor(role, np.ones(shape, np.float32)) for role, shape in SHARED.items()}
    targets = []
    for name, out in (("m.v", 4), ("m.q", 5), ("m.10", 4)):
        own = {"vera_lambda_b": MemoryFactor("b", np.ones(out)), "vera_lambda_d": MemoryFactor("d", np.ones(2))}
        targets.append(Target(name, "vera", SlotKind.LINEAR, {**own, **shared}, 2, ONE))
    tensors, metadata = write_tensors(Adapter(tuple(targets)))
    assert [key for key in tensors if key.endswith(("vera_A", "vera_B"))] == ["m.10.vera_A", "m.10.vera_B"]
    bundle = Bundle(Path("own.safetensors"), tensors, metadata)
    read = SCHEME.read(bundle, NOT_STATED)
    assert not read.problems
    assert all(target.factors["vera_A"] is tensors["m.10.vera_A"] for target in read.targets)
    assert write_tensors(read)[1] == metadata
