"""What every naming scheme keeps. A scheme's test class inherits `SchemeLaws` and gives the scheme and examples.

The class has no `Test` prefix, so that it is collected only where it is inherited. Every test file beside the scheme's
own is searched for such classes, so that each scheme is tried on the examples of all others.
"""

import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

from builders import MemoryFactor, find_errors
from loraformat.adapter import Adapter, Factor, Target
from loraformat.base_facts import NO_FACTS, BaseFacts
from loraformat.conversion._engine import Converted, Rounding, Source, convert_source, verify_bundle
from loraformat.derived import find_origins
from loraformat.errors import LoraformatError
from loraformat.loading.readers import choose_scheme
from loraformat.manifest import MANIFEST_KEY
from loraformat.problems import Problem
from loraformat.schemes import (
    NOT_STATED,
    SCHEMES,
    Bundle,
    CertainScheme,
    Scheme,
    StatedScale,
    WritingScheme,
    WrittenBundle,
)

TESTS = Path(__file__).parents[1] / "schemes"


class SchemeLaws:
    """The laws.

    Attributes:
        scheme: the scheme.
        stated: what the user must say for the examples to be read.
        facts: what the base says, for schemes that ask.
        unmergeable: what a merge may hold against the examples.
        carries: whether its files have a place for what other schemes remember.
    """

    scheme: Scheme
    stated: StatedScale = NOT_STATED
    facts: BaseFacts = NO_FACTS
    unmergeable: frozenset[str] = frozenset({"LF209"})
    carries: bool = True

    @abstractmethod
    def examples(self) -> Mapping[str, Bundle]:
        """Return sound bundles of the scheme by description; their tensors are `MemoryFactor`s."""

    def reopen(self, written: WrittenBundle, path: Path) -> Bundle:
        """Return what a reader finds of a written bundle; containers with other annotations than texts override it."""
        texts = {name: text for name, text in written.metadata.items() if isinstance(text, str)}
        stored = {name: MemoryFactor(name, factor.read()) for name, factor in written.tensors.items()}
        return Bundle(path, stored, texts, written.config, self.facts)

    def is_restored(self, example: str) -> bool:
        """Say whether the way back gives the very keys of an example, or only what they mean."""
        return True

    def write_examples(self) -> Iterator[tuple[str, Bundle, WritingScheme, Converted]]:
        """Yield every example written again in its own scheme."""
        if not isinstance(self.scheme, WritingScheme):
            pytest.skip("this scheme is only read")
        for name, bundle in self.examples().items():
            yield name, bundle, self.scheme, self.convert(self.read_source(bundle), self.scheme)

    def read_source(self, bundle: Bundle) -> Source:
        known = replace(bundle, facts=self.facts)
        return Source(bundle.path, known, self.scheme.read(known, self.stated), "")

    def convert(self, source: Source, scheme: WritingScheme) -> Converted:
        return convert_source(source, scheme, self.facts, Rounding())

    def read_all(self) -> Iterator[tuple[Bundle, Adapter]]:
        for bundle in self.examples().values():
            yield bundle, self.scheme.read(replace(bundle, facts=self.facts), self.stated)

    def test_its_room_finds_it(self) -> None:
        assert SCHEMES.find(self.scheme.name) is self.scheme
        assert self.scheme.title

    def test_it_knows_its_own(self) -> None:
        assert self.examples()
        for name, bundle in self.examples().items():
            assert self.scheme.detect(bundle), name
            chosen, evidence = choose_scheme(bundle, None)
            assert chosen is self.scheme
            assert evidence

    def stand_for_scheme(self) -> None:
        """Skip in all suites of a scheme but the first, where only the scheme matters, and not the examples."""
        first = next(suite for suite in find_suites() if suite.scheme is self.scheme)
        if type(first).__name__ != type(self).__name__:
            pytest.skip(f"{type(first).__name__} does it for the scheme")

    def test_it_claims_nothing_of_another_scheme(self) -> None:
        self.stand_for_scheme()
        for other, examples in collect_examples().items():
            claimed = [name for name, bundle in examples.items() if self.scheme.detect(bundle)]
            assert not claimed or other == self.scheme.name, (other, claimed)

    def test_what_it_is_sure_of_no_other_scheme_claims(self) -> None:
        scheme = self.scheme
        if not isinstance(scheme, CertainScheme):
            pytest.skip("it is sure of nothing")
        self.stand_for_scheme()
        bundles = [bundle for examples in collect_examples().values() for bundle in examples.values()]
        bundles += [replace(each, config={**(each.config or {}), "peft_type": "LORA"}) for each in bundles]
        bundles += [replace(each, metadata={**each.metadata, MANIFEST_KEY: "{}"}) for each in bundles]
        sure = [bundle for bundle in bundles if scheme.is_named(bundle) and scheme.detect(bundle)]
        assert sure
        for bundle in sure:
            assert [name for name, each in SCHEMES if each.detect(bundle)] == [scheme.name], bundle.path

    def test_every_scheme_has_examples(self) -> None:
        assert set(collect_examples()) == set(SCHEMES.names())

    def test_it_claims_no_strangers(self) -> None:
        weights = {name: MemoryFactor(name, np.ones((3, 2), np.float32)) for name in ("model.q.weight", "model.q.bias")}
        assert not self.scheme.detect(Bundle(Path("base.safetensors"), weights, {"format": "pt"}))
        assert not self.scheme.detect(Bundle(Path("empty.safetensors"), {}))

    def test_every_tensor_is_used_once(self) -> None:
        for bundle, adapter in self.read_all():
            factors = [*adapter.factors(), *adapter.absorbed]
            used = {id(origin) for factor in factors for origin in find_origins(factor)}
            assert used == set(map(id, bundle.tensors.values()))

    def test_targets_are_sorted_and_have_one_name_each(self) -> None:
        for _, adapter in self.read_all():
            names = [target.name for target in adapter.targets]
            assert names == sorted(set(names))

    def test_it_says_where_the_adapter_is_from(self) -> None:
        for bundle, adapter in self.read_all():
            assert adapter.scheme == self.scheme.name
            assert adapter.source == str(bundle.path)

    def test_reading_reads_no_numbers_but_scales(self) -> None:
        for bundle in self.examples().values():
            sealed = {name: replace(each, sealed=each.elements > 1) for name, each in bundle.tensors.items()}
            assert self.scheme.detect(replace(bundle, tensors=sealed))
            assert self.scheme.read(replace(bundle, tensors=sealed, facts=self.facts), self.stated).targets

    def test_the_order_of_the_tensors_does_not_matter(self) -> None:
        for bundle, adapter in self.read_all():
            turned = replace(bundle, tensors=dict(reversed(bundle.tensors.items())), facts=self.facts)
            assert self.scheme.read(turned, self.stated) == adapter

    def test_a_tensor_that_it_does_not_know_is_named(self) -> None:
        for bundle in self.examples().values():
            for name in ("stray", "model.q.lora_of_next_year", "lora_A", "optimizer.state"):
                stray = MemoryFactor(name, np.ones(3, np.float32))
                more = replace(bundle, tensors={**bundle.tensors, name: stray})
                problems = find_errors(lambda more=more: self.scheme.read(more, self.stated))
                assert "LF202" in {problem.code for problem in problems}, name
                assert any(name.rpartition(".")[2] in problem.where + problem.found for problem in problems)

    def test_the_sound_examples_are_sound(self) -> None:
        """But for kinds that this version does not merge, which are carried all the same."""
        for name, bundle in self.examples().items():
            known = replace(bundle, facts=self.facts)
            problems = find_errors(lambda known=known: self.scheme.read(known, self.stated))
            assert {problem.code for problem in problems} <= self.unmergeable, (name, problems)

    def test_written_again_it_is_the_same_file(self) -> None:
        for name, bundle, _, converted in self.write_examples():
            assert not find_against(converted), name
            if not self.is_restored(name):
                continue
            assert compare(store(converted.written.tensors), store(bundle.tensors)) == [], name
            assert None in (converted.written.config, bundle.config) or converted.written.config == bundle.config, name
            kept = {key: text for key, text in bundle.metadata.items() if not key.startswith("sshs_")}
            if MANIFEST_KEY not in kept:  # Its own file has no other annotations.
                assert kept.items() <= self.reopen(converted.written, bundle.path).metadata.items(), name
            assert not converted.account.refused

    def test_what_it_writes_it_knows_and_reads(self) -> None:
        for name, bundle, scheme, converted in self.write_examples():
            again = self.reopen(converted.written, bundle.path)
            assert choose_scheme(again, None)[0] is scheme, name
            read = scheme.read(again, converted.written.stated)
            assert list(map(effect_of, read.targets)) == list(map(effect_of, converted.adapter.targets)), name

    def test_from_every_other_scheme_and_back(self) -> None:
        """The change of every module stays, and the way back restores every tensor bit by bit."""
        self.stand_for_scheme()
        if not isinstance(self.scheme, WritingScheme):
            pytest.skip("this scheme is only read")
        for suite in find_suites():
            for name, bundle in suite.examples().items():
                label = f"{suite.scheme.name}: {name}"
                source = suite.read_source(bundle)
                converted = suite.convert(source, self.scheme)
                against = find_against(converted)
                if against:
                    assert {problem.code for problem in against} <= MAY_BE_REFUSED, (label, against)
                    continue
                again = replace(self.reopen(converted.written, bundle.path), facts=suite.facts)
                proof = verify_bundle(converted, again, Rounding())
                rounded = any(problem.code == "LF320" for problem in converted.problems)
                assert proof.relative <= (1e-7 if rounded else 1e-15), (label, proof)
                assert not converted.account.refused
                if isinstance(suite.scheme, WritingScheme) and self.carries and not is_changed(converted):
                    back = Source(bundle.path, again, self.scheme.read(again, converted.written.stated), "")
                    restored = suite.convert(back, suite.scheme)
                    assert not find_against(restored), label
                    alike = compare(store(restored.written.tensors), store(bundle.tensors)) == []
                    assert alike or not suite.is_restored(name), label

    def test_empty_bundles_are_refused(self) -> None:
        for bundle in self.examples().values():
            with pytest.raises(LoraformatError):
                self.scheme.read(replace(bundle, tensors={}, metadata={}), self.stated)


