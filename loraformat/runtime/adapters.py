"""Adapters for a model with run-time inputs: the arrays that go into them, and `.onnx_adapter` files of these."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from loraformat.arguments import AdapterArgument, AdapterOptions, HintOptions, StrPath, read_hints, weigh_adapters
from loraformat.bases.onnx_graph import OnnxGraph
from loraformat.containers._new_tensors import NewTensor
from loraformat.containers.onnx_adapter import write_onnx_adapter
from loraformat.errors import error_for, refuse
from loraformat.loading import list_files
from loraformat.outputs import PendingOutput, check_output
from loraformat.plan import WeightedAdapter
from loraformat.problems import Problem
from loraformat.runtime.layouts import Layout, RuntimeInputs, read_inputs
from loraformat.runtime.opening import open_model
from loraformat.runtime.targets import Served, ServedAdapter, ServeOptions, serve

Array = NDArray[Any]
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
    model: StrPath, adapters: Sequence[AdapterArgument], output: StrPath, **options: Unpack[AdapterExportOptions]
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
    filled = _fill(model, adapters, options)
    place = Path(output)
    files = [path.path for item in filled.weighted for path in list_files(item.adapter)]
    force = options.get("force", False)
    check_output(place, [*files, *(file.path for file in filled.model.files)], force=force)
    with PendingOutput([place], force=force) as pending:
        write_onnx_adapter(pending.descriptors[0], [tensor for pair in filled.pairs for tensor in pair.tensors()], {})
        pending.commit()
    return ExportedAdapter(
        str(place),
        tuple(item.name for item in filled.weighted),
        {pair.layout.name: pair.rank for pair in filled.pairs},
        tuple(name for each in filled.served for name in each.left_out),
        tuple(problem for each in filled.served for problem in each.problems),
    )


def adapter_feeds(
    model: StrPath, adapters: Sequence[AdapterArgument], **options: Unpack[AdapterExportOptions]
) -> dict[str, Array]:
    """Return adapters as feeds for `InferenceSession.run`; the arguments are those of `export_adapter`."""
    pairs = _fill(model, adapters, options).pairs
    return {name: cast(Callable[[], Array], make)() for pair in pairs for name, _, _, make in pair.tensors()}


@dataclass(frozen=True, slots=True)
class _Pair:
    """One pair of inputs, and what goes into it.

    Attributes:
        layout: the inputs.
        slots: size of the stack; 0 for none.
        found: for each slot the changes that are added up in it; one list for all where there is no stack.
    """

    layout: Layout
    slots: int
    found: Sequence[Sequence[Served]]

    @property
    def rank(self) -> int:
        """The rank of the arrays: the largest of a stack."""
        return max(sum(each.rank for each in changes) for changes in self.found)

    def tensors(self) -> list[NewTensor]:
        """Return A and B, each computed when it is asked for."""
        stack = (self.slots,) if self.slots else ()
        down, up = ((*stack, *shape) for shape in self.layout.list_shapes(self.rank))
        dtype = self.layout.dtype
        return [
            (self.layout.down, dtype, down, lambda: self._make(down, _put_down)),
            (self.layout.up, dtype, up, lambda: self._make(up, _put_up)),
        ]

    def _make(self, shape: tuple[int, ...], put: Callable[[Layout, Array, Served, range], None]) -> Array:
        whole: Array = np.zeros(shape, np.float32)
        for slot, changes in enumerate(self.found):
            start = 0
            for change in changes:
                put(self.layout, whole[slot] if self.slots else whole, change, range(start, start + change.rank))
                start += change.rank
        return _round(whole, self.layout)


def _put_down(layout: Layout, room: Array, change: Served, ranks: range) -> None:
    """Put A of one change at its ranks."""
    right = change.read_product().right
    if layout.form == "conv":
        room[ranks.start : ranks.stop] = right.reshape(len(ranks), *room.shape[1:])
    else:
        room[:, ranks.start : ranks.stop] = right.T


def _put_up(layout: Layout, room: Array, change: Served, ranks: range) -> None:
    """Put B of one change at its ranks, and at the columns of its module."""
    left = change.read_product().left
    if layout.form == "conv":
        room[slice(*change.rows), ranks.start : ranks.stop] = left.reshape(*left.shape, *room.shape[2:])
    else:
        room[ranks.start : ranks.stop, slice(*change.rows)] = left.T


def _round(values: Array, layout: Layout) -> Array:
    """Return numbers in the form of the inputs; LF503 where one becomes infinite."""
    with np.errstate(over="ignore"):
        rounded = values.astype(layout.dtype.numpy())
    if not np.isfinite(rounded.astype(np.float32)).all():
        largest = float(np.abs(values).max())
        raise refuse("LF503", layout.name, f"{largest:g}", f"numbers that {layout.dtype.name} holds")
    return rounded


@dataclass(frozen=True, slots=True)
class _Filled:
    """Adapters, and the inputs of a model that they fill."""

    model: OnnxGraph
    weighted: Sequence[WeightedAdapter]
    served: Sequence[ServedAdapter]
    pairs: Sequence[_Pair]


def _fill(model: StrPath, adapters: Sequence[AdapterArgument], options: AdapterExportOptions) -> _Filled:
    opened = open_model(model)
    inputs = read_inputs(opened)
    weighted = weigh_adapters(adapters, options, opened)
    if inputs.batched and len(weighted) > inputs.batched:
        raise refuse("LF829", opened.path, f"{len(weighted)} adapters", f"at most {inputs.batched}, one for each slot")
    hints = read_hints(cast(HintOptions, options))
    own = cast(ServeOptions, {name: each for name, each in options.items() if name in ServeOptions.__annotations__})
    served = [serve(opened, item, hints, own) for item in weighted]
    return _Filled(opened, weighted, served, _pair(opened, inputs, served))


def _pair(model: OnnxGraph, inputs: RuntimeInputs, served: Sequence[ServedAdapter]) -> list[_Pair]:
    """Return what goes into which inputs; LF830 where a change has none."""
    by_mark = inputs.by_mark()
    count = inputs.slots or 1
    found: dict[str, list[list[Served]]] = defaultdict(lambda: [[] for _ in range(count)])
    layouts: dict[str, Layout] = {}
    problems: list[Problem] = []
    for position, adapter in enumerate(served):
        for change in adapter.served:
            marks = {model.find_mark(site) for site in change.sites}
            layout = next((by_mark[mark] for mark in sorted(marks) if mark in by_mark), None)
            if layout is None or marks != set(layout.marks) or not _fits(layout, change):
                problems.append(_refuse_change(adapter.name, change, layout))
                continue
            layouts[layout.name] = layout
            found[layout.name][position if inputs.slots else 0].append(change)
    if problems:
        raise error_for(problems)
    return [_Pair(layouts[name], inputs.slots, found[name]) for name in sorted(found)]


def _fits(layout: Layout, change: Served) -> bool:
    return (layout.width, layout.out, layout.kernel) == (change.change.shape[1], change.out, change.change.shape[2:])


def _refuse_change(adapter: str, change: Served, layout: Layout | None) -> Problem:
    if layout is None:
        return Problem("LF830", f"{adapter}: {change.target.name}", "no input for it", "one")
    found = f"the inputs {layout.name!r} for {layout.out} by {layout.width} at {', '.join(layout.marks[:_LISTED])}"
    expected = f"inputs for {change.out} by {change.change.shape[1]} at all nodes of the target"
    return Problem("LF830", f"{adapter}: {change.target.name}", found, expected)
