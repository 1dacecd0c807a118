"""Naming schemes: one file each, between named tensors and adapters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

from loraformat.adapter import Adapter, Factor
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
    """

    path: Path
    tensors: Mapping[str, Factor]
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    config: Mapping[str, JsonValue] | None = None


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
        """Refuse two statements about one thing."""
        if self.alpha is not None and self.multiplier is not None:
            raise ValueError("give alpha or scale, not both")


NOT_STATED: Final = StatedScale()


class Scheme(Protocol):
    """What a file in this folder provides as `SCHEME`.

    Attributes:
        name: as in `--scheme` and in `inspect`.
        title: one line for people.
    """

    name: str
    title: str

    def detect(self, bundle: Bundle) -> str | None:
        """Return the evidence that the bundle is of this scheme, in words, or None."""
        ...

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; every tensor is accounted for or the error names it."""
        ...


SCHEMES: Registry[Scheme] = Registry("loraformat.schemes", "SCHEME")
