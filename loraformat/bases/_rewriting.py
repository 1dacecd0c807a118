"""What rewriting a state dict starts from, in however many files it lies: its tensors, each with its own bytes."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from loraformat.bases._aliases import Group, group_aliases
from loraformat.bases._state_dict import is_tied, is_tied_module
from loraformat.images import OutputTensor
from loraformat.problems import Problem
from loraformat.spans import StoredTensor
from loraformat.strict_json import JsonValue

FORMAT: Final = "safetensors"
_OUTPUT_MODULES: Final = frozenset({"lm_head", "embed_out"})
"""Last parts of the names of output layers, which readers make anew from the embedding when they are tied."""

_LISTED: Final = 8


def list_output(
    tensors: Collection[StoredTensor], config: Mapping[str, JsonValue], gone: Collection[str] = ()
) -> tuple[list[OutputTensor], list[Problem]]:
    """Return the tensors of a rewritten state dict as they stand, and notes on what is no longer shared.

    safetensors has no shared bytes. An output layer that is the embedding is left out where the configuration ties
    the two, as safetensors' own writers do; every other name gets numbers of its own. What is `gone` the output lacks.
    """
    tensors = [tensor for tensor in tensors if tensor.name not in gone]
    dropped: dict[str, str] = {}
    parted: list[str] = []
    for group in group_aliases(tensors):
        dropped |= _list_derived(group, config)
        names = [tensor.name for tensor in group.tensors if tensor.name not in dropped]
        parted += [group.first.name] if len(names) > 1 or group.overlapping else []
    found = "left out: it is {!r}, which config.json ties it to"
    notes = [Problem("LF611", name, found.format(kept), severity="note") for name, kept in dropped.items()]
    if parted:
        more = f" and {len(parted) - _LISTED} more" if len(parted) > _LISTED else ""
        found = "numbers that other tensors of the file share; in the output each has its own"
        notes.append(Problem("LF612", ", ".join(parted[:_LISTED]) + more, found, severity="note"))
    kept = (tensor for tensor in tensors if tensor.name not in dropped)
    return [OutputTensor(tensor.name, tensor.dtype, tensor.shape, tensor) for tensor in kept], notes


def _list_derived(group: Group, config: Mapping[str, JsonValue]) -> dict[str, str]:
    """Return the output layers among the tensors of a group, and the embedding that they are."""
    names = [tensor.name for tensor in group.tensors if is_tied_module(tensor.name)]
    layers = [name for name in names if name.rpartition(".")[0].rsplit(".", 1)[-1] in _OUTPUT_MODULES]
    embeddings = [name for name in names if name not in layers]
    return dict.fromkeys(layers, embeddings[0]) if is_tied(config) and embeddings else {}


def note_values(where: object, metadata: Mapping[str, str]) -> list[Problem]:
    """Return a note on what a checkpoint holds beside its tensors, which safetensors has no room for."""
    if not metadata:
        return []
    names = ", ".join(sorted(metadata)[:_LISTED])
    return [Problem("LF613", str(where), f"{len(metadata)} values beside the tensors: {names:.300}", severity="note")]


def warn_of_config(where: object, changes: Mapping[str, JsonValue]) -> list[Problem]:
    """Return the warning that `changes` have no `config.json` in the output to stand in."""
    if not changes:
        return []
    found = ", ".join(f"{key} = {value!r:.80}" for key, value in changes.items())
    return [Problem("LF614", str(where), found, "a model folder with its config.json", severity="warning")]


def is_same(tensors: Sequence[OutputTensor], stored: Iterable[StoredTensor]) -> bool:
    """Say whether an output holds exactly the stored tensors, in their order and form."""
    return all(tensor.is_copied for tensor in tensors) and [tensor.source for tensor in tensors] == list(stored)
