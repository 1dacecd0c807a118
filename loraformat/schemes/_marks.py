"""By which keys a scheme is known, and how older or noisy keys are read."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from loraformat.manifest import MANIFEST_KEY
from loraformat.schemes import Bundle

BUNDLED_KEYS: Final = r"bundle_emb\..+"
"""Embeddings of tokens, which may lie beside factors in files of several schemes."""

BARE: Final = r"(?:down_blocks|up_blocks|mid_block|(?:single_)?transformer_blocks)(?=\.)"
"""How keys begin that diffusers writes without a component."""
BARE_TENSOR: Final = r".*(?:[._]lora\.|\.lora_(?:[AB]\.|linear_layer|magnitude))"
"""What diffusers' keys then say."""


@dataclass(frozen=True, slots=True)
class Marks:
    """By what a scheme is known.

    Attributes:
        keys: expressions that a key of the scheme matches, from its start.
        neutral: expressions of keys that may stand in files of several schemes, and do not count.
        others: expressions of keys that speak against the scheme, whatever else is there.
        asks: further conditions on the bundle, all of which must hold.
    """

    keys: tuple[str, ...]
    neutral: tuple[str, ...] = (r".+\.alpha$", BUNDLED_KEYS)
    others: tuple[str, ...] = ()
    asks: tuple[Callable[[Bundle], bool], ...] = ()

    def find(self, bundle: Bundle) -> str | None:
        """Return the evidence in words, or None: more than half of the keys that count must be of the scheme."""
        if MANIFEST_KEY in bundle.metadata or not all(ask(bundle) for ask in self.asks):
            return None
        hits = {key for key in bundle.tensors if _joined(self.keys).match(key)}
        if not hits or any(_joined(self.others).match(key) for key in bundle.tensors if self.others):
            return None
        counted = [key for key in bundle.tensors if key in hits or not _joined(self.neutral).match(key)]
        if 2 * len(hits) <= len(counted):
            return None
        return f"{len(hits)} of {len(bundle.tensors)} tensors are called like {min(hits)}"


_EXPRESSIONS: dict[tuple[str, ...], re.Pattern[str]] = {}


def _joined(expressions: tuple[str, ...]) -> re.Pattern[str]:
    if expressions not in _EXPRESSIONS:
        _EXPRESSIONS[expressions] = re.compile("|".join(f"(?:{each})" for each in expressions) or r"(?!)")
    return _EXPRESSIONS[expressions]


@dataclass(frozen=True, slots=True)
class Alias:
    """An older or noisy way to write a key: the expression and the key as the table knows it."""

    expression: str
    key: str


NOISE: Final = tuple(
    Alias(rf"^((?:.*\.)?){re.escape(word)}(.*)$", r"\1\2")
    for word in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
)
"""Prefixes that wrappers of training frameworks leave in names."""
