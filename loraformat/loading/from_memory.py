"""Adapters that are in memory already: tensors under their names, or the bytes of a file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from loraformat.adapter import Adapter
from loraformat.arrays import Bytes, HeldFile, as_numpy, hold_arrays, read_config
from loraformat.derived import NewFactor
from loraformat.errors import refuse
from loraformat.loading import find_unused, read_bundle
from loraformat.loading.digests import digest_files
from loraformat.loading.readers import choose_scheme, open_tensors
from loraformat.schemes import NOT_STATED, Bundle, StatedScale

IN_MEMORY: Final = "adapter in memory"
"""What one is called in messages that was never in a file."""


def load_tensors(
    tensors: Mapping[str, Any], config: object, scheme: str | None = None, stated: StatedScale = NOT_STATED
) -> Adapter:
    """Return the adapter that tensors in memory are, as a file of them with its configuration beside it would be.

    Raises:
        LoraformatError: LF831 no tensors, LF832 no configuration; as `load_adapter`.
    """
    held = hold_arrays(tensors)
    others = sorted(name for name in tensors if name not in held)
    if others or not held:
        found = f"values that are no tensors, such as {others[0]!r}" if others else "an empty mapping"
        raise refuse("LF831", IN_MEMORY, found, "arrays of numpy or torch under their names")
    factors = {name: NewFactor(name, as_numpy(array)) for name, array in held.items()}
    bundle = Bundle(Path(IN_MEMORY), factors, config=read_config(config) or None)
    reader, _ = choose_scheme(bundle, scheme)
    adapter = read_bundle(reader, bundle, stated)
    return replace(adapter, problems=(*adapter.problems, *find_unused(adapter, stated)))


def load_bytes(
    data: Bytes | BinaryIO, config: object, scheme: str | None = None, stated: StatedScale = NOT_STATED
) -> Adapter:
    """Return the adapter that the bytes of a file are, with its configuration beside it where it has one.

    Args:
        data: the bytes, of any container; or a binary file, read from where it stands to its end.
        config: as in `load_tensors`.
        scheme: as in `load_adapter`.
        stated: as in `load_adapter`.

    Raises:
        LoraformatError: LF832 no configuration, LF451 a file of text; as `load_adapter`.
    """
    held = data if isinstance(data, Bytes) else data.read()
    if not isinstance(held, Bytes):
        raise refuse("LF451", IN_MEMORY, f"a file that gives {type(held).__name__}", "a file that is open as binary")
    file = HeldFile(Path(IN_MEMORY), held)
    opened = open_tensors(file)
    bundle = Bundle(file.path, opened.tensors, opened.metadata, read_config(config) or None)
    reader, _ = choose_scheme(bundle, scheme)
    adapter = read_bundle(reader, bundle, stated)
    problems = (*adapter.problems, *find_unused(adapter, stated))
    return replace(adapter, sha256=digest_files([file]), problems=problems)
