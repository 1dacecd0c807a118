"""What a scheme may offer to `validate`, beyond reading: oddities, and a look at a configuration alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from loraformat.problems import Problem
from loraformat.schemes import Bundle


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
class ChecksBundle(Protocol):
    """A scheme that knows what is legal but odd."""

    def check(self, bundle: Bundle) -> list[Problem]:
        """Return what is odd about tensors and configuration; does not raise."""
        ...


@runtime_checkable
class ReadsConfig(Protocol):
    """A scheme with a configuration that means something without its tensors."""

    def check_config(self, bundle: Bundle) -> ConfigReading:
        """Return what the configuration of a bundle without tensors says; does not raise."""
        ...
