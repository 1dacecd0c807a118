"""An adapter of a diffusion model under the names that a base has: the original repository's, or diffusers'."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from loraformat.adapter import Adapter
from loraformat.bases import BaseModel
from loraformat.loading import find_facts
from loraformat.problems import Problem
from loraformat.schemes._by_heads import find_fused
from loraformat.schemes._naming import DENOISERS, split_component
from loraformat.spellings import Reading, read_names

_CODE: Final = "LF325"
_MAIN: Final = DENOISERS | {""}
"""Components that are the model itself; a PEFT folder has no word for it."""


def spell_for_base(adapter: Adapter, base: BaseModel) -> Adapter:
    """Return the adapter with its modules spelled as the base has them, if that finds the whole UNet or transformer.

    Where the base has its names, or not all of them in one other spelling, it is returned as it is; with what stands
    against it, where the base has all of them, but one weight for parts that cannot be joined.
    """
    paths = list(_list_paths(adapter))
    if not paths:
        return adapter
    facts = find_facts(base)
    if facts.modules.issuperset(paths):
        return _warn_of_order(adapter)
    routes = {
        names: (reading, spelling)
        for reading in read_names(paths)
        if not reading.missed and DENOISERS.intersection(reading.table.components)
        for spelling in reading.table.spellings
        if (names := _write(paths, reading, spelling)) is not None and names <= facts.modules
    }
    if len(routes) != 1:
        return _warn_of_order(adapter)
    from loraformat.conversion import (
        respell_by,  # here: most adapters are of language models, and need no room of names
    )

    ((known, new),) = routes.values()

    def spell(reading: Reading, component: str) -> str | None:
        is_known = reading.table is known.table and reading.spelling == known.spelling
        return new if is_known and component in _MAIN else None

    spelled, problems = respell_by(adapter, spell, facts)
    errors = tuple(problem for problem in problems if problem.severity == "error")
    if errors:  # The base has the modules, in a spelling in which the adapter cannot be.
        return replace(adapter, problems=(*adapter.problems, *errors))
    return replace(spelled, problems=(*adapter.problems, _report(paths, spelled)))


def _warn_of_order(adapter: Adapter) -> Adapter:
    """Say where rows of the base may stand in another order than the adapter's."""
    fused = find_fused(adapter)
    if not fused:
        return adapter
    found = f"{len(fused)} modules such as {min(fused)}"
    warning = Problem("LF329", adapter.source, found, "q, k and v one below the other", severity="warning")
    return replace(adapter, problems=(*adapter.problems, warning))


def _list_paths(adapter: Adapter) -> Iterator[str]:
    split = (split_component(target.name) for target in adapter.targets)
    return (path for component, path in split if component in _MAIN)


def _write(paths: list[str], reading: Reading, spelling: str) -> frozenset[str] | None:
    """Return the paths in another spelling, None where it lacks some of them."""
    places = [place for path in paths for place in reading.table.find(path, reading.spelling)]
    if not all(spelling in place.row.paths for place in places):
        return None
    return frozenset(name for place in places for name in place.write(spelling))


def _report(paths: list[str], spelled: Adapter) -> Problem:
    found = f"{len(paths)} modules such as {min(paths)}; the base has {min(_list_paths(spelled))}"
    return Problem(_CODE, spelled.source, found, "the base's own names", severity="note")
