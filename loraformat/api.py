"""The functions of the public face."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from loraformat.adapter import Adapter
from loraformat.apply import Work, apply_plan
from loraformat.bases import BaseModel
from loraformat.containers.safetensors import write_safetensors
from loraformat.engine import Effort, Progress, count_workers
from loraformat.errors import error_for, refuse
from loraformat.inspection import AdapterInspection, BaseInspection, inspect_adapter, inspect_base
from loraformat.limits import DEFAULT_MEMORY_BYTES, RETAINED_REFUSE, RETAINED_WARN
from loraformat.loading import FACTORS_NAMES, is_base, list_files, load_adapter, open_base
from loraformat.output_forms import require_rewriter
from loraformat.outputs import PendingOutput, check_apart, check_output
from loraformat.plan import Plan, WeightedAdapter
from loraformat.planning import build_plan, default_output
from loraformat.receipt import Receipt
from loraformat.rules import check_shapes
from loraformat.schemes import StatedScale
from loraformat.schemes.native import write_tensors
from loraformat.stamping import stamp_adapter
from loraformat.validation import Verdict, validate_paths

StrPath: TypeAlias = str | os.PathLike[str]
AdapterSource: TypeAlias = StrPath | Adapter
AdapterArgument: TypeAlias = AdapterSource | tuple[AdapterSource, float]

_ADAPTER_SUFFIXES: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz"})


def load(
    path: StrPath, *, scheme: str | None = None, alpha: float | None = None, scale: float | None = None
) -> Adapter:
    """Read an adapter: a loraformat file, a PEFT folder, or PEFT's file alone with its scale given.

    Args:
        path: the file or folder.
        scheme: name of the naming scheme; None finds it from the content.
        alpha: lora_alpha of the training run, for a source that does not state it.
        scale: the multiplier itself, for a source that states no alpha.

    Raises:
        LoraformatError: with every problem that was found.
    """
    return load_adapter(Path(path), scheme, StatedScale(alpha, scale))


def save(adapter: Adapter, path: StrPath, *, force: bool = False) -> Path:
    """Write `adapter` as one loraformat file; the same adapter gives the same bytes on any machine.

    Args:
        adapter: what to write.
        path: the `.safetensors` file to make.
        force: replace an existing file.

    Raises:
        LoraformatError: the file exists, cannot be written, or is the adapter's own source; or something in that
            source stands against merging it.
    """
    output = Path(path)
    found = [*adapter.problems, *check_shapes(adapter)]
    against = [problem for problem in found if problem.severity == "error"]
    if against:  # The file has no place for them: it would pass for an adapter that can be merged.
        raise error_for(against)
    check_output(output, [file.path for file in list_files(adapter)], force=force)
    tensors, metadata = write_tensors(adapter)
    with PendingOutput([output], force=force) as pending:
        entries = [(name, factor.dtype, factor.shape, factor.read) for name, factor in tensors.items()]
        write_safetensors(pending.descriptors[0], entries, metadata)
        pending.commit()
    return output


def inspect(
    path: StrPath, *, scheme: str | None = None, alpha: float | None = None, scale: float | None = None
) -> AdapterInspection | BaseInspection:
    """Say what is in an adapter or a base, and what stands against merging it.

    Args:
        path: an adapter's file or folder, or a base model's file.
        scheme: as in `load`.
        alpha: as in `load`.
        scale: as in `load`.
    """
    place = Path(path)
    if scheme is None and is_base(place):
        return inspect_base(open_base(place))
    return inspect_adapter(place, scheme, StatedScale(alpha, scale))


def stamp(
    adapter: AdapterSource,
    base: StrPath,
    *,
    scheme: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
    strip_prefix: str | None = None,
) -> Adapter:
    """Return the adapter with a fingerprint of its base weight at every target; `save` writes it.

    Args:
        adapter: path or loaded adapter.
        base: the model that it was trained on.
        scheme: as in `load`.
        alpha: as in `load`.
        scale: as in `load`.
        strip_prefix: removed from the front of the targets' names before they are looked for in the base.

    Raises:
        LoraformatError: a target that the base lacks, or a weight whose sampled numbers are not finite.
    """
    item = _weigh(adapter, scheme, StatedScale(alpha, scale))
    return stamp_adapter(item.adapter, open_base(Path(base)), strip_prefix=strip_prefix)


def validate(
    paths: StrPath | Sequence[StrPath],
    *,
    base: StrPath | None = None,
    alpha: float | None = None,
    scale: float | None = None,
) -> list[Verdict]:
    """Check adapters and return a verdict on each; what is wrong with an adapter is returned, never raised.

    Args:
        paths: files, PEFT folders, or folders that are searched for both.
        base: the model that they should fit; None checks the adapters alone.
        alpha: as in `load`.
        scale: as in `load`.

    Raises:
        LoraformatError: the base itself cannot be opened.
    """
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    place = Path(base) if base is not None else None
    return validate_paths([Path(path) for path in listed], StatedScale(alpha, scale), place)


def plan_merge(
    base: StrPath,
    adapters: Sequence[AdapterArgument],
    output: StrPath | None = None,
    *,
    scheme: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
    allow_unmatched: Sequence[str] = (),
    strip_prefix: str | None = None,
    allow_zero: bool = False,
    ignore_fingerprints: bool = False,
    dtype: str | None = None,
    to: str | None = None,
) -> Plan:
    """Return what `merge` would do with the same arguments; reads no weight of the base and writes nothing."""
    matching = _Matching(tuple(allow_unmatched), strip_prefix, allow_zero, ignore_fingerprints, dtype, _anew(to))
    return _prepare(base, adapters, output, scheme, StatedScale(alpha, scale), matching)[2]


def merge(
    base: StrPath,
    adapters: Sequence[AdapterArgument],
    output: StrPath | None = None,
    *,
    scheme: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
    allow_unmatched: Sequence[str] = (),
    strip_prefix: str | None = None,
    allow_zero: bool = False,
    ignore_fingerprints: bool = False,
    dtype: str | None = None,
    to: str | None = None,
    min_retained: float = RETAINED_REFUSE,
    warn_retained: float = RETAINED_WARN,
    jobs: int | None = None,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    force: bool = False,
    durable: bool = False,
    resume: bool = False,
    link: bool = False,
    progress: Progress | None = None,
) -> Receipt:
    """Merge adapters into a copy of a base model: its numbers change, its structure does not.

    Args:
        base: `.onnx` model or `.safetensors` state dict.
        adapters: paths or loaded adapters, each alone or as `(adapter, weight)`; their deltas are summed in float32 and
            rounded once.
        output: the merged model; None names it after base and adapters, beside the base.
        scheme: naming scheme of the adapters; None finds it.
        alpha: lora_alpha for adapters that do not state it.
        scale: multiplier for adapters that state no alpha.
        allow_unmatched: glob patterns of adapter targets that may be left out when the base has nothing for them.
        strip_prefix: removed from the front of the targets' names.
        allow_zero: accept a scale of zero.
        ignore_fingerprints: accept weights that do not match the fingerprint of their target.
        dtype: number form of the output's floating-point tensors, such as `bfloat16`; None keeps each one's own.
        to: `safetensors` writes the output anew in this format; None keeps the base's own.
        min_retained: refuse when a smaller share of a weight's delta survives rounding.
        warn_retained: warn when a smaller share of it does.
        jobs: worker threads; None takes one for each processor.
        max_memory_bytes: cap on tiles and factors in flight.
        force: replace an existing output.
        durable: wait until the disk has the bytes before the output is moved into place; without it a power cut, but
            no crash or kill of the process, can lose it.
        resume: take up what a killed run of the same merge has left, and leave something to take up if killed.
        link: make hard links of the base's files that nothing of is rewritten, instead of copies; for model folders.
        progress: told how far the work is, in bytes.

    Returns:
        What was done; `receipt.output` is the path of the merged model.

    Raises:
        LoraformatError: with every problem that was found; the output is what it was before.
    """
    matching = _Matching(tuple(allow_unmatched), strip_prefix, allow_zero, ignore_fingerprints, dtype, _anew(to))
    opened, weighted, plan = _prepare(base, adapters, output, scheme, StatedScale(alpha, scale), matching)
    for item in weighted:
        check_apart(plan.output, [file.path for file in list_files(item.adapter)])
    effort = Effort(count_workers(jobs), max_memory_bytes, progress)
    work = Work(effort, min_retained, warn_retained, force, durable, resume, link)
    return apply_plan(plan, opened, weighted, work)


class _Matching(NamedTuple):
    """What the user allows when targets are matched with weights; the names are those of `build_plan`."""

    allow_unmatched: tuple[str, ...]
    strip_prefix: str | None
    allow_zero: bool
    ignore_fingerprints: bool
    dtype: str | None
    anew: bool


def _anew(to: str | None) -> bool:
    if to not in (None, "safetensors"):
        raise refuse("LF610", "--to", str(to), "safetensors")
    return to is not None


def _prepare(
    base: StrPath,
    adapters: Sequence[AdapterArgument],
    output: StrPath | None,
    scheme: str | None,
    stated: StatedScale,
    matching: _Matching,
) -> tuple[BaseModel, list[WeightedAdapter], Plan]:
    """Open everything and plan the merge."""
    opened = open_base(Path(base))
    weighted = [_weigh(argument, scheme, stated) for argument in adapters]
    form = require_rewriter(opened) if matching.anew or matching.dtype is not None else opened
    place = Path(output) if output is not None else default_output(opened.path, form.suffix, weighted)
    return opened, weighted, build_plan(opened, weighted, place, **matching._asdict())


def _weigh(argument: AdapterArgument, scheme: str | None, stated: StatedScale) -> WeightedAdapter:
    source, weight = argument if isinstance(argument, tuple) else (argument, 1.0)
    if isinstance(source, Adapter):
        return WeightedAdapter(source, weight, _name_of(Path(source.source or "adapter")))
    return WeightedAdapter(load_adapter(Path(source), scheme, stated), weight, _name_of(Path(source)))


def _name_of(path: Path) -> str:
    """Return the adapter's own name: the folder's where the file has the name that all PEFT files have."""
    path = path.absolute()
    if path.name in FACTORS_NAMES:
        return path.parent.name
    return path.stem if path.suffix in _ADAPTER_SUFFIXES else path.name
