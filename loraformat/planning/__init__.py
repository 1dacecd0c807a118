"""From adapters and a base to a plan, without reading the base's weights but for a few sampled numbers.

Everything that can fail before a byte is written fails here: kinds, shapes, scales, names, number forms, NaN in
factors.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Unpack

from loraformat.bases import BaseModel, DequantisingBase, LayeredBase
from loraformat.errors import error_for
from loraformat.evidence import Hints
from loraformat.files import name_from, name_in_hub
from loraformat.plan import Plan, PlannedAdapter, WeightedAdapter
from loraformat.plan.weights import PlannedWeight
from loraformat.planning.gathering import Found
from loraformat.planning.layers import place_anew
from loraformat.planning.new_sizes import follow_weights
from loraformat.planning.parted_tables import follow_ties, keeps_apart
from loraformat.planning.rewriting import plan_rewriting
from loraformat.planning.wishes import SettledWishes, list_unusual
from loraformat.problems import Problem, escape_surrogates
from loraformat.resolve import gather_clues, resolve
from loraformat.rules import check_adapter
from loraformat.viewing import choose_graphs

_NO_HINTS: Final = Hints()
_FLAT: Final = "LF314"
"""A flat name that is none of the base's modules."""


def build_plan(
    base: BaseModel,
    adapters: Sequence[WeightedAdapter],
    output: Path,
    *,
    hints: Hints = _NO_HINTS,
    **wishes: Unpack[SettledWishes],
) -> Plan:
    """Plan the merge of `adapters` into `base`.

    Args:
        base: the opened base.
        adapters: what to merge, in the order in which deltas are summed.
        output: where the merged model will stand.
        hints: what there is to find targets by, besides names.
        wishes: `SettledWishes` says what there is.

    Raises:
        LoraformatError: with every problem that was found, not only the first.
    """
    found = Found(choose_graphs(base, wishes.get("graphs", ())))
    found.problems += _find_repeated(adapters)
    for position, item in enumerate(adapters):
        _resolve_adapter(found, position, item, wishes, hints)
    found.check_sites(wishes)
    planned = found.plan_weights(wishes)
    return _compose_plan(base, adapters, output, wishes, found, planned)


def _resolve_adapter(found: Found, position: int, item: WeightedAdapter, wishes: SettledWishes, hints: Hints) -> None:
    """Add what one adapter changes, or what stands against it."""
    allow_zero = wishes.get("allow_zero", False)
    checked = check_adapter(item.adapter, allow_zero=allow_zero)
    checked += _check_weight(item, allow_zero=allow_zero)
    checked, unread = _leave_out(checked, wishes.get("allow_unmatched", ()))
    found.problems += checked
    if any(problem.severity == "error" for problem in checked):
        found.counts.append(0)
        return
    clues = gather_clues(item.adapter, found.base, hints, strip_prefix=wishes.get("strip_prefix"))
    untie = wishes.get("untie", False)
    resolution = resolve(
        item.adapter,
        found.base.sites,
        allow_unmatched=wishes.get("allow_unmatched", ()),
        strip_prefix=wishes.get("strip_prefix"),
        ignore_fingerprints=wishes.get("ignore_fingerprints", False),
        untie=untie or keeps_apart(item.adapter, found.base),
        new_biases=wishes.get("new_biases", False),
        clues=clues,
    )
    resolution = follow_ties(resolution, found.base, untie=untie)
    found.add(position, item, replace(resolution, unmatched=(*resolution.unmatched, *unread)), clues)


def _leave_out(problems: list[Problem], globs: Sequence[str]) -> tuple[list[Problem], list[str]]:
    """Return the problems without those of flat names that may be left out, as the base lacks them, and these names."""
    names = [each.where for each in problems if each.code == _FLAT and any(fnmatchcase(each.where, g) for g in globs)]
    return [each for each in problems if each.code != _FLAT or each.where not in names], names


