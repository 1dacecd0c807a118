"""A model whose adapters are inputs: it runs without any, and with whichever a run is given."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Unpack

from loraformat.apply.placing import Place, check_places, make_folders, open_place
from loraformat.arguments import (
    AdapterArguments,
    AdapterOptions,
    HintOptions,
    StrPath,
    check_options,
    read_hints,
    weigh_adapters,
)
from loraformat.bases._onnx.branchable import BranchableGraph
from loraformat.bases._onnx.extension import Addition, Extension
from loraformat.bases.onnx_graph import OnnxGraph
from loraformat.engine.sinks import FileSink, put_image
from loraformat.errors import error_for, refuse
from loraformat.images import NewOutput
from loraformat.loading import list_files
from loraformat.output_forms import require_shared
from loraformat.outputs import PendingOutput, check_apart, check_output
from loraformat.plan import SHARE
from loraformat.problems import Problem
from loraformat.receipt import RUNTIME_KEY
from loraformat.runtime.adapters import ExportedAdapter
from loraformat.runtime.batched import build_batched, build_sizes, describe_index
from loraformat.runtime.branches import Branch, build_branch, describe_inputs
from loraformat.runtime.chains import Names
from loraformat.runtime.factors import Pair, write_pairs
from loraformat.runtime.grouping import plan_branches
from loraformat.runtime.judging import Judge, find_caveats
from loraformat.runtime.layouts import RuntimeInputs
from loraformat.runtime.opening import open_model
from loraformat.runtime.targets import ServedAdapter, ServeOptions, serve

if TYPE_CHECKING:
    import onnx

_LEAST_IR: Final = 4
"""The first version of ONNX's format in which an initializer need not be an input: one that is, is a default."""


class ExportOptions(AdapterOptions, HintOptions, ServeOptions, total=False):
    """All options of `export_runtime`.

    Attributes:
        adapters_out: a folder for the adapters too, as `NAME.onnx_adapter` each; in a model with slots they are one
            stack, `stack.onnx_adapter`. It is made if it is missing.
        batched: how many adapters the rows of a batch choose from; 0 where all rows of a run have one.
        accept_ranges: accept activation ranges of a quantised model that were measured on the base.
        external_data: `share` has the model refer to the base's data files, beside which it must stand; else they are
            copied.
        force: replace an existing output.
        durable: wait until the disk has the bytes before the output is moved into place.
    """

    adapters_out: StrPath | None
    batched: int
    accept_ranges: bool
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
        adapters: the adapters' own files, where they were asked for.
        left_out: names of targets that were left out, as allowed.
        problems: warnings and notes.
    """

    output: str
    inputs: RuntimeInputs
    served: Mapping[str, int]
    adapters: tuple[ExportedAdapter, ...]
    left_out: tuple[str, ...]
    problems: tuple[Problem, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        return {
            "output": self.output,
            **self.inputs.as_json(),
            "served": dict(self.served),
            "adapters": [each.as_json() for each in self.adapters],
            "left_out": list(self.left_out),
            "problems": [dict(problem.as_json()) for problem in self.problems],
        }


def export_runtime(
    base: StrPath, targets_of: AdapterArguments, output: StrPath, **options: Unpack[ExportOptions]
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
    check_options("export_runtime", options, ExportOptions)
    opened = open_model(base)
    graph = opened.as_branchable()
    _check_base(opened, graph)
    hints = read_hints(options)
    weighted = weigh_adapters(targets_of, options, opened)
    if not weighted:
        raise refuse("LF401", opened.path, "no adapter whose targets are to have inputs", "at least one")
    judge = Judge(graph, batched=bool(options.get("batched")))
    served = [serve(opened, graph.sites, item, hints, options, judge.judge) for item in weighted]
    caveats = find_caveats(served, accepted=options.get("accept_ranges", False))
    if any(problem.severity == "error" for problem in caveats):
        raise error_for(caveats)
    branches = plan_branches(graph, served)
    inputs, extension = _extend(graph, branches, options.get("batched", 0), judge.list_sequences())
    place = Path(output)
    share = _check_sharing(opened, place, options.get("external_data"))
    fresh = sha256(inputs.as_text().encode()).hexdigest()[:8]
    images = graph.describe_images(NewOutput(place, 0, fresh), extension, share=share)
    for item in weighted:
        check_apart(place, [file.path for file in list_files(item.adapter)])
    durable, force = options.get("durable", False), options.get("force", False)
    folder = options.get("adapters_out")
    stacks = _list_stacks(Path(folder), branches, served, inputs) if folder is not None else []
    _write(Place(place, "", opened, images, force, durable), opened, stacks)
    found = (*(problem for each in served for problem in each.problems), *caveats, *judge.list_doubts())
    reached = {each.name: len(each.served) for each in served}
    left_out = tuple(name for each in served for name in each.left_out)
    return RuntimeExport(str(place), inputs, reached, tuple(stack.report for stack in stacks), left_out, found)


@dataclass(frozen=True, slots=True)
class _Stack:
    """An adapter's own file, yet to be written."""

    report: ExportedAdapter
    pairs: Sequence[Pair]


