"""Where every tensor of the source went: nothing is left out in silence."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from loraformat.adapter import Adapter, Factor
from loraformat.derived import NewFactor, find_origins, list_steps
from loraformat.problems import Problem


@dataclass(frozen=True, slots=True)
class Step:
    """How one tensor of the output is made.

    Attributes:
        name: its name in the output.
        sources: the tensors of the source that it is made of; empty for one that the source states otherwise.
        operations: what is done, in order; empty for a tensor that is only renamed.
    """

    name: str
    sources: tuple[str, ...]
    operations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Account:
    """What became of the source's tensors, by name.

    Attributes:
        converted: they are in the output.
        carried: their numbers stand elsewhere in the output, such as an alpha in a configuration.
        refused: nothing knows them, or the target has no place for them.
    """

    converted: tuple[str, ...]
    carried: tuple[str, ...]
    refused: tuple[str, ...]

    def __str__(self) -> str:
        """Return the numbers in one line."""
        counts = {"converted": self.converted, "carried": self.carried, "refused": self.refused}
        return ", ".join(f"{len(names)} {word}" for word, names in counts.items())


def list_written(tensors: Mapping[str, Factor]) -> tuple[Step, ...]:
    """Return how every tensor of an output is made, by name."""
    return tuple(
        Step(name, tuple(dict.fromkeys(_name_origins(factor))), tuple(list_steps(factor)))
        for name, factor in sorted(tensors.items())
    )


def _name_origins(factor: Factor) -> Iterator[str]:
    """Yield the names of the source's tensors that a factor is made of."""
    return (origin.name for origin in find_origins(factor) if not isinstance(origin, NewFactor))


def account(sources: Mapping[str, Factor], adapter: Adapter, written: Iterable[Factor]) -> Account:
    """Return where every tensor of a source went."""
    used = {id(origin) for factor in written for origin in find_origins(factor)}
    absorbed = {id(origin) for factor in adapter.absorbed for origin in find_origins(factor)} - used
    known = used | absorbed
    converted = [name for name, factor in sources.items() if id(factor) in used]
    carried = [name for name, factor in sources.items() if id(factor) in absorbed]
    refused = [name for name, factor in sources.items() if id(factor) not in known]
    return Account(tuple(sorted(converted)), tuple(sorted(carried)), tuple(sorted(refused)))


def find_unaccounted(result: Account, problems: Iterable[Problem]) -> list[Problem]:
    """Return the tensors that did not arrive, and of which no problem speaks."""
    spoken = {problem.where for problem in problems}
    return [
        Problem("LF322", name, "a tensor that the conversion leaves out", "every tensor in the output")
        for name in result.refused
        if name not in spoken
    ]
