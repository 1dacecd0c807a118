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
from loraformat.adapter import Adapter, Target
from loraformat.errors import LoraformatError
from loraformat.loading import choose_scheme
from loraformat.schemes import NOT_STATED, SCHEMES, Bundle, Scheme, StatedScale

TESTS = Path(__file__).parents[1] / "schemes"


class SchemeLaws:
    """The laws.

    Attributes:
        scheme: the scheme.
        stated: what the user must say for the examples to be read.
    """

    scheme: Scheme
    stated: StatedScale = NOT_STATED

    @abstractmethod
    def examples(self) -> Mapping[str, Bundle]:
        """Return sound bundles of the scheme by description; their tensors are `MemoryFactor`s."""

    def write(self, adapter: Adapter) -> Bundle | None:
        """Return the bundle that the scheme writes, None for a scheme that is only read."""
        return None

    def read_all(self) -> Iterator[tuple[Bundle, Adapter]]:
        for bundle in self.examples().values():
            yield bundle, self.scheme.read(bundle, self.stated)

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

    def test_it_claims_nothing_of_another_scheme(self) -> None:
        for other, examples in collect_examples().items():
            claimed = [name for name, bundle in examples.items() if self.scheme.detect(bundle)]
            assert not claimed or other == self.scheme.name, (other, claimed)

    def test_every_scheme_has_examples(self) -> None:
        assert set(collect_examples()) == set(SCHEMES.names())

    def test_it_claims_no_strangers(self) -> None:
        weights = {name: MemoryFactor(name, np.ones((3, 2), np.float32)) for name in ("model.q.weight", "model.q.bias")}
        assert not self.scheme.detect(Bundle(Path("base.safetensors"), weights, {"format": "pt"}))
        assert not self.scheme.detect(Bundle(Path("empty.safetensors"), {}))

    def test_every_tensor_is_used_once(self) -> None:
        for bundle, adapter in self.read_all():
            used = [id(factor) for target in adapter.targets for factor in target.factors.values()]
            assert sorted(used) == sorted(map(id, bundle.tensors.values()))

    def test_targets_are_sorted_and_have_one_name_each(self) -> None:
        for _, adapter in self.read_all():
            names = [target.name for target in adapter.targets]
            assert names == sorted(set(names))

    def test_it_says_where_the_adapter_is_from(self) -> None:
        for bundle, adapter in self.read_all():
            assert adapter.scheme == self.scheme.name
            assert adapter.source == str(bundle.path)

    def test_reading_reads_no_numbers(self) -> None:
        for bundle in self.examples().values():
            sealed = {name: replace(factor, sealed=True) for name, factor in bundle.tensors.items()}
            assert self.scheme.detect(replace(bundle, tensors=sealed))
            assert self.scheme.read(replace(bundle, tensors=sealed), self.stated).targets

    def test_the_order_of_the_tensors_does_not_matter(self) -> None:
        for bundle, adapter in self.read_all():
            turned = replace(bundle, tensors=dict(reversed(bundle.tensors.items())))
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
        for name, bundle in self.examples().items():
            assert not find_errors(lambda bundle=bundle: self.scheme.read(bundle, self.stated)), name

    def test_what_it_writes_of_any_adapter_it_reads(self) -> None:
        for suite in _find_suites():
            for _, adapter in suite.read_all():
                written = self.write(adapter)
                if written is None:
                    pytest.skip("this scheme is only read")
                assert self.scheme.detect(written)
                again = self.scheme.read(written, NOT_STATED)
                assert [comparable(target) for target in again.targets] == list(map(comparable, adapter.targets))
                assert (again.base, again.metadata) == (adapter.base, adapter.metadata)

    def test_empty_bundles_are_refused(self) -> None:
        for bundle in self.examples().values():
            with pytest.raises(LoraformatError):
                self.scheme.read(replace(bundle, tensors={}, metadata={}), self.stated)


def comparable(target: Target) -> tuple[object, ...]:
    """Return everything that a scheme must keep of a target."""
    factors = {role: (factor.dtype, factor.shape, factor.read().tobytes()) for role, factor in target.factors.items()}
    return target.name, target.kind, target.slot, target.rank, target.scaling, target.fingerprint, factors


@cache
def _find_suites() -> tuple[SchemeLaws, ...]:
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
    for suite in _find_suites():
        named = {f"{type(suite).__name__}: {name}": bundle for name, bundle in suite.examples().items()}
        collected.setdefault(suite.scheme.name, {}).update(named)
    return collected
