"""What the user says: `--map FILE`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from loraformat.bases import Site
from loraformat.errors import refuse
from loraformat.evidence import Lookup, MappedWeight
from loraformat.matching import Want, count_rows, cut_rows, find_expert
from loraformat.problems import Problem
from loraformat.site_index import Candidate
from loraformat.spans import read_small
from loraformat.strict_json import JsonValue, parse_json_object


class ExplicitMap:
    """The strategy `map`."""

    name = "map"
    order = 10

    def find(self, want: Want, lookup: Lookup) -> list[Candidate]:
        """Return the sites that read the weight which the map names."""
        mapped = lookup.clues.mapped.get((want.target.name, want.parameter))
        if mapped is None:
            return []
        sites = {site.id: site for site in lookup.sites if _is_meant(want, site, mapped)}
        cut = (cut_rows(site, want.change.slot, mapped.rows) for site in sites.values())
        # The user's word stands for the module that the site is of, not for what was folded into its numbers.
        named = (
            replace(site, module=want.target.name, evidence=self.name, obstacle=_find_obstacle(want, site, mapped))
            for site in cut
        )
        return [Candidate(site, self.name, self.name) for site in named]


def _find_obstacle(want: Want, site: Site, mapped: MappedWeight) -> Problem | None:
    if mapped.folded:
        return Problem("LF407", want.name, "multiplied by numbers, as the map says", "--base-checkpoint beside --map")
    return site.obstacle if site.obstacle is not None and site.obstacle.code == "LF407" else None


def _is_meant(want: Want, site: Site, mapped: MappedWeight) -> bool:
    if site.weight is None or site.weight.name != mapped.weight or site.section:
        return False
    if find_expert(site) != mapped.expert or (site.part is not None and not _is_whole_expert(site)):
        return False
    if want.change.slot not in site.transposed or (mapped.sites and site.id not in mapped.sites):
        return False
    return mapped.rows is None or mapped.rows[1] <= count_rows(site, want.change.slot)


def _is_whole_expert(site: Site) -> bool:
    assert site.weight is not None, "checked before"
    return find_expert(site) is not None and site.stored_shape() == site.weight.tensor.shape[1:]


def read_map(path: Path) -> Mapping[tuple[str, str], MappedWeight]:
    """Read a map of targets, as `loraformat resolve --json` prints it; LF422 for one that is not such a map.

    It is a JSON object with a list `targets` of objects: `target` and `weight` (names), and, where they are not given,
    `parameter` is `weight`, `sites` are all that read the weight, and `rows` (start and stop) are all of it. Of a
    tensor of packed experts `expert` says which.
    """
    listed = parse_json_object(read_small(path), path).get("targets")
    if not isinstance(listed, list):
        raise refuse("LF422", path, "no list `targets`", "a map as `loraformat resolve --json` prints it")
    mapped: dict[tuple[str, str], MappedWeight] = {}
    for index, entry in enumerate(listed):
        key, weight = _read_entry(entry, f"{path}: targets[{index}]")
        if key in mapped:
            raise refuse("LF422", f"{path}: targets[{index}]", f"{key[0]!r} once more", "each target once")
        mapped[key] = weight
    return mapped


def _read_entry(entry: JsonValue, where: str) -> tuple[tuple[str, str], MappedWeight]:
    found = entry if isinstance(entry, dict) else {}
    target, weight = found.get("target"), found.get("weight")
    parameter, sites, rows = found.get("parameter", "weight"), found.get("sites") or [], found.get("rows")
    if not (isinstance(target, str) and isinstance(weight, str) and isinstance(parameter, str)):
        raise refuse("LF422", where, "an entry without names", "`target` and `weight`, both strings")
    if not (isinstance(sites, list) and all(isinstance(site, str) for site in sites)):
        raise refuse("LF422", where, "`sites` that are none", "a list of strings")
    numbers = [number for number in rows if isinstance(number, int)] if isinstance(rows, list) else []
    if rows is not None and (len(numbers) != 2 or not 0 <= numbers[0] < numbers[1]):
        raise refuse("LF422", where, f"the rows {rows}", "start and stop")
    expert = found.get("expert")
    if expert is not None and (not isinstance(expert, int) or isinstance(expert, bool) or expert < 0):
        raise refuse("LF422", where, f"the expert {expert!r}", "a number")
    run = (numbers[0], numbers[1]) if numbers else None
    return (target, parameter), MappedWeight(
        weight, tuple(map(str, sites)), run, folded=found.get("folded") is True, expert=expert
    )


STRATEGY: Final = ExplicitMap()
