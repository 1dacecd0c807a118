"""What callers of the public face may hand over, and what becomes of it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Final, TypeAlias, TypedDict

from loraformat.adapter import Adapter
from loraformat.base_spelling import spell_for_base
from loraformat.bases import BaseModel
from loraformat.engine import Effort, Progress, count_workers
from loraformat.errors import refuse
from loraformat.evidence import Hints
from loraformat.evidence.explicit_map import read_map
from loraformat.files import name_in_hub
from loraformat.limits import DEFAULT_MEMORY_BYTES
from loraformat.loading import load_for_base, open_model, split_choice
from loraformat.loading.adapter_folders import FACTORS_NAMES
from loraformat.loading.adapter_shards import name_whole
from loraformat.output_forms import require_shared
from loraformat.plan import SHARE, Plan, WeightedAdapter
from loraformat.planning.wishes import NumberWishes, Wishes
from loraformat.problems import escape_surrogates
from loraformat.schemes import StatedScale

StrPath: TypeAlias = str | os.PathLike[str]
AdapterSource: TypeAlias = StrPath | Adapter
AdapterArgument: TypeAlias = AdapterSource | tuple[AdapterSource, float]
AdapterArguments: TypeAlias = Sequence[AdapterArgument] | AdapterSource
"""Several, or one alone."""

STRUCTURE: Final = "structure"
_ADAPTER_SUFFIXES: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz"})


class AdapterOptions(TypedDict, total=False):
    """What adapters may not say themselves.

    Attributes:
        scheme: naming scheme of the adapters; without it, it is found.
        alpha: lora_alpha for adapters that do not state it.
        scale: multiplier for adapters that state no alpha.
    """

    scheme: str | None
    alpha: float | None
    scale: float | None


class HintOptions(TypedDict, total=False):
    """What targets may be found by, besides names.

    Attributes:
        map: a file that says which weight a target is, as `resolve --json` prints it.
        base_checkpoint: the torch checkpoint that an ONNX base was exported from: its numbers find weights without
            names, verify those found by names, and tell what exporters folded into them.
        resolve: `structure` also finds layers by what they do in the graph, where the graph is a single stack of
            transformer layers and all names are lost.
    """

    map: StrPath | None
    base_checkpoint: StrPath | None
    resolve: str | None


class PlanOptions(AdapterOptions, HintOptions, Wishes, total=False):
    """What a plan depends on besides base, adapters and output.

    Attributes:
        calibration: an `.npz` with samples for each input of an ONNX graph that has measured ranges of activations, or
            for a folder of graphs a folder of such files, each called as its graph is:
            they are measured anew on the merged model.
        to: `safetensors` writes the output anew in this format; else it keeps the base's own.
    """

    calibration: StrPath | None
    to: str | None


class ResolveOptions(AdapterOptions, HintOptions, total=False):
    """What `resolve_targets` depends on besides base and adapter: as in `PlanOptions`."""

    allow_unmatched: Sequence[str]
    strip_prefix: str | None
    ignore_fingerprints: bool
    graphs: Sequence[str]


class EffortOptions(TypedDict, total=False):
    """How much of the machine to take.

    Attributes:
        jobs: worker threads; by default one for each processor.
        max_memory_bytes: cap on tiles and factors in flight.
        progress: told how far the work is, in bytes.
    """

    jobs: int | None
    max_memory_bytes: int
    progress: Progress | None


class WorkOptions(EffortOptions, total=False):
    """How a merge is carried out.

    Attributes:
        min_retained: refuse when a smaller share of a weight's delta survives rounding.
        warn_retained: warn when a smaller share of it does.
        force: replace an existing output.
        durable: wait until the disk has the bytes before the output is moved into place; without it a power cut, but
            no crash or kill of the process, can lose it.
        resume: take up what a killed run of the same merge has left, and leave something to take up if killed.
        link: make hard links of the base's files of which nothing is rewritten, instead of copies; for model folders.
        keep_undo: keep the overwritten bytes in a file beside the output, so that `unmerge` is exact.
    """

    min_retained: float
    warn_retained: float
    force: bool
    durable: bool
    resume: bool
    link: bool
    keep_undo: bool


class StateOptions(AdapterOptions, HintOptions, NumberWishes, EffortOptions, total=False):
    """What a merge into a state dict in memory depends on besides its tensors and adapters.

    Attributes:
        config: the model's configuration, a mapping or an object with `to_dict` such as `model.config`: it tells which
            matrices are stored transposed, which tables are tied, and how fused weights lie. A file has it beside it.
        untie: as in `PlanOptions`.
        new_biases: as in `PlanOptions`.
        min_retained: as in `WorkOptions`.
        warn_retained: as in `WorkOptions`.
    """

    config: object
    untie: bool
    new_biases: bool
    min_retained: float
    warn_retained: float


class ModelOptions(AdapterOptions, HintOptions, NumberWishes, EffortOptions, total=False):
    """What a merge into an ONNX model in memory depends on besides the model and adapters.

    Attributes:
        base_dir: the folder that its external data are looked for in.
        new_biases: as in `PlanOptions`.
        min_retained: as in `WorkOptions`.
        warn_retained: as in `WorkOptions`.
    """

    base_dir: StrPath | None
    new_biases: bool
    min_retained: float
    warn_retained: float


class VerifyOptions(AdapterOptions, HintOptions, EffortOptions, total=False):
    """What a verification depends on besides models and adapters.

    Attributes:
        run: have onnxruntime run merged model and base, and compare outputs too; for ONNX models.
        sizes: for that, sizes of symbolic dimensions of the inputs, by name; others get small ones.
        calibration: the data that ranges of activations were measured on, to measure them once more.
    """

    calibration: StrPath | None
    run: bool
    sizes: Mapping[str, int]


class MergeOptions(PlanOptions, WorkOptions, total=False):
    """All options of a merge."""


def check_options(function: str, options: Mapping[str, object], known: type) -> None:
    """Raise TypeError for an option that a function does not have, as Python does where arguments are listed.

    Args:
        function: its name.
        options: what it was given as `**options`.
        known: the `TypedDict` of its options.
    """
    for name in options.keys() - known.__annotations__.keys():
        near = get_close_matches(name, known.__annotations__, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def require_adapters(weighted: Sequence[WeightedAdapter], base: BaseModel) -> None:
    """Refuse a merge of nothing (LF401): its output would be a copy that passes for a merged model."""
    if not weighted:
        raise refuse("LF401", str(base.path), "no adapter to merge", "at least one", "Name the adapters.")


def weigh_adapter(
    argument: AdapterArgument, scheme: str | None, stated: StatedScale, base: BaseModel
) -> WeightedAdapter:
    """Return an adapter, read if need be, with its weight and its name."""
    source, weight = argument if isinstance(argument, tuple) else (argument, 1.0)
    if isinstance(source, Adapter):
        return WeightedAdapter(source, weight, name_adapter(Path(source.source or "adapter")))
    adapter = load_for_base(Path(source), scheme, stated, base)
    return WeightedAdapter(adapter, weight, name_adapter(Path(source)))


def list_adapters(adapters: AdapterArguments) -> list[AdapterArgument]:
    """Return adapters as a list; a path, whose characters are a sequence too, is one."""
    return [adapters] if isinstance(adapters, str | os.PathLike | Adapter) else list(adapters)


def weigh_adapters(adapters: AdapterArguments, options: AdapterOptions, base: BaseModel) -> list[WeightedAdapter]:
    """Return adapters for a base, their modules spelled as it has them, with their weights and names."""
    stated, scheme = StatedScale(options.get("alpha"), options.get("scale")), options.get("scheme")
    items = [weigh_adapter(argument, scheme, stated, base) for argument in list_adapters(adapters)]
    return [replace(item, adapter=spell_for_base(item.adapter, base)) for item in items]


def name_adapter(path: Path) -> str:
    """Return the adapter's own name: of the one chosen, in a hub, of the folder where the file is called as all are."""
    chosen = split_choice(path)[1]
    if chosen:
        return escape_surrogates(chosen)
    path = path.absolute()
    own = path.parent if name_whole(path).name in FACTORS_NAMES else path
    usual = own.stem if own is path and own.suffix in _ADAPTER_SUFFIXES else own.name
    return escape_surrogates(name_in_hub(own) or usual)


