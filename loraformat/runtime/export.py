"""A model whose adapters are inputs: it runs without any, and with whichever a run is given."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Unpack, cast

from loraformat.arguments import AdapterArgument, AdapterOptions, HintOptions, StrPath, read_hints, weigh_adapters
from loraformat.bases._onnx_extension import Addition, Extension
from loraformat.bases._onnx_openings import Opening
from loraformat.bases.onnx_graph import OnnxGraph
from loraformat.errors import error_for, refuse
from loraformat.loading import list_files
from loraformat.output_forms import require_shared
from loraformat.outputs import check_apart
from loraformat.placing import Place, check_places, open_place
from loraformat.plan import SHARE
from loraformat.problems import Problem
from loraformat.runtime.batched import build_batched, build_sizes, describe_index, refuse_batched
from loraformat.runtime.branches import Branch, Names, build_branch, describe_inputs, name_form
from loraformat.runtime.layouts import RUNTIME_KEY, Layout, RuntimeInputs
from loraformat.runtime.opening import open_model
from loraformat.runtime.targets import Served, ServedAdapter, ServeOptions, serve
from loraformat.sinks import FileSink, put_image

if TYPE_CHECKING:
    import onnx

_LEAST_IR: Final = 4
"""The first version of ONNX's format in which an initializer need not be an input: one that is, is a default."""


class ExportOptions(AdapterOptions, HintOptions, ServeOptions, total=False):
    """All options of `export_runtime`.

    Attributes:
        batched: how many adapters the rows of a batch choose from; 0 where all rows of a run have one.
        external_data: `share` has the model refer to the base's data files, beside which it must stand; else they are
            copied.
        force: replace an existing output.
        durable: wait until the disk has the bytes before the output is moved into place.
    """

    batched: int
    external_data: str | None
    force: bool
    durable: bool


