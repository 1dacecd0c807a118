"""LoRA of vision transformers as SAMed and its descendants save it: `w_a_000`, `w_b_000`, numbers instead of names.

Every block has two pairs, q and v of the fused `qkv`: pair 2i is q of block i, pair 2i+1 is v. B·A is added without a
scale. Heads and decoders that were trained as a whole lie beside them under their own names. Source: hitachinsk/SAMed,
JamesQFreeman/LoRA-ViT (sam_lora.py, lora.py).
"""

import re
from dataclasses import replace
from typing import Final

from loraformat.adapter import Adapter, Factor, SlotKind
from loraformat.derived import derive
from loraformat.operations import Concatenate
from loraformat.problems import Problem
from loraformat.schemes import Bundle, Holds, StatedScale
from loraformat.schemes._engine import TableReader
from loraformat.schemes._grouped import Groups, place_rows
from loraformat.schemes._marks import Marks
from loraformat.schemes._naming import PlainNaming
from loraformat.schemes._one_scale import Folded
from loraformat.schemes._table import NameTable, Row

_PAIR: Final = re.compile(r"w_([ab])_(\d{3,})")
_Q_AND_V: Final = (0, 2)


class _SamLora(TableReader):
    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; the two pairs of a block become one target."""
        tensors, strays = _name_pairs(bundle)
        adapter = super().read(replace(bundle, tensors=tensors), stated)
        count = sum(1 for target in adapter.targets if target.rank)
        found = f"{count} blocks from the first on, as their numbers have it"
        note = Problem("LF344", str(bundle.path), found, "every block adapted", severity="warning")
        return replace(adapter, problems=(*adapter.problems, *strays, note))


def _name_pairs(bundle: Bundle) -> tuple[dict[str, Factor], list[Problem]]:
    """Return the tensors with names, and those of incomplete blocks as problems."""
    tensors: dict[str, Factor] = {}
    blocks: dict[int, dict[tuple[str, int], Factor]] = {}
    for key, factor in bundle.tensors.items():
        match = _PAIR.fullmatch(key)
        if match is None:
            tensors[key] = factor
        else:
            block, part = divmod(int(match[2]), 2)
            blocks.setdefault(block, {})[match[1], part] = factor
    problems: list[Problem] = []
    for block, factors in sorted(blocks.items()):
        whole = _join(factors)
        if whole is None:
            lone = ", ".join(sorted(factor.name for factor in factors.values()))
            problems.append(Problem("LF201", f"block {block}", lone, "w_a and w_b of q and of v, of one width"))
        else:
            module = f"blocks.{block}.attn.qkv"
            tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = whole
    return tensors, problems


def _join(factors: dict[tuple[str, int], Factor]) -> tuple[Factor, Factor] | None:
    """Return A and B of the fused weight, whose three parts have the same number of rows."""
    downs, ups = ([factors[letter, part] for part in (0, 1) if (letter, part) in factors] for letter in "ab")
    if len(downs) != 2 or len(ups) != 2 or ups[0].shape != ups[1].shape or downs[0].shape != downs[1].shape:
        return None
    rows = ups[0].shape[0]
    stacked = derive(Concatenate(), *ups)
    return derive(Concatenate(), *downs), place_rows(stacked, Groups((rows,) * 3, _Q_AND_V))


SCHEME: Final = _SamLora(
    name="sam_lora",
    title="SAMed, LoRA-ViT: numbered pairs w_a_000 and w_b_000 of q and v",
    rows=NameTable(
        [
            Row("lora_A", "lora", "lora_A.weight"),
            Row("lora_B", "lora", "lora_B.weight"),
            Row("weight", "replace", "weight"),
            Row("bias", "replace", "bias"),
        ]
    ),
    naming=PlainNaming(),
    scale=Folded(),
    holds=Holds(
        kinds=frozenset({"lora", "replace"}),
        slots=frozenset({SlotKind.LINEAR, SlotKind.PARAMETER}),
        scale="not stored",
        models=frozenset({"encoders"}),
    ),
    marks=Marks(keys=(r"w_[ab]_\d{3,}$",), neutral=(r"(?!w_[ab]_).*",)),
)