def wants_anew(to: str | None) -> bool:
    """Say whether the output is to be written anew; LF610 for a format that is not written."""
    if to not in (None, "safetensors"):
        raise refuse("LF610", "--to", str(to), "safetensors")
    return to is not None


def check_sharing(plan: Plan, base: BaseModel, options: Mapping[str, object]) -> None:
    """Refuse what does not go with an output that shares the base's data files (LF444)."""
    asked = options.get("external_data")
    if asked not in (None, "copy", SHARE):
        raise refuse("LF444", "--external-data", str(asked), f"copy or {SHARE}")
    if not plan.is_sharing:
        return
    require_shared(base)
    if plan.rewritten or options.get("keep_undo") or options.get("link"):
        found = "--external-data share with --dtype, --to, --link or --keep-undo"
        raise refuse("LF444", plan.output, found, "one of the two")
    folder, path = plan.output.absolute().parent, base.path.absolute()
    own = path if base.folder_mark else path.parent
    if not (folder.is_dir() and os.path.samefile(folder, own)):
        raise refuse("LF444", plan.output, f"an output outside {own}", "one beside the base, whose data it refers to")
    if os.path.lexists(plan.output) and os.path.samefile(plan.output, base.path):
        raise refuse("LF444", plan.output, "the base itself", "another name beside it")


def read_hints(options: HintOptions) -> Hints:
    """Return what targets may be found by, the files read that the options name."""
    path, checkpoint, way = options.get("map"), options.get("base_checkpoint"), options.get("resolve")
    if way not in (None, STRUCTURE):
        raise refuse("LF425", "--resolve", str(way), STRUCTURE)
    mapped = read_map(Path(path)) if path is not None else {}
    opened = open_model(Path(checkpoint)) if checkpoint is not None else None
    return Hints(mapped, opened, structure=way == STRUCTURE)


def read_effort(options: EffortOptions) -> Effort:
    """Return how much of the machine to take."""
    memory = options.get("max_memory_bytes", DEFAULT_MEMORY_BYTES)
    return Effort(count_workers(options.get("jobs")), memory, options.get("progress"))
