"""Naming schemes: one file each, between named tensors and adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from loraformat.adapter import Adapter, Factor, SlotKind
from loraformat.base_facts import NO_FACTS, BaseFacts
from loraformat.errors import refuse
from loraformat.frozen_mapping import FrozenMapping
from loraformat.problems import Problem
from loraformat.registry import Registry
from loraformat.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class Bundle:
    """The named tensors of one adapter and what lies beside them.

    Attributes:
        path: the file or folder that the user named.
        tensors: name to unread tensor.
        metadata: text annotations of the file.
        config: the configuration beside it (`adapter_config.json`), or None.
        facts: what is known of the base, for names and numbers that the adapter alone does not tell.
        beside: the tensors that lie in a file of their own, of modules that a script saved whole.
        adapter: the one that the user chose among several in it, by its name; empty for all that is there.
    """

    path: Path
    tensors: Mapping[str, Factor]
    metadata: Mapping[str, str] = field(default_factory=FrozenMapping)
    config: Mapping[str, JsonValue] | None = None
    facts: BaseFacts = NO_FACTS
    beside: frozenset[str] = frozenset()
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class StatedScale:
    """What the user says about an adapter that does not say it itself.

    Attributes:
        alpha: the lora_alpha of the training run.
        multiplier: the effective scale itself.
    """

    alpha: float | None = None
    multiplier: float | None = None

    def __post_init__(self) -> None:
        """Refuse two statements about one thing (LF705)."""
        if self.alpha is not None and self.multiplier is not None:
            raise refuse("LF705", "alpha and scale", "two statements about one thing", "one of them")


NOT_STATED: Final = StatedScale()


class Scheme(Protocol):
    """What a file in this folder provides as `SCHEME`.

    Attributes:
        name: as in `--scheme` and in `inspect`.
        title: one line for people.
        holds: what its files have a place for.
    """

    name: str
    title: str
    holds: "Holds"

    def detect(self, bundle: Bundle) -> str | None:
        """Return the evidence that the bundle is of this scheme, in words, or None."""
        ...

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; every tensor is accounted for or the error names it."""
        ...


ALL_SLOTS: Final = frozenset(SlotKind)
LORA_SLOTS: Final = frozenset({SlotKind.LINEAR, SlotKind.LINEAR_TRANSPOSED, SlotKind.CONV})


PIPELINES: Final = frozenset({"pipelines"})
"""Models that make pictures, with their text encoders."""
DECODERS: Final = frozenset({"decoders"})
"""Language models."""


@dataclass(frozen=True, slots=True)
class Holds:
    """What the files of a scheme have a place for; when one is written, the rest is refused by name.

    Attributes:
        kinds: adapter kinds.
        slots: kinds of slots.
        scale: where the scale stands: `each target`, `one for all`, `folded` where there is no place, or `not stored`.
        dtypes: number forms; empty for any that safetensors has.
        needs: what the base must say before it can be written, in words; empty when nothing.
        models: whose modules it can name: those of `PIPELINES` or of `DECODERS`; empty for any model's.
    """

    kinds: frozenset[str]
    slots: frozenset[SlotKind] = LORA_SLOTS
    scale: str = "each target"
    dtypes: frozenset[str] = frozenset()
    needs: str = ""
    models: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class WrittenBundle:
    """What a scheme makes of an adapter, unwritten: tensors that are read when they are due.

    Attributes:
        tensors: name to tensor.
        metadata: annotations of the file; texts, but for containers that have typed ones.
        config: the configuration beside it, or None.
        container: name of the container, a file in `loraformat/containers/` that can write.
        file_name: what the file is called in its folder; empty for a scheme of single files.
        other_files: other names that its readers look for, `*` for any text, each with the container that it says; an
            output of such a name is the file itself, without annotations.
        config_name: what the configuration is called.
        problems: what the scheme has no place for, or would round.
        stated: what a reader of the files must be told, for a scheme that has no place for a scale.
    """

    tensors: Mapping[str, Factor]
    metadata: Mapping[str, JsonValue] = field(default_factory=FrozenMapping)
    config: Mapping[str, JsonValue] | None = None
    container: str = "safetensors"
    file_name: str = ""
    other_files: Mapping[str, str] = field(default_factory=FrozenMapping)
    config_name: str = ""
    problems: tuple[Problem, ...] = ()
    stated: StatedScale = NOT_STATED


@runtime_checkable
class WritingScheme(Scheme, Protocol):
    """A scheme that is written as well.

    Attributes:
        names: what the tables of `spec/names/` call it, for the spelling in which it names modules; empty where it
            takes names as they are.
    """

    names: str

    def write(self, adapter: Adapter, facts: BaseFacts) -> WrittenBundle:
        """Return the adapter in this scheme, its modules already spelled as the scheme wants them; does not raise.

        What does not fit, or would be rounded, is among its problems; the tensors are then not to be written.
        """
        ...


@dataclass(frozen=True, slots=True)
class Layout:
    """What the files of a scheme of folders are called.

    Attributes:
        factors: names of the file with the tensors, the one to prefer first; `*` stands for a step in checkpoints of a
            training run, which are not looked for, only known when they are named.
        configs: names of the configurations beside it; of two that state a field the first counts.
    """

    factors: tuple[str, ...]
    configs: tuple[str, ...]


@runtime_checkable
class FolderScheme(Scheme, Protocol):
    """A scheme whose files lie in a folder under names of their own.

    Attributes:
        layout: these names.
    """

    layout: Layout


@runtime_checkable
class CertainScheme(Scheme, Protocol):
    """A scheme that some bundles name themselves, in a way that those of no other scheme of ours do."""

    def is_named(self, bundle: Bundle) -> bool:
        """Say whether the bundle is surely of this scheme: then no other one of ours is asked, nor imported."""
        ...


@runtime_checkable
class ChoosingScheme(Scheme, Protocol):
    """A scheme whose files may hold several adapters, and which reads the one that `Bundle.adapter` says."""

    def list_adapters(self, bundle: Bundle) -> list[str]:
        """Return their names."""
        ...


@runtime_checkable
class AmbiguousScheme(Scheme, Protocol):
    """A scheme whose tensors may be of several kinds, which only the base tells apart.

    Attributes:
        told_by_base: which kinds.
    """

    told_by_base: frozenset[str]


@runtime_checkable
class KnowingScheme(Scheme, Protocol):
    """A scheme whose files say something about the base."""

    def find_facts(self, bundle: Bundle) -> BaseFacts:
        """Return what they say."""
        ...


@dataclass(frozen=True, slots=True)
class ConfigReading:
    """What a configuration without tensors says.

    Attributes:
        described: what it announces, in a few words.
        kinds: the adapter kinds that its tensors would have, each with the field that says so.
        problems: what stands against a merge whatever the tensors are, and what is odd.
    """

    described: str
    kinds: Mapping[str, str]
    problems: Sequence[Problem]


@runtime_checkable
class CheckingScheme(Scheme, Protocol):
    """A scheme that knows what is legal but odd."""

    def check(self, bundle: Bundle) -> list[Problem]:
        """Return what is odd about tensors and configuration; does not raise."""
        ...


@runtime_checkable
class ConfiguredScheme(Scheme, Protocol):
    """A scheme with a configuration that means something without its tensors."""

    def check_config(self, bundle: Bundle) -> ConfigReading:
        """Return what the configuration of a bundle without tensors says; does not raise."""
        ...


SCHEMES: Registry[Scheme] = Registry("loraformat.schemes", "SCHEME")