def _list_stacks(
    folder: Path, branches: Sequence[Branch], served: Sequence[ServedAdapter], inputs: RuntimeInputs
) -> list[_Stack]:
    """Return the adapters as they are written beside the model."""
    if inputs.batched and len(served) > inputs.batched:
        raise refuse("LF829", folder, f"{len(served)} adapters", f"at most {inputs.batched}, one for each slot")
    names = [each.name for each in served]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None and not inputs.batched:
        raise refuse("LF601", folder, f"several adapters called {twice}", "a name for each")
    groups = [("stack", served)] if inputs.batched else [(each.name, [each]) for each in served]
    return [_make_stack(folder / f"{name}.onnx_adapter", branches, group, inputs) for name, group in groups]


def _make_stack(
    path: Path, branches: Sequence[Branch], served: Sequence[ServedAdapter], inputs: RuntimeInputs
) -> _Stack:
    pairs: list[Pair] = []
    for branch in branches:
        found = [[each for each in adapter.served if each in branch.changes] for adapter in served]
        if any(found):
            pairs.append(Pair(branch.layout, inputs.slots, found))
    ranks = {pair.layout.name: pair.rank for pair in pairs}
    return _Stack(ExportedAdapter(str(path), tuple(each.name for each in served), ranks, (), ()), pairs)


def _check_base(base: OnnxGraph, graph: BranchableGraph) -> None:
    if graph.read_metadata(RUNTIME_KEY) is not None:
        raise refuse("LF822", base.path, "a model with run-time inputs", "the base that it was made from")
    errors = [problem for problem in base.problems if problem.severity == "error"]
    if errors:
        raise error_for(errors)
    if graph.ir_version < _LEAST_IR:
        raise refuse("LF824", base.path, f"IR version {graph.ir_version}", f"at least {_LEAST_IR}")


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


def _write(place: Place, base: OnnxGraph, stacks: Sequence[_Stack]) -> None:
    """Write the model and the adapters' files; they appear when all are whole."""
    check_places([place])
    paths = [Path(stack.report.output) for stack in stacks]
    with make_folders(paths):
        for path in paths:
            check_output(path, [file.path for file in base.files], force=place.force)
        with open_place(place) as pending, PendingOutput(paths, force=place.force, durable=place.durable) as beside:
            for stack, descriptor in zip(stacks, beside.descriptors, strict=True):
                write_pairs(descriptor, stack.pairs)
            for image, descriptor in zip(place.images, pending.descriptors, strict=True):
                put_image(FileSink(descriptor, image.path), image)
            for file in base.files:
                file.check_unchanged()
            beside.commit()
            pending.commit()


def _extend(
    base: BranchableGraph, branches: Sequence[Branch], batched: int, sequences: frozenset[str]
) -> tuple[RuntimeInputs, Extension]:
    """Return what a model will say of its inputs, and what is put into it."""
    names = Names(base.list_names())
    inputs = RuntimeInputs(batched, tuple(branch.layout for branch in branches))
    described = [pair for layout in inputs.layouts for pair in describe_inputs(layout, inputs.slots)]
    if batched:
        described.append(describe_index(inputs.slots))
    for value, _ in described:
        if names.take(value.name) != value.name:
            raise refuse("LF826", base.path, f"a value called {value.name!r}", "a name that is free for an input")
    nodes, constants, built = _build(branches, names, batched, sequences)
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
    branches: Sequence[Branch], names: Names, batched: int, sequences: frozenset[str]
) -> "tuple[Sequence[onnx.NodeProto], Sequence[onnx.TensorProto], list[tuple[Branch, list[Addition]]]]":
    """Return nodes and constants that all branches share, and the nodes of each."""
    if not batched:
        return [], [], [(branch, build_branch(branch, names)) for branch in branches]
    sizes = build_sizes(branches, names, sequences)
    built = [(branch, build_batched(branch, names, sizes)) for branch in branches]
    return sizes.nodes, sizes.constants, built


def _list_marks(added: Sequence[Addition]) -> tuple[str, ...]:
    """Return, for each node beside which something is added, a value that only it makes, as it will be called."""
    return tuple(
        each.before if each.opening.maker is each.opening.visit else each.opening.visit.node.output[0] for each in added
    )
