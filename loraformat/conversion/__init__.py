"""Converting between naming schemes: the face of it.

loraformat.convert("pytorch_lora_weights.safetensors", "kohya", "style.safetensors")
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from loraformat.base_facts import BaseFacts
from loraformat.conversion._base import read_base_facts
from loraformat.conversion._engine import (
    Conversion,
    Converted,
    Rounding,
    check_converted,
    convert_source,
    find_writer,
    read_source,
    write_converted,
)
from loraformat.conversion._pairs import Pair, list_pairs, tabulate_pairs
from loraformat.conversion._respelling import respell_by
from loraformat.schemes import SCHEMES, StatedScale, WritingScheme

StrPath: TypeAlias = str | os.PathLike[str]
__all__ = [
    "Conversion",
    "Pair",
    "SchemeSummary",
    "convert",
    "list_pairs",
    "list_schemes",
    "plan_conversion",
    "respell_by",
    "tabulate_pairs",
]


def convert(
    adapter: StrPath,
    to: str,
    output: StrPath,
    *,
    base: StrPath | None = None,
    scheme: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
    allow_rounding: bool = False,
    verify: bool = False,
    force: bool = False,
) -> Conversion:
    """Write an adapter in another naming scheme: its numbers are moved, and none is rounded without leave.

    Args:
        adapter: a file or a folder.
        to: name of the scheme to write (`list_schemes`).
        output: the file to make, or the folder for a scheme of folders.
        base: the base model, its `config.json` or its folder, for what the adapter alone does not tell.
        scheme: name of the adapter's own scheme; None finds it.
        alpha: lora_alpha of the training run, for a source that does not state it.
        scale: the multiplier itself, for a source that states no alpha.
        allow_rounding: fold a scale into a tensor that cannot hold the product exactly.
        verify: read what was written and compare the change of every module in float64.
        force: replace existing files.

    Raises:
        LoraformatError: with every problem that was found; the output is what it was before.
    """
    rounding = Rounding(allow_rounding)
    facts = read_base_facts(Path(base) if base is not None else None)
    converted = _convert(adapter, to, facts, scheme, StatedScale(alpha, scale), rounding)
    check_converted(converted)
    return write_converted(converted, Path(output), converted.source.bundle.facts, rounding, force=force, verify=verify)


def plan_conversion(
    adapter: StrPath,
    to: str,
    *,
    base: StrPath | None = None,
    scheme: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
    allow_rounding: bool = False,
) -> Conversion:
    """Return what `convert` would do with the same arguments; writes nothing, and lists errors instead of raising."""
    facts = read_base_facts(Path(base) if base is not None else None)
    converted = _convert(adapter, to, facts, scheme, StatedScale(alpha, scale), Rounding(allow_rounding))
    return converted.report(None, None)


def _convert(
    adapter: StrPath, to: str, facts: BaseFacts, scheme: str | None, stated: StatedScale, rounding: Rounding
) -> Converted:
    source = read_source(Path(adapter), scheme, stated, facts)
    return convert_source(source, find_writer(to), source.bundle.facts, rounding)


@dataclass(frozen=True, slots=True)
class SchemeSummary:
    """What there is to know about one scheme.

    Attributes:
        name: as in `--scheme` and `--to`.
        title: one line.
        writes: whether it can be written.
        kinds: adapter kinds that it has a place for; empty for any.
        slots: kinds of slots.
        scale: where the scale stands.
        dtypes: number forms; empty for any.
        needs: what the base must tell.
    """

    name: str
    title: str
    writes: bool
    kinds: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    scale: str = ""
    dtypes: tuple[str, ...] = ()
    needs: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        return {
            "name": self.name,
            "title": self.title,
            "writes": self.writes,
            "kinds": list(self.kinds),
            "slots": list(self.slots),
            "scale": self.scale,
            "dtypes": list(self.dtypes),
            "needs": self.needs,
        }


def list_schemes() -> list[SchemeSummary]:
    """Return every scheme with what it can hold."""
    summaries = []
    for name, scheme in SCHEMES:
        holds = scheme.holds
        slots = tuple(sorted(slot.value for slot in holds.slots))
        kinds, dtypes = tuple(sorted(holds.kinds)), tuple(sorted(holds.dtypes))
        writes = isinstance(scheme, WritingScheme)
        summaries.append(SchemeSummary(name, scheme.title, writes, kinds, slots, holds.scale, dtypes, holds.needs))
    return summaries
