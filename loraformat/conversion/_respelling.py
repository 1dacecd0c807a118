"""The same change under another spelling of the model: renamed, split, fused, reordered.

The tables of `spec/names/` say what corresponds to what. Everything here moves numbers and rounds none: `_fusing` says
how fused weights are taken apart and put together, `_ordering` how rows are put in another order.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Protocol

from loraformat.adapter import Adapter, Factor, Target
from loraformat.base_facts import BaseFacts
from loraformat.conversion._fusing import Made, describe_parts, fuse, split
from loraformat.conversion._ordering import reorder
from loraformat.conversion._routes import Route, choose_route
from loraformat.problems import Problem
from loraformat.schemes._memory import COMPONENT_KEY, MODEL_KEY, SPELLING_KEY, find_memory, find_texts
from loraformat.schemes._naming import DENOISERS, split_component
from loraformat.spellings import ModuleRow, Place, Reading, SpellingTable, read_names
from loraformat.strict_json import JsonValue

FUSED: Final = "fused"
"""The provenance that remembers which parts a fused target was made of, and their ranks."""


@dataclass(slots=True)
class Respelled:
    """An adapter under other names.

    Attributes:
        targets: its targets.
        problems: what the tables or the base do not say.
        fused: fused target to the parts it was made of, each with its rank.
        absorbed: copies of tensors that were kept.
    """

    targets: list[Target] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    fused: dict[str, JsonValue] = field(default_factory=dict)
    absorbed: list[Factor] = field(default_factory=list)


class Speller(Protocol):
    """From a reading of a component's names to the spelling that is wanted; None where its table does not matter."""

    def __call__(self, reading: Reading, component: str) -> str | None: ...


def respell(adapter: Adapter, names: str, facts: BaseFacts) -> tuple[Adapter, list[Problem]]:
    """Return the adapter with its modules spelled as the scheme `names` of the tables wants them.

    Components that no table knows stay as they are: the scheme itself decides whether it can name them. A scheme that
    no table has takes any names, and gets those that it had before.
    """
    earlier = find_texts(find_memory(adapter.provenance, SPELLING_KEY), names)

    def spell(reading: Reading, component: str) -> str | None:
        known = reading.table.schemes.get(names)
        own = earlier.get(component)
        if own in reading.table.spellings:
            return own
        if known is None:
            return None
        return reading.spelling if reading.spelling in known.also else known.spelling

    return respell_by(adapter, spell, facts)


def respell_like(adapter: Adapter, model: Adapter, facts: BaseFacts) -> tuple[Adapter, list[Problem]]:
    """Return the adapter with its modules spelled as those of another adapter of the same modules."""
    if {target.name for target in adapter.targets} == {target.name for target in model.targets}:
        return adapter, []
    known: dict[str, str] = {}
    groups: dict[str, list[str]] = defaultdict(list)
    for target in model.targets:
        component, path = split_component(target.name)
        groups[component].append(path)
    for paths in groups.values():
        for reading in read_names(paths, architecture=facts.architecture):
            if not reading.missed:
                known.setdefault(reading.table.name, reading.spelling)
    return respell_by(adapter, lambda reading, component: known.get(reading.table.name), facts)


def respell_by(adapter: Adapter, speller: Speller, facts: BaseFacts) -> tuple[Adapter, list[Problem]]:
    """Return the adapter with its modules in the spellings that `speller` tells."""
    result = Respelled()
    known = adapter.provenance.get(FUSED)
    left_out = str(adapter.provenance.get(COMPONENT_KEY, ""))
    models = dict(find_memory(adapter.provenance, MODEL_KEY))
    spellings = dict(find_memory(adapter.provenance, SPELLING_KEY))
    groups: dict[str, list[Target]] = defaultdict(list)
    for target in adapter.targets:
        groups[split_component(target.name)[0]].append(target)
    for component, targets in sorted(groups.items()):
        stated = left_out if component in ("", "diffusion_model") else component
        route, problem = choose_route(component, targets, partial(speller, component=stated), facts, models.get(stated))
        result.problems += [problem] if problem else []
        owner = stated or (_adopt(route.table) if route else component)
        prefix = f"{owner}." if owner else ""
        if route is None:
            result.targets += [replace(each, name=f"{prefix}{split_component(each.name)[1]}") for each in targets]
            continue
        if route.old == route.new:
            result.targets += [replace(each, name=f"{prefix}{split_component(each.name)[1]}") for each in targets]
        else:
            models[owner] = route.table.name
            if _is_unusual(adapter.scheme, route):
                spellings[adapter.scheme] = {**find_texts(spellings, adapter.scheme), owner: route.old}
            _respell_component(prefix, targets, route, facts, known if isinstance(known, Mapping) else {}, result)
    provenance = {name: value for name, value in adapter.provenance.items() if name not in (FUSED, COMPONENT_KEY)}
    names_left = {target.name for target in result.targets}
    kept = {name: parts for name, parts in known.items() if name in names_left} if isinstance(known, Mapping) else {}
    if kept or result.fused:
        provenance[FUSED] = {**kept, **result.fused}
    provenance |= {key: memory for key, memory in ((MODEL_KEY, models), (SPELLING_KEY, spellings)) if memory}
    ordered = tuple(sorted(result.targets, key=lambda target: target.name))
    absorbed = (*adapter.absorbed, *result.absorbed)
    return replace(adapter, targets=ordered, provenance=provenance, absorbed=absorbed), result.problems