def _compose_plan(
    base: BaseModel,
    adapters: Sequence[WeightedAdapter],
    output: Path,
    wishes: SettledWishes,
    found: Found,
    planned: tuple[PlannedWeight, ...],
) -> Plan:
    """Return the plan, or raise what stands against it."""
    config_changes, followed = follow_weights(planned, base.sites, untied=found.untied)
    if isinstance(base, DequantisingBase) and any(weight.is_dequantised for weight in planned):
        config_changes = {**config_changes, **base.tell_floats()}
    if isinstance(base, LayeredBase) and base.sources:
        planned, config_changes = place_anew(planned), {**config_changes, **base.tell_layers()}
    problems = found.problems + followed
    if any(problem.severity == "error" for problem in problems):
        raise error_for([problem for problem in problems if problem.severity == "error"])
    rewriting = None
    anew, dtype = wishes.get("anew", False), wishes.get("dtype")
    if anew or dtype is not None or config_changes or any(_is_anew(weight, base) for weight in planned):
        rewriting = plan_rewriting(base, planned, dtype, anew=anew, config_changes=config_changes)
        problems += rewriting.problems
    return Plan(
        base=describe_base(base),
        format=base.format,
        output=output,
        adapters=tuple(
            PlannedAdapter(item.name, item.adapter.sha256, item.weight, count)
            for item, count in zip(adapters, found.counts, strict=True)
        ),
        weights=rewriting.weights if rewriting else planned,
        unmatched=tuple(found.unmatched),
        problems=tuple(problems),
        config_changes=rewriting.config_changes if rewriting else {},
        rewritten=rewriting is not None,
        options=list_unusual(wishes),
    )


def _is_anew(weight: PlannedWeight, base: BaseModel) -> bool:
    """Say whether a weight needs an output that is written anew: floats for codes do where the base is no graph."""
    in_place = weight.is_copy or weight.is_added or (weight.is_dequantised and base.rewriter is None)
    return weight.new is not None and not in_place


def describe_base(base: BaseModel) -> dict[str, Any]:
    """Return what a plan and a receipt say about the base: names, sizes, and the digest of its structure."""
    root = base.path if base.path.is_dir() else base.path.parent
    files = sorted((name_from(file.path, root), file.size_bytes) for file in base.files)
    return {
        "name": escape_surrogates(base.path.name),
        "structure_sha256": base.structure_sha256,
        "files": [{"name": escape_surrogates(name), "bytes": size} for name, size in files],
    }


def _find_repeated(adapters: Sequence[WeightedAdapter]) -> list[Problem]:
    """Return warnings of adapters that are given more than once; those of no file have no digest."""
    counts = Counter(item.adapter.sha256 for item in adapters if item.adapter.sha256)
    first = {item.adapter.sha256: item.name for item in reversed(adapters)}
    repeated = ((first[digest], count) for digest, count in counts.items() if count > 1)
    return [
        Problem("LF838", name, f"given {count} times, and added each time", "once", severity="warning")
        for name, count in repeated
    ]


def _check_weight(item: WeightedAdapter, *, allow_zero: bool) -> list[Problem]:
    if not math.isfinite(item.weight):
        return [Problem("LF207", item.name, f"weight {item.weight}", "a finite number")]
    if item.weight == 0 and not allow_zero:
        return [Problem("LF208", item.name, "weight 0", "a weight other than 0, or --allow-zero")]
    return []


def default_output(base: Path, suffix: str, adapters: Sequence[WeightedAdapter]) -> Path:
    """Return `<base>-<adapter>[@<weight>]...<suffix>` beside the base, or here where that is in a hub's cache."""
    parts = [name_in_hub(base) or base.name.removesuffix(suffix)]
    parts += [item.name if item.weight == 1 else f"{item.name}@{item.weight:g}" for item in adapters]
    folder = Path.cwd() if any(map(name_in_hub, base.parents)) else base.parent
    return folder / ("-".join(parts) + suffix)