@dataclass(frozen=True, slots=True)
class RuntimeExport:
    """A model with run-time inputs, as it was written.

    Attributes:
        output: its path.
        inputs: what was added.
        served: for each adapter that was named, how many of its changes have an input.
        left_out: names of targets that were left out, as allowed.
        problems: warnings and notes.
    """

    output: str
    inputs: RuntimeInputs
    served: Mapping[str, int]
    left_out: tuple[str, ...]
    problems: tuple[Problem, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        return {
            "output": self.output,
            **self.inputs.as_json(),
            "served": dict(self.served),
            "left_out": list(self.left_out),
            "problems": [dict(problem.as_json()) for problem in self.problems],
        }


def export_runtime(
    base: StrPath, targets_of: Sequence[AdapterArgument], output: StrPath, **options: Unpack[ExportOptions]
) -> RuntimeExport:
    """Write an ONNX model that takes adapters as inputs, and runs as the base does without them.

    For every target of the adapters it has two inputs A and B with defaults of no numbers, and the nodes that add x·A·B
    to what the target's module makes. All else of the graph, and the weights, are those of the base. `export_adapter`
    writes adapters for it.

    Args:
        base: the ONNX model.
        targets_of: adapters, paths or loaded, for whose targets there are to be inputs.
        output: where the model goes.
        options: `ExportOptions` says what there is.

    Raises:
        LoraformatError: with every target that cannot be served, by name; nothing is written then.
    """
    opened = open_model(base)
    _check_base(opened)
    hints = read_hints(cast(HintOptions, options))
    weighted = weigh_adapters(targets_of, options, opened)
    own = cast(ServeOptions, {name: each for name, each in options.items() if name in ServeOptions.__annotations__})
    served = [serve(opened, item, hints, own) for item in weighted]
    inputs, extension = _extend(opened, plan_branches(opened, served), options.get("batched", 0))
    place = Path(output)
    share = _check_sharing(opened, place, options.get("external_data"))
    fresh = sha256(inputs.as_text().encode()).hexdigest()[:8]
    images = opened.describe_extended_images(place, extension, fresh, share=share)
    for item in weighted:
        check_apart(place, [file.path for file in list_files(item.adapter)])
    durable, force = options.get("durable", False), options.get("force", False)
    _write(Place(place, "", opened, images, force, durable), opened)
    return RuntimeExport(
        str(place),
        inputs,
        {each.name: len(each.served) for each in served},
        tuple(name for each in served for name in each.left_out),
        tuple(problem for each in served for problem in each.problems),
    )


def _check_base(base: OnnxGraph) -> None:
    if base.read_metadata(RUNTIME_KEY) is not None:
        raise refuse("LF822", base.path, "a model with run-time inputs", "the base that it was made from")
    errors = [problem for problem in base.problems if problem.severity == "error"]
    if errors:
        raise error_for(errors)
    if base.ir_version < _LEAST_IR:
        raise refuse("LF824", base.path, f"IR version {base.ir_version}", f"at least {_LEAST_IR}")


def _check_sharing(base: OnnxGraph, output: Path, asked: str | None) -> bool:
    """Return whether data files are shared; LF444 where that was asked for and cannot be."""
    if asked not in (None, "copy", SHARE):
        raise refuse("LF444", "--external-data", str(asked), f"copy or {SHARE}")
    if asked != SHARE:
        return False
    require_shared(base)
    if output.absolute().parent.resolve() != base.path.absolute().parent.resolve():
        raise refuse("LF444", output, f"an output outside {base.path.parent}", "one beside the base, whose data it has")
    return True


def _write(place: Place, base: OnnxGraph) -> None:
    check_places([place])
    with open_place(place) as pending:
        for image, descriptor in zip(place.images, pending.descriptors, strict=True):
            put_image(FileSink(descriptor, image.path), image)
        for file in base.files:
            file.check_unchanged()
        pending.commit()


@dataclass(slots=True)
class _Group:
    """Changes that act on the same nodes.

    Attributes:
        openings: the nodes, by where they stand.
        found: the changes.
    """

    openings: Mapping[tuple[str, int], Opening]
    found: list[Served] = field(default_factory=list)


def plan_branches(base: OnnxGraph, adapters: Sequence[ServedAdapter]) -> list[Branch]:
    """Return a branch for all nodes that changes of the adapters act on; LF820, LF826 where there can be none."""
    groups: dict[frozenset[tuple[str, int]], _Group] = {}
    problems: list[Problem] = []
    for change in (change for adapter in adapters for change in adapter.served):
        openings: dict[tuple[str, int], Opening] = {}
        for site in change.sites:
            opening = base.find_opening(site)
            if isinstance(opening, Problem):
                where = f"{change.target.name} at {opening.where}"
                problems.append(replace(opening, where=where))
            else:
                openings[opening.place] = opening
        groups.setdefault(frozenset(openings), _Group(openings)).found.append(change)
    if problems:
        raise error_for(problems)
    problems = _find_overlaps(list(groups.values()))
    if problems:
        raise error_for(problems)
    names = Names(set())
    return sorted((_make_branch(base, group, names) for group in groups.values()), key=lambda each: each.layout.name)


def _find_overlaps(groups: Sequence[_Group]) -> list[Problem]:
    """Return a problem where changes act on some nodes together and on others apart."""
    owners: dict[tuple[str, int], _Group] = {}
    problems = []
    for group in groups:
        for place in group.openings:
            other = owners.setdefault(place, group)
            if other is not group:
                where = f"{other.found[0].target.name} and {group.found[0].target.name}"
                found = f"both act on the node at {place[1]} of the {place[0]}, and on others apart"
                problems.append(Problem("LF826", where, found, "the same nodes for both"))
    return problems


def _make_branch(base: OnnxGraph, group: _Group, names: Names) -> Branch:
    openings = tuple(group.openings[place] for place in sorted(group.openings))
    first = group.found[0]
    forms = {(name_form(opening.product), opening.dtype.name) for opening in openings}
    sizes = {(each.change.shape[1:], each.out) for each in group.found}
    if len(forms) != 1 or len(sizes) != 1:
        found = f"nodes of {len(forms)} kinds and {len(sizes)} shapes"
        raise refuse("LF826", first.target.name, found, "nodes that are of one kind")
    layout = Layout(
        names.take(_name_branch(base, first)),
        name_form(openings[0].product),
        openings[0].dtype,
        first.change.shape[1],
        first.out,
        tuple(first.change.shape[2:]),
    )
    return Branch(layout, openings)


def _name_branch(base: OnnxGraph, served: Served) -> str:
    """Return the target's name; where the node is of several modules, or of a part of one, the name that it has."""
    if served.is_whole:
        return served.target.name
    here = [site for site in base.sites if site.id == served.sites[0].id]
    whole = next((site.module for site in here if site.module and site.weight and site.weight.name), "")
    return whole or served.target.name


def _extend(base: OnnxGraph, branches: Sequence[Branch], batched: int) -> tuple[RuntimeInputs, Extension]:
    """Return what a model will say of its inputs, and what is put into it."""
    names = Names(base.list_names())
    inputs = RuntimeInputs(batched, tuple(branch.layout for branch in branches))
    described = [pair for layout in inputs.layouts for pair in describe_inputs(layout, inputs.slots)]
    if batched:
        described.append(describe_index(inputs.slots))
    for value, _ in described:
        if names.take(value.name) != value.name:
            raise refuse("LF826", base.path, f"a value called {value.name!r}", "a name that is free for an input")
    nodes, constants, built = _build(branches, names, batched)
    marked = [replace(branch.layout, marks=_list_marks(added)) for branch, added in built]
    twice = [mark for mark, count in Counter(mark for each in marked for mark in each.marks).items() if count > 1]
    if twice:
        found = f"two nodes, in graphs apart, that both make a value {twice[0]!r}"
        raise refuse("LF826", base.path, found, "names that are a node's own")
    inputs = replace(inputs, layouts=tuple(marked))
    additions = [each for _, added in built for each in added]
    values, defaults = zip(*described, strict=True)
    metadata = {RUNTIME_KEY: inputs.as_text()}
    return inputs, Extension(additions, nodes, values, [*defaults, *constants], metadata)


def _build(
    branches: Sequence[Branch], names: Names, batched: int
) -> "tuple[Sequence[onnx.NodeProto], Sequence[onnx.TensorProto], list[tuple[Branch, list[Addition]]]]":
    """Return nodes and constants that all branches share, and the nodes of each."""
    if not batched:
        return [], [], [(branch, build_branch(branch, names)) for branch in branches]
    problems = [problem for branch in branches if (problem := refuse_batched(branch)) is not None]
    if problems:
        raise error_for(problems)
    sizes = build_sizes(branches, names)
    built = [(branch, build_batched(branch, names, sizes)) for branch in branches]
    return sizes.nodes, sizes.constants, built


def _list_marks(added: Sequence[Addition]) -> tuple[str, ...]:
    """Return, for each node beside which something is added, a value that only it makes, as it will be called."""
    return tuple(
        each.before if each.opening.maker is each.opening.visit else each.opening.visit.node.output[0] for each in added
    )