def _is_unusual(scheme: str, route: Route) -> bool:
    """Say whether a source used another spelling than the one that its scheme is written in."""
    names = route.table.schemes.get(scheme)
    return names is None or route.old in names.also


def _adopt(table: SpellingTable) -> str:
    """Return the component that names without one belong to; a text encoder may be any of several."""
    return table.components[0] if table.components and table.components[0] in DENOISERS else ""


def _respell_component(
    prefix: str,
    targets: Sequence[Target],
    route: Route,
    facts: BaseFacts,
    known: Mapping[str, JsonValue],
    result: Respelled,
) -> None:
    rows: dict[tuple[int, tuple[tuple[str, str], ...]], dict[int, Target]] = defaultdict(dict)
    places: dict[tuple[int, tuple[tuple[str, str], ...]], Place] = {}
    for target in targets:
        place = route.table.find(split_component(target.name)[1], route.old)[0]
        key = (id(place.row), place.numbers)
        rows[key][place.part] = target
        places[key] = place
    for key, parts in rows.items():
        place = places[key]
        if route.new not in place.row.paths:
            where = next(iter(parts.values())).name
            found = f"no name in {route.table.title} ({route.new})"
            result.problems.append(Problem("LF310", where, found, "a module that both spellings have"))
            continue
        paths = [f"{prefix}{path}" for path in place.write(route.new)]
        moved, problems = _move(place.row, parts, paths, route, facts, known, result)
        result.targets += moved
        result.problems += problems


def _move(
    row: ModuleRow,
    parts: Mapping[int, Target],
    paths: Sequence[str],
    route: Route,
    facts: BaseFacts,
    known: Mapping[str, JsonValue],
    result: Respelled,
) -> tuple[list[Target], list[Problem]]:
    """Return the targets of one row under their new names."""
    problems: list[Problem] = []
    plain: dict[int, Target] = {}
    for part, target in parts.items():
        plain[part], problem = reorder(target, row.order(route.old, part), facts, undo=True)
        problems += [problem] if problem else []
    old_count = len(row.paths[route.old])
    if old_count == 1 and len(paths) > 1:
        made = split(plain[0], row, paths, facts, known.get(plain[0].name))
    elif old_count > 1 and len(paths) == 1:
        made = fuse(plain, row, paths[0], facts)
        if made.targets:
            result.fused[paths[0]] = describe_parts(parts)
    else:
        made = Made({part: replace(target, name=paths[part]) for part, target in plain.items()})
    problems += made.problems
    result.absorbed += made.absorbed
    moved = []
    for part, target in made.targets.items():
        turned, problem = reorder(target, row.order(route.new, part), facts, undo=False)
        problems += [problem] if problem else []
        moved.append(replace(_rename_parameter(turned, row, route), fingerprint=None))
    problems += [
        Problem("LF319", target.name, "a fingerprint, which is bound to the target's name", severity="note")
        for target in parts.values()
        if target.fingerprint is not None
    ]
    return moved, problems


def _rename_parameter(target: Target, row: ModuleRow, route: Route) -> Target:
    """Give a saved parameter its name in the new spelling: `scale` of BFL's norms is `weight` elsewhere."""
    old, new = row.parameters.get(route.old, "weight"), row.parameters.get(route.new, "weight")
    if target.kind != "replace" or old == new or old not in target.factors:
        return target
    factors: dict[str, Factor] = {new if role == old else role: factor for role, factor in target.factors.items()}
    return replace(target, factors=factors)