MAY_BE_REFUSED = frozenset({"LF310", "LF311", "LF312", "LF313", "LF315", "LF316", "LF341"})
"""What a target may have no place or no name for."""


def is_changed(converted: Converted) -> bool:
    """Say whether tensors had to be made to fit: scaled, or padded to one rank."""
    padded = any(problem.code == "LF340" for problem in converted.problems)
    return padded or any("scale" in word for step in converted.steps for word in step.operations)


def find_against(converted: Converted) -> list[Problem]:
    """Return what stands against writing a conversion."""
    return [problem for problem in converted.problems if problem.severity == "error"]


def store(tensors: Mapping[str, Factor]) -> dict[str, tuple[object, ...]]:
    """Return everything that a file keeps of its tensors."""
    return {name: (each.dtype, each.shape, each.read().tobytes()) for name, each in tensors.items()}


def compare(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Return the names that two files do not have alike."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def effect_of(target: Target) -> tuple[object, ...]:
    """Return everything that a scheme must keep of a target, whichever rule gives its scale."""
    return target.name, target.kind, target.slot, target.rank, target.scale, dict(target.options), store(target.factors)


def comparable(target: Target) -> tuple[object, ...]:
    """Return everything that a scheme must keep of a target."""
    factors = {role: (factor.dtype, factor.shape, factor.read().tobytes()) for role, factor in target.factors.items()}
    return target.name, target.kind, target.slot, target.rank, target.scaling, target.fingerprint, factors


@cache
def find_suites() -> tuple[SchemeLaws, ...]:
    suites = []
    for path in sorted(TESTS.glob("test_*.py")):
        name = f"_suite_{path.stem}"
        spec = spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(module)
        found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, SchemeLaws)]
        suites += [suite() for suite in found if suite is not SchemeLaws]
    return tuple(suites)


def collect_examples() -> dict[str, dict[str, Bundle]]:
    """Return the examples of every scheme that has a suite, by the scheme's name."""
    collected: dict[str, dict[str, Bundle]] = {}
    for suite in find_suites():
        named = {f"{type(suite).__name__}: {name}": bundle for name, bundle in suite.examples().items()}
        collected.setdefault(suite.scheme.name, {}).update(named)
    return collected
