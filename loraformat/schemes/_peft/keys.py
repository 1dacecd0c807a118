"""The keys of PEFT's files: wrappers' prefixes, names of adapters, parameters of modules that were saved whole."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from loraformat.problems import Problem
from loraformat.schemes import Bundle
from loraformat.schemes._peft.config import PeftConfig
from loraformat.schemes._peft.groups import REPLACE, Group, compose, list_buffers, note_left_out
from loraformat.schemes._several import keep_chosen, refuse_several
from loraformat.schemes._table import Name, NameTable, Row

PREFIX: Final = "base_model.model."
_DATA_PARALLEL: Final = "module."
"""Wraps the whole model; further in, it may be a module's own name."""
_WRAPPERS: Final = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Wrap any module."""
_INNER: Final = re.compile(r"\.modules_to_save\.([^.]+)(?=\.(?!weight$|bias$))")
"""Stands before the modules and parameters of one that was saved whole, in the state dict of a model."""
_ADAPTER: Final = "{adapter}"


@dataclass(slots=True)
class _Reading:
    """What was met on the way through the keys.

    Attributes:
        stripped: prefixes that were left out.
        adapters: names of adapters.
    """

    stripped: set[str] = field(default_factory=set)
    adapters: set[str] = field(default_factory=set)


def group_tensors(bundle: Bundle, config: PeftConfig, table: NameTable) -> tuple[dict[str, Group], list[Problem]]:
    """Return the tensors by target, wrappers' prefixes removed, and problems of unknown or colliding keys."""
    groups: dict[str, Group] = {}
    reading = _Reading()
    buffers = list_buffers(bundle.tensors)
    problems: list[Problem] = note_left_out(buffers)
    left_out, saved = frozenset(buffers), _list_saved(config)
    for key, tensor in bundle.tensors.items():
        if key in left_out:
            continue
        name = _read_key(key, reading, table, None if key in bundle.beside else saved)
        if name is None:
            problems.append(Problem("LF202", key, f"a tensor of shape {tensor.shape}", "a role that PEFT has"))
            continue
        group = groups.setdefault(name.target, Group({}, set()))
        if name.row.role in group.factors:
            problems.append(Problem("LF302", key, f"a second {name.row.role} for {name.target}", "one"))
            continue
        group.factors[name.row.role] = tensor
        group.kinds.add(name.row.kind)
    if len(reading.adapters) > 1 and any(problem.code == "LF302" for problem in problems):
        problems = [refuse_several(bundle, reading.adapters)]
    if reading.stripped:
        found = f"the prefixes {', '.join(sorted(reading.stripped))} in its names, left out"
        problems.append(Problem("LF304", str(bundle.path), found, severity="note"))
    composed, notes = compose(groups, is_named=bool(reading.adapters))
    return composed, problems + notes


def choose_adapter(bundle: Bundle, table: NameTable) -> tuple[Bundle, list[Problem]]:
    """Return the bundle without the tensors of adapters that were not chosen, and a note of these.

    Raises:
        FindingError: LF242 the chosen one is not among them.
    """
    return keep_chosen(bundle, name_adapters(bundle, table) if bundle.adapter else {})


def name_adapters(bundle: Bundle, table: NameTable) -> dict[str, str]:
    """Return the keys in which an adapter's name stands, each with that name."""
    names: dict[str, str] = {}
    for key in bundle.tensors:
        reading, inner = _Reading(), _INNER.search(key)
        _read_key(key, reading, table, None)
        for name in (*reading.adapters, *(inner.groups() if inner else ())):
            names[key] = name
    return names


def _list_saved(config: PeftConfig) -> list[str]:
    stated = config.fields.get("modules_to_save")
    return [each for each in stated if isinstance(each, str)] if isinstance(stated, list | tuple) else []


def _read_key(key: str, reading: _Reading, table: NameTable, saved: Collection[str] | None) -> Name | None:
    """Return what a key says; of a module that is saved whole, any parameter, None being all modules."""
    for wrapper in _WRAPPERS:
        while f".{wrapper}" in f".{key}":
            key = f".{key}".replace(f".{wrapper}", ".", 1)[1:]
            reading.stripped.add(wrapper)
    for prefix in ("", PREFIX):
        key = key.removeprefix(prefix)
        while key.startswith(_DATA_PARALLEL):
            key = key.removeprefix(_DATA_PARALLEL)
            reading.stripped.add(_DATA_PARALLEL)
    key = _INNER.sub("", key)
    name = table.read(key)
    if name is None:
        return _read_parameter(key, saved)
    if _ADAPTER in name.row.pattern:
        reading.adapters.add(_find_adapter(key, name.row.pattern))
    return name


def _find_adapter(key: str, pattern: str) -> str:
    parts = pattern.split(".")
    return key.split(".")[-len(parts) :][parts.index(_ADAPTER)]


def _read_parameter(key: str, saved: Collection[str] | None) -> Name | None:
    """Return a parameter that is called neither weight nor bias, such as `cls_token`, of a module saved whole."""
    module, dot, parameter = key.rpartition(".")
    above = list(accumulate(module.split("."), "{}.{}".format))
    # PEFT compares ends of names without a look at the dot before them.
    is_saved = saved is None or any(each.endswith(entry) for each in above for entry in saved)
    if not dot or not is_saved or not parameter.isidentifier():
        return None
    return Name(module, Row(parameter, REPLACE, parameter))
