"""Sessions of onnxruntime whose weights are replaced before the graph is optimised.

`SessionOptions.add_initializer` would not do: it replaces a weight by its name after the optimisation, in which the
weight may have become another one by then (transposed, cast, fused), and onnxruntime says nothing.
`add_external_initializers` comes before it, and takes initializers of the main graph that are external data:
`ServedGraph` makes them so.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from loraformat.apply.accounting import check_untouched, finish_receipt
from loraformat.arguments import AdapterArguments, read_effort, read_hints, weigh_adapters
from loraformat.bases.onnx_graph import OnnxGraph
from loraformat.dtypes import BY_ONNX
from loraformat.errors import refuse
from loraformat.limits import RETAINED_REFUSE, RETAINED_WARN
from loraformat.output_forms import Order, list_inputs
from loraformat.planning import build_plan
from loraformat.planning.wishes import NumberWishes
from loraformat.receipt import Receipt
from loraformat.runtime._held_weights import MergedWeights, WeightShelf
from loraformat.runtime._served_graph import ServedGraph, TensorForm
from loraformat.runtime._session_options import SessionSettings, copy_settings
from loraformat.runtime.options import Providers, RuntimeOptions
from loraformat.spans import InputFile

_FOLDER_KEY: Final = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True, slots=True)
class SwitchCost:
    """What it took to make a session.

    Attributes:
        seconds: from the call to the session; the first session's is without opening the base.
        planning_seconds: of these, for reading the adapters and finding their targets.
        merging_seconds: for computing weights.
        loading_seconds: for onnxruntime to make the session.
        weights: number of weights that differ from the base's.
        computed_weights: of these, those that were computed; the others another session had.
        computed_bytes: bytes of the computed weights.
    """

    seconds: float
    planning_seconds: float
    merging_seconds: float
    loading_seconds: float
    weights: int
    computed_weights: int
    computed_bytes: int


class ServedBase:
    """A base that sessions are made of, and what they have in common.

    Args:
        base: the opened base.
        providers: execution providers.
        settings: of onnxruntime, or what makes them; None for the usual ones.
        options: how to merge.

    Attributes:
        providers: execution providers of new sessions.
        keeps_merged: whether sessions keep merged weights for each other.
    """

    def __init__(
        self, base: OnnxGraph, providers: Providers | None, settings: SessionSettings | None, options: RuntimeOptions
    ) -> None:
        self.providers = providers
        self.keeps_merged = options.get("keep_merged", False)
        self._base = base
        self._settings = onnxruntime.SessionOptions if settings is None else settings
        self._options = options
        self._effort = read_effort(options)
        self._hints = read_hints(options)
        self._graph = ServedGraph(base.opened)
        self._shelf = WeightShelf()

    def plan(self, adapters: AdapterArguments) -> Order | None:
        """Return what is to be merged; None for nothing."""
        weighted = weigh_adapters(adapters, self._options, self._base)
        if not weighted:
            return None
        given: dict[str, Any] = {
            name: own for name, own in self._options.items() if name in NumberWishes.__annotations__
        }
        plan = build_plan(self._base, weighted, self._base.path, hints=self._hints, **given)
        check_untouched(plan, self._base)
        return Order(plan, weighted, self._hints.checkpoint)

    def merge(self, order: Order | None) -> tuple[MergedWeights, Receipt | None]:
        """Return merged weights and the receipt; LF906 where a file is not what it was when it was opened."""
        _check_in_place(self._base.files)
        if order is None:
            return MergedWeights((), ()), None
        merged = self._shelf.merge(order, self._base, self._effort)
        sums = [weight.sums for weight in merged.weights]
        least = self._options.get("min_retained", RETAINED_REFUSE)
        receipt = finish_receipt(
            order.plan, self._base, sums, least, self._options.get("warn_retained", RETAINED_WARN), room_bytes=0
        )
        for file in list_inputs(self._base, [order]):
            file.check_unchanged()
        return merged, replace(receipt, output="")

    def load(self, order: Order | None, merged: MergedWeights) -> tuple[bytes, onnxruntime.SessionOptions]:
        """Return the graph with merged weights, and the settings that hold those which are no part of its bytes."""
        buffers = merged.buffers
        changed = self._base if order is None else self._base.with_copies(order.plan.copies)
        changed = changed.with_floats(order.plan.floats) if order is not None and order.plan.floats else changed
        filled = self._graph.fill(buffers, *changed.changes)
        values = {name: _wrap(form, buffers[form.place]) for name, form in filled.replaced.items()}
        settings = copy_settings(self._settings)
        settings.add_session_config_entry(_FOLDER_KEY, str(self._graph.folder))
        if values:
            settings.add_external_initializers(list(values), list(values.values()))
        return filled.model, settings


class AdaptedSession(onnxruntime.InferenceSession):  # type: ignore[misc]
    """A session of a base with adapters merged in memory; `loraformat.runtime.session` makes the first.

    Args:
        base: what it is made of.
        adapters: what is merged.

    Attributes:
        cost: what it took to make.
        receipt: what was merged, as `merge` says it; None for the base alone.
    """

    cost: SwitchCost
    receipt: Receipt | None

    def __init__(self, base: ServedBase, adapters: AdapterArguments) -> None:
        start = time.perf_counter()
        self._served_base = base
        self._order = base.plan(adapters)
        self._make(start, base.providers, None)

    def _make(self, start: float, providers: Providers | None, provider_options: Any) -> None:
        """Merge, and let onnxruntime make the session.

        onnxruntime copies the weights (`AddExternalInitializers` of its C API says so), packed for its kernels mostly:
        ours are let go, unless sessions to come are to have them.
        """
        planned = time.perf_counter()
        merged, self.receipt = self._served_base.merge(self._order)
        done = time.perf_counter()
        model, settings = self._served_base.load(self._order, merged)
        super().__init__(model, settings, providers=providers, provider_options=provider_options)
        self._sess_options_initial = self._sess_options  # The others point at weights that go now.
        self._kept = merged.weights if self._served_base.keeps_merged else ()
        end = time.perf_counter()
        self.cost = SwitchCost(
            seconds=end - start,
            planning_seconds=planned - start,
            merging_seconds=done - planned,
            loading_seconds=end - done,
            weights=len(merged.weights),
            computed_weights=len(merged.computed),
            computed_bytes=sum(weight.nbytes for weight in merged.computed),
        )

    def set_providers(self, providers: Providers | None = None, provider_options: Any = None) -> None:
        """Make the session anew for other execution providers, as every `InferenceSession` does."""
        self._make(time.perf_counter(), providers, provider_options)

    def switch(self, adapters: AdapterArguments = ()) -> "AdaptedSession":
        """Return the next session: the same base with other adapters, or none; this one stays as it is.

        The base's index and graph are taken over, its untouched weights stay mapped, and with `keep_merged` so do
        merged weights that a living session has in common with the next one.

        Args:
            adapters: as in `merge`; of those that come and go, give `loraformat.load`ed ones rather than paths.
        """
        return AdaptedSession(self._served_base, adapters)


def _wrap(form: TensorForm, buffer: NDArray[np.uint8]) -> onnxruntime.OrtValue:
    """Return new numbers as onnxruntime takes them, over the same memory."""
    values = buffer.view(f"u{BY_ONNX[form.data_type].bits // 8}").reshape(form.shape)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(values, form.data_type)


def _check_in_place(files: Sequence[InputFile]) -> None:
    """Raise LF906 where a file of a base is not what it was, or not where it was: onnxruntime opens it by its path."""
    for file in files:
        file.check_unchanged()
        if not os.path.exists(file.path) or InputFile(file.path).identity != file.identity:
            raise refuse("LF906", file.path, "another file at its path", "the file that was opened")
