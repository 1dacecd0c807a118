"""The functions of the public face."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from loraformat.adapter import Adapter
from loraformat.arguments import AdapterSource, StrPath, weigh_adapter
from loraformat.arrays import Bytes
from loraformat.base_spelling import spell_for_base
from loraformat.containers.safetensors import write_safetensors
from loraformat.errors import error_for, refuse
from loraformat.inspection import AdapterInspection, BaseInspection, inspect_adapter, inspect_base
from loraformat.loading import is_base, list_files, load_adapter, open_base
from loraformat.loading.from_memory import load_bytes, load_tensors
from loraformat.outputs import PendingOutput, check_ending, check_output
from loraformat.problems import Problem
from loraformat.rules import check_shapes, watch_numbers
from loraformat.schemes import StatedScale
from loraformat.schemes.native import write_tensors
from loraformat.stamping import stamp_adapter
from loraformat.validation import Verdict, validate_paths


def load(
    source: StrPath | Mapping[str, Any] | Bytes | BinaryIO,
    *,
    config: object = None,
    scheme: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
) -> Adapter:
    """Read an adapter of any naming scheme, from a file or a folder, or from memory.

    Args:
        source: the file or folder; or names to arrays of numpy or torch, such as `get_peft_model_state_dict(model)`; or
            the bytes of a file of any container, or a binary file to read them from.
        config: for what is in memory, the configuration that a folder would have beside them: a mapping, or PEFT's
            object, `model.peft_config["default"]`.
        scheme: name of the naming scheme; None finds it from the content.
        alpha: lora_alpha of the training run, for a source that does not state it.
        scale: the multiplier itself, for a source that states no alpha.

    Raises:
        LoraformatError: with every problem that was found.
    """
    if isinstance(source, Mapping):
        return load_tensors(source, config, scheme, StatedScale(alpha, scale))
    if not isinstance(source, str | os.PathLike):
        return load_bytes(source, config, scheme, StatedScale(alpha, scale))
    if config is not None:
        raise refuse("LF832", str(source), "a configuration for a path", "none: a file has its own beside it")
    return load_adapter(Path(source), scheme, StatedScale(alpha, scale))


def save(adapter: Adapter, path: StrPath, *, force: bool = False) -> Path:
    """Write `adapter` as one loraformat file; the same adapter gives the same bytes on any machine.

    Args:
        adapter: what to write.
        path: the `.safetensors` file to make.
        force: replace an existing file.

    Raises:
        LoraformatError: the file exists, cannot be written, or is the adapter's own source; or something in that
            source stands against merging it, or NaN or infinities in it do (LF501).
    """
    output = Path(path)
    found = [*adapter.problems, *check_shapes(adapter)]
    against = [problem for problem in found if problem.severity == "error"]
    if against:  # The file has no place for them: it would pass for an adapter that can be merged.
        raise error_for(against)
    check_ending(output, ".safetensors", "an adapter in loraformat's own format")
    check_output(output, [file.path for file in list_files(adapter)], force=force)
    tensors, metadata = write_tensors(adapter)
    broken: list[Problem] = []
    with PendingOutput([output], force=force) as pending:
        entries = [
            (name, factor.dtype, factor.shape, watch_numbers(name, factor, broken)) for name, factor in tensors.items()
        ]
        write_safetensors(pending.descriptors[0], entries, metadata)
        if broken:
            raise error_for(broken)
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
    opened = open_base(Path(base))
    item = weigh_adapter(adapter, scheme, StatedScale(alpha, scale), opened)
    return stamp_adapter(item.adapter, opened, strip_prefix=strip_prefix)


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
    return validate_paths([Path(path) for path in listed], StatedScale(alpha, scale), place, spell_for_base)
