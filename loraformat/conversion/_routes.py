"""Which table, and which of its spellings, the names of one component are of: what speaks for one of several."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from loraformat.adapter import Target
from loraformat.base_facts import BaseFacts
from loraformat.kinds import KINDS
from loraformat.problems import Problem
from loraformat.schemes._naming import split_component
from loraformat.spellings import Reading, SpellingTable, read_names
from loraformat.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class Route:
    """From one spelling of a table to another."""

    table: SpellingTable
    old: str
    new: str


def choose_route(
    component: str,
    targets: Sequence[Target],
    speller: Callable[[Reading], str | None],
    facts: BaseFacts,
    remembered: JsonValue,
) -> tuple[Route | None, Problem | None]:
    """Return the route for the names of one component, or why none can be chosen."""
    known = [
        reading
        for reading in read_names(
            (split_component(target.name)[1] for target in targets), architecture=facts.architecture
        )
        if _may_be(reading, component)
    ]
    spelled = [(reading, speller(reading)) for reading in known if not reading.missed]
    routes = [Route(reading.table, reading.spelling, new) for reading, new in spelled if new is not None]
    if not routes:
        return None, _find_doubled([each for each in known if speller(each) is not None], targets)
    unchanged = [route for route in routes if route.old == route.new]
    settled = {route.table.name for route in unchanged}  # The names agree in the other spellings of these tables.
    routes = [route for route in routes if route in unchanged or route.table.name not in settled]
    if unchanged and len(unchanged) == len(routes):
        return unchanged[0], None
    tests = (
        *(_by_name(remembered), _by_class(facts), _by_inputs(targets)),
        *(_by_rows(targets), _by_aspect(targets), _by_width(targets)),
    )
    for test in tests:
        chosen = [route for route in routes if test(route)]
        routes = chosen or routes
    if len({route.table.name for route in routes}) > 1 and not _agree(routes, targets):
        found = " or ".join(sorted(route.table.title for route in routes))
        return None, Problem("LF316", component or "the names", found, "names of one model")
    return (routes[0] if routes else None), None


def _find_doubled(readings: Sequence[Reading], targets: Sequence[Target]) -> Problem | None:
    """Return what stands against names in two spellings of one table where they are about one weight, such as q."""
    seen: dict[tuple[int, tuple[tuple[str, str], ...]], tuple[str, tuple[str, ...]]] = {}
    for reading in readings:
        for target in targets:
            for place in reading.table.find(split_component(target.name)[1], reading.spelling):
                names = place.write(reading.spelling)
                other, others = seen.setdefault((id(place.row), place.numbers), (target.name, names))
                if others != names:
                    mend = "Keep the fused module or its parts, or add the parts' change to the fused one."
                    return Problem("LF302", target.name, f"a weight that {other} changes too", "one of the two", mend)
    return None


def _agree(routes: Sequence[Route], targets: Sequence[Target]) -> bool:
    """Say whether all routes give all targets the same names, rows and orders: HunyuanVideo's blocks are FLUX.1's."""
    paths = {split_component(target.name)[1] for target in targets}
    return all(len({_describe(route, path) for route in routes}) == 1 for path in paths)


def _describe(route: Route, path: str) -> tuple[object, ...]:
    """Return what a route makes of a path."""
    place = route.table.find(path, route.old)[0]
    row = place.row
    if route.new not in row.paths:
        return (route.table.name,)
    orders = [row.order(spelling, place.part) for spelling in (route.old, route.new)]
    parameters = [row.parameters.get(spelling, "weight") for spelling in (route.old, route.new)]
    return place.part, place.write(route.new), place.write(route.old), row.shares, *orders, *parameters


def _may_be(reading: Reading, component: str) -> bool:
    return not component or component == "diffusion_model" or component in reading.table.components


def _by_name(remembered: JsonValue) -> Callable[[Route], bool]:
    return lambda route: route.table.name == remembered


def _by_class(facts: BaseFacts) -> Callable[[Route], bool]:
    return lambda route: bool(facts.architecture) and facts.architecture in route.table.classes


def _by_inputs(targets: Sequence[Target]) -> Callable[[Route], bool]:
    """Keep routes whose tables have modules of as many inputs as each target, or do not say how many they have."""
    shapes = [_shape_of(target) for target in targets]
    inputs = {shape[1] for shape in shapes if len(shape) > 1}
    return lambda route: not route.table.inputs or inputs <= route.table.inputs


def _by_width(targets: Sequence[Target]) -> Callable[[Route], bool]:
    widths = {factor.shape[1] for target in targets for factor in target.factors.values() if len(factor.shape) > 1}
    return lambda route: bool(route.table.widths & widths)


def _by_rows(targets: Sequence[Target]) -> Callable[[Route], bool]:
    """Keep routes whose tables divide the rows of every module: FLUX.1's linear1 by 7, that of FLUX.2 by 9."""
    return lambda route: all(not rows % aspect[0] for aspect, rows, _ in _measure(targets, route))


def _by_aspect(targets: Sequence[Target]) -> Callable[[Route], bool]:
    """Keep routes whose tables know every module's proportion of rows to columns."""
    return lambda route: all(rows * own[1] == columns * own[0] for own, rows, columns in _measure(targets, route))


def _measure(targets: Sequence[Target], route: Route) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Yield the aspect of each module of which the table says it, with the rows and columns of the adapter."""
    for target in targets:
        row = route.table.find(split_component(target.name)[1], route.old)[0].row
        shape = _shape_of(target) if row.aspect and len(row.paths[route.old]) == 1 else ()
        if len(shape) > 1:
            yield row.aspect, shape[0], shape[1]


def _shape_of(target: Target) -> tuple[int, ...]:
    """Return the shape of the weight that a target changes, empty where its factors do not tell."""
    kind = KINDS.find(target.kind)
    if kind is None or kind.check(target):
        return ()
    return next((change.shape for change in kind.changes(target) if change.parameter == "weight"), ())
