"""Adapters for a model with run-time inputs: the arrays that go into them, and `.onnx_adapter` files of these."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Unpack

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
from loraformat.bases.onnx_graph import OnnxGraph
from loraformat.errors import refuse
from loraformat.loading import list_files
from loraformat.outputs import PendingOutput, check_output
from loraformat.plan import WeightedAdapter
from loraformat.problems import Problem
from loraformat.runtime.factors import Array, Pair, write_pairs
from loraformat.runtime.grouping import restore_members
from loraformat.runtime.layouts import Layout, RuntimeInputs, read_inputs
from loraformat.runtime.opening import open_model
from loraformat.runtime.targets import Served, ServedAdapter, ServeOptions, serve

_LISTED: Final = 8


class AdapterExportOptions(AdapterOptions, HintOptions, ServeOptions, total=False):
    """All options of `export_adapter`.

    Attributes:
        force: replace an existing output.
    """

    force: bool


@dataclass(frozen=True, slots=True)
class ExportedAdapter:
    """An `.onnx_adapter` file, as it was written.

    Attributes:
        output: its path.
        adapters: the names of what is in it, in order; in a stack the first is slot 0.
        ranks: the rank of each pair of inputs that it fills, by the pair's name.
        left_out: names of targets that were left out, as allowed.
        problems: warnings and notes.
    """

    output: str
    adapters: tuple[str, ...]
    ranks: Mapping[str, int]
    left_out: tuple[str, ...]
    problems: tuple[Problem, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`."""
        return {
            "output": self.output,
            "adapters": list(self.adapters),
            "ranks": dict(self.ranks),
            "left_out": list(self.left_out),
            "problems": [dict(problem.as_json()) for problem in self.problems],
        }


def export_adapter(
    model: StrPath, adapters: AdapterArguments, output: StrPath, **options: Unpack[AdapterExportOptions]
) -> ExportedAdapter:
    """Write adapters as one file that onnxruntime loads for a model with run-time inputs.

    Where all rows of a run have one adapter, several are added up: their ranks are, and nothing is rounded that would
    not be. In a model with slots each is one of the stack, the first slot 0.

    Args:
        model: from `export_runtime`.
        adapters: paths or loaded adapters, each alone or as `(adapter, weight)`.
        output: the `.onnx_adapter` file to make.
        options: `AdapterExportOptions` says what there is.

    Raises:
        LoraformatError: with every target that the model has no input for, by name.
    """
    check_options("export_adapter", options, AdapterExportOptions)
    filled = _fill(model, adapters, options)
    if not filled.pairs:
        raise refuse("LF401", filled.model.path, "no adapter that goes into its inputs", "at least one")
    place = Path(output)
    files = [path.path for item in filled.weighted for path in list_files(item.adapter)]
    force = options.get("force", False)
    check_output(place, [*files, *(file.path for file in filled.model.files)], force=force)
    with PendingOutput([place], force=force) as pending:
        write_pairs(pending.descriptors[0], filled.pairs)
        pending.commit()
    return ExportedAdapter(
        str(place),
        tuple(item.name for item in filled.weighted),
        {pair.layout.name: pair.rank for pair in filled.pairs},
        tuple(name for each in filled.served for name in each.left_out),
        tuple(problem for each in filled.served for problem in each.problems),
    )


def adapter_feeds(
    model: StrPath, adapters: AdapterArguments, **options: Unpack[AdapterExportOptions]
) -> dict[str, Array]:
    """Return adapters as feeds for `InferenceSession.run`; the arguments are those of `export_adapter`."""
    check_options("adapter_feeds", options, AdapterExportOptions)
    return {name: make() for pair in _fill(model, adapters, options).pairs for name, _, make in pair.tensors()}


@dataclass(frozen=True, slots=True)
class _Filled:
    """Adapters, and the inputs of a model that they fill."""

    model: OnnxGraph
    weighted: Sequence[WeightedAdapter]
    served: Sequence[ServedAdapter]
    pairs: Sequence[Pair]


def _fill(model: StrPath, adapters: AdapterArguments, options: AdapterExportOptions) -> _Filled:
    opened = open_model(model)
    graph = opened.as_branchable()
    inputs = read_inputs(graph)
    weighted = weigh_adapters(adapters, options, opened)
    if inputs.batched and len(weighted) > inputs.batched:
        raise refuse("LF829", opened.path, f"{len(weighted)} adapters", f"at most {inputs.batched}, one for each slot")
    hints = read_hints(options)
    filling = _Filling(graph, inputs)
    sites = [*graph.sites, *restore_members(graph.sites, inputs)]
    served = [serve(opened, sites, item, hints, options, filling.judge) for item in weighted]
    return _Filled(opened, weighted, served, filling.pair(served))


class _Filling:
    """Knows which inputs of a model a change goes into.

    Args:
        model: the model.
        inputs: what it says about its inputs.
    """

    def __init__(self, model: BranchableGraph, inputs: RuntimeInputs) -> None:
        self._model = model
        self._slots = inputs.slots
        self._by_mark = inputs.by_mark()

    def judge(self, change: Served) -> Problem | None:
        """Return why a change goes into none (LF830)."""
        marks, layout = self._find(change)
        if layout is None:
            return Problem("LF830", change.target.name, "no input for it", "one")
        sizes = (layout.width, layout.out, layout.kernel)
        if marks == set(layout.marks) and sizes == (change.change.shape[1], change.out, change.change.shape[2:]):
            return None
        found = f"the inputs {layout.name!r} for {layout.out} by {layout.width} at {', '.join(layout.marks[:_LISTED])}"
        expected = f"inputs for {change.out} by {change.change.shape[1]} at all nodes of the target, and no other"
        return Problem("LF830", change.target.name, found, expected)

    def pair(self, served: Sequence[ServedAdapter]) -> list[Pair]:
        """Return what goes into which inputs, all of it judged well."""
        found: dict[str, list[list[Served]]] = defaultdict(lambda: [[] for _ in range(self._slots or 1)])
        layouts: dict[str, Layout] = {}
        for position, change in ((at, change) for at, adapter in enumerate(served) for change in adapter.served):
            layout = self._find(change)[1]
            assert layout is not None, "judged well"
            layouts[layout.name] = layout
            found[layout.name][position if self._slots else 0].append(change)
        return [Pair(layouts[name], self._slots, found[name]) for name in sorted(found)]

    def _find(self, change: Served) -> tuple[set[str], Layout | None]:
        marks = {self._model.find_mark(site) for site in change.sites}
        return marks, next((self._by_mark[mark] for mark in sorted(marks) if mark in self._by_mark), None)
