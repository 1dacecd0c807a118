"""Fused q, k and v that stand by heads in some files, and one below the other in all others, under the same names.

Names and shapes are the same in both orders. What tells the files apart is how their keys end; adapters are held with
q, k and v one below the other. A model and a tool that do so are a row of `ROWS`.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from loraformat.adapter import Adapter, Factor, Target
from loraformat.derived import derive
from loraformat.problems import Problem
from loraformat.row_orders import GroupHeads
from loraformat.schemes._naming import split_component
from loraformat.spellings import read_names

_ROLES: Final = ("lora_B.weight", "lora_B.bias", "lora_magnitude_vector")


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Modules of one model whose rows a tool writes by heads.

    Attributes:
        table: the model's table of names.
        spelling: the spelling in which the modules are.
        fused: what they are called.
        written: how a key of the tool's files ends, and of no others of these names.
        head_rows: rows of a head in every released model.
    """

    table: str
    spelling: str
    fused: re.Pattern[str]
    written: re.Pattern[str]
    head_rows: int

    @property
    def group_rows(self) -> int:
        """Rows of q, k and v of one head."""
        return 3 * self.head_rows

    def turn(self, rows: int) -> GroupHeads:
        """Return the operation that puts rows that stand one below the other by heads."""
        heads = rows // self.group_rows
        return GroupHeads(heads, heads, self.head_rows)


ROWS: Final = (
    # MiniMax-H3, DiffSynth-Studio: diffusers 0.42, loaders/lora_conversion_utils.py and single_file_utils.py.
    HeadRows(
        table="minimax-h3-transformer",
        spelling="native",
        fused=re.compile(r"(?:token_refiner\.)?blocks\.\d+\.attn\.qkv_proj"),
        written=re.compile(r"\.lora_[AB]\.default\.weight$"),
        head_rows=128,
    ),
)


def find_fused(adapter: Adapter) -> frozenset[str]:
    """Return the targets whose rows may stand in either order."""
    return _find(adapter)[1]


def stack_heads(adapter: Adapter, keys: Iterable[str]) -> Adapter:
    """Return what was read from a file with q, k and v one below the other; LF315 where heads do not fit.

    Args:
        adapter: with its rows as the file has them.
        keys: of the file's tensors.
    """
    row, fused = _find(adapter)
    if row is None or not any(map(row.written.search, keys)):
        return adapter
    found = [target for target in adapter.targets if target.name in fused]
    group = row.group_rows
    unfit = [
        Problem("LF315", target.name, f"{factor.shape[0]} rows", f"a multiple of {group}, for q, k and v of every head")
        for target in found
        for factor in _list_rows(target)
        if factor.shape[0] % group
    ]
    said = f"{len(found)} modules such as {found[0].name}, by heads"
    problems = unfit or [Problem("LF328", adapter.source, said, "q, k and v one below the other", severity="note")]
    turned = adapter if unfit else _turn(adapter, fused, lambda rows: row.turn(rows).undo())
    return replace(turned, problems=(*adapter.problems, *problems))


def interleave_heads(adapter: Adapter, keys: Iterable[str]) -> Adapter:
    """Return an adapter with its rows as a file with these keys has them; itself where that is as they are."""
    row, fused = _find(adapter)
    if row is None or not any(map(row.written.search, keys)):
        return adapter
    return _turn(adapter, fused, row.turn)


def _find(adapter: Adapter) -> tuple[HeadRows | None, frozenset[str]]:
    """Return the row that an adapter's names are of, and the targets that it is about."""
    for row in ROWS:
        fused = frozenset(target.name for target in adapter.targets if row.fused.fullmatch(_path(target)))
        readings = read_names(map(_path, adapter.targets)) if fused else []
        if any(not each.missed and (each.table.name, each.spelling) == (row.table, row.spelling) for each in readings):
            return row, fused
    return None, frozenset()


def _turn(adapter: Adapter, fused: frozenset[str], choose: Callable[[int], GroupHeads]) -> Adapter:
    targets = tuple(_turn_target(target, choose) if target.name in fused else target for target in adapter.targets)
    return replace(adapter, targets=targets)


def _turn_target(target: Target, choose: Callable[[int], GroupHeads]) -> Target:
    rows = {role: target.factors[role] for role in _ROLES if role in target.factors}
    turned = {role: derive(choose(factor.shape[0]), factor) for role, factor in rows.items()}
    return replace(target, factors={**target.factors, **turned})


def _list_rows(target: Target) -> list[Factor]:
    return [target.factors[role] for role in _ROLES if role in target.factors]


def _path(target: Target) -> str:
    return split_component(target.name)[1]
