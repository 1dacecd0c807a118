"""What the user says: `--map FILE`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from loraformat.bases import Site
from loraformat.errors import refuse
from loraformat.evidence import Lookup, MappedWeight
from loraformat.matching import Want, count_rows, cut_rows, find_expert
from loraformat.matching.site_index import Candidate
from loraformat.problems import Problem
from loraformat.spans import Part, read_small
from loraformat.strict_json import JsonValue, parse_json_object


class ExplicitMap:
    """The strategy `map`."""

    name = "map"
    order = 10

    def find(self, want: Want, lookup: Lookup) -> list[Candidate]:
        """Return the sites that read the weights which the map names."""
        mapped = lookup.clues.mapped.get((want.target.name, want.parameter), ())
        found = (_point(want, site, each) for each in mapped for site in _list_meant(want, lookup.sites, each))
        return [Candidate(site, self.name, self.name) for site in found]


def _list_meant(want: Want, sites: Sequence[Site], mapped: MappedWeight) -> list[Site]:
    """Return the sites that the map means, each once, with all of the stored matrix or of the expert's."""
    meant = (_widen(site) for site in sites if _is_meant(want, site, mapped))
    kept = {site.id: site for site in meant if site is not None}.values()
    slot, rows = want.change.slot, mapped.rows
    return [site for site in kept if rows is None or rows[1] <= count_rows(site, slot)]


def _point(want: Want, site: Site, mapped: MappedWeight) -> Site:
    """Return the site of the target's rows.

    The user's word stands for the module that the site is of, not for what was folded into its numbers.
    """
    cut, obstacle = cut_rows(site, want.change.slot, mapped.rows), _find_obstacle(want, site, mapped)
    name = want.target.name
    return replace(cut, module=name, evidence=STRATEGY.name, section=mapped.section, obstacle=obstacle)


def _find_obstacle(want: Want, site: Site, mapped: MappedWeight) -> Problem | None:
    if mapped.folded:
        return Problem("LF407", want.name, "multiplied by numbers, as the map says", "--base-checkpoint beside --map")
    return site.obstacle if site.obstacle is not None and site.obstacle.code == "LF407" else None


def _is_meant(want: Want, site: Site, mapped: MappedWeight) -> bool:
    if site.weight is None or site.weight.name not in (mapped.weight, *mapped.copies):
        return False
    if find_expert(site) != mapped.expert or want.change.slot not in site.transposed:
        return False
    if mapped.transposed is not None and site.transposed[want.change.slot] != mapped.transposed:
        return False
    return not mapped.sites or site.id in mapped.sites


def _widen(site: Site) -> Site | None:
    """Return a site of all of a stored matrix, or of an expert's, without padding; None for a site of some rows."""
    assert site.weight is not None, "chosen so"
    expert, part = find_expert(site), site.part
    if part is None:
        return site
    if expert is not None:
        height = site.weight.tensor.shape[1]
        rows = (expert * height, (expert + 1) * height, 1)
        return replace(site, part=replace(part, rows=rows, columns=(0, part.matrix[1], 1)))
    padding = site.weight.coding.padding if site.weight.coding is not None else 0
    return site if part == Part(part.matrix, (0, part.matrix[0], 1), (0, part.matrix[1] - padding, 1)) else None


def read_map(path: Path) -> Mapping[tuple[str, str], Sequence[MappedWeight]]:
    """Read a map of targets, as `loraformat resolve --json` prints it; LF422 for one that is not such a map.

    It is a JSON object with a list `targets` of objects: `target` and `weight` (names), and, where they are not given,
    `parameter` is `weight`, `sites` are all that read the weight, and `rows` (start, stop, and step where it is not 1)
    are all of it. Of a tensor of packed experts `expert` says which. A target that lies in several pieces stands once
    for each, with the `section` (start and stop) of its own rows that the piece has.
    """
    listed = parse_json_object(read_small(path), path).get("targets")
    if not isinstance(listed, list):
        raise refuse("LF422", path, "no list `targets`", "a map as `loraformat resolve --json` prints it")
    mapped: dict[tuple[str, str], list[MappedWeight]] = {}
    for index, entry in enumerate(listed):
        key, weight = _read_entry(entry, f"{path}: targets[{index}]")
        known = mapped.setdefault(key, [])
        beside = [each for each in known if _name_graph(each) == _name_graph(weight)]
        if any(weight.section is None or each.section in (None, weight.section) for each in beside):
            expected = "each target once, or each `section` of it"
            raise refuse("LF422", f"{path}: targets[{index}]", f"{key[0]!r} once more", expected)
        known.append(weight)
    return mapped


def _name_graph(mapped: MappedWeight) -> str:
    """Return the file that a weight of a folder of several models is in; nothing for another base's."""
    found = _IN_GRAPH.search(mapped.weight)
    return mapped.weight[: found.end()] if found else ""


def _read_entry(entry: JsonValue, where: str) -> tuple[tuple[str, str], MappedWeight]:
    found = entry if isinstance(entry, dict) else {}
    target, weight, parameter = found.get("target"), found.get("weight"), found.get("parameter", "weight")
    if not (isinstance(target, str) and isinstance(weight, str) and isinstance(parameter, str)):
        raise refuse("LF422", where, "an entry without names", "`target` and `weight`, both strings")
    expert = found.get("expert")
    if expert is not None and (not isinstance(expert, int) or isinstance(expert, bool) or expert < 0):
        raise refuse("LF422", where, f"the expert {expert!r}", "a number")
    turned = found.get("transposed")
    rows, section = _read_run(found, "rows", where, _RUN), _read_run(found, "section", where, _RUN[:1])
    mapped = MappedWeight(
        weight,
        _read_names(found, "sites", where),
        rows,
        folded=found.get("folded") is True,
        expert=expert,
        section=(section[0], section[1]) if section else None,
        copies=_read_names(found, "copies", where),
        transposed=turned if isinstance(turned, bool) else None,
    )
    return (target, parameter), mapped


def _read_names(entry: Mapping[str, JsonValue], key: str, where: str) -> tuple[str, ...]:
    names = entry.get(key) or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise refuse("LF422", where, f"`{key}` that are none", "a list of strings")
    return tuple(map(str, names))


def _read_run(entry: Mapping[str, JsonValue], key: str, where: str, lengths: Sequence[int]) -> tuple[int, ...] | None:
    """Return start and stop, and a step where one may stand; None for none."""
    given = entry.get(key)
    if given is None:
        return None
    numbers = [each for each in given if type(each) is int] if isinstance(given, list) else []
    sound = isinstance(given, list) and len(numbers) == len(given) and len(given) in lengths
    if not sound or not 0 <= numbers[0] < numbers[1] or min(numbers[2:], default=1) < 1:
        raise refuse("LF422", where, f"the {key} {given}", "start and stop")
    return tuple(numbers)


_RUN: Final = (2, 3)
_IN_GRAPH: Final = re.compile(r"\.(?:onnx|safetensors|bin):")
STRATEGY: Final = ExplicitMap()
