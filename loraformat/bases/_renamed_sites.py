"""Sites of a checkpoint under the names that transformers gives its tensors when it loads them.

A model's code may call a module otherwise than its checkpoints: `vit.layers.0.attention.q_proj` is stored as
`vit.encoder.layer.0.attention.attention.query`. PEFT trains what the code has. Which family has which renames is a
table of transformers' own (`spec/names/renames`), read by the `model_type`s of `config.json`, those of inner models
too. A rename gives a further name, and never takes one that a tensor has.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Final, TypeAlias

from loraformat.bases import Site
from loraformat.spellings import read_renames_file
from loraformat.strict_json import JsonValue

RENAMED: Final = "transformers' name"
"""Evidence of such a site."""

_Rows: TypeAlias = tuple[tuple[re.Pattern[str], str], ...]

Split: TypeAlias = tuple[re.Pattern[str], tuple[str, ...]]
"""An expression on the end of a module's name, and what its members are called in place of it."""

_MAX_DEPTH: Final = 3
_MAX_STEPS: Final = 6
"""Of a model and those inside it, so many families are heard: each may double the names of a tensor."""


def list_renamed_sites(own: Sequence[Site], config: Mapping[str, JsonValue]) -> list[Site]:
    """Return sites of stored tensors under their other names, where `config.json` tells the family.

    Args:
        own: the sites of the tensors as they are called.
        config: transformers' `config.json`, empty where there is none.
    """
    types = tuple(dict.fromkeys(_list_types(config, _MAX_DEPTH)))
    steps = _find_steps(types)[:_MAX_STEPS]
    taken = {(site.module, site.parameter) for site in own}
    renamed = []
    for site in own if steps else ():
        for name in _list_names(f"{site.module}.{site.parameter}".removeprefix("."), steps):
            module, _, parameter = name.rpartition(".")
            if module and (module, parameter) not in taken:
                renamed.append(replace(site, module=module, parameter=parameter, evidence=RENAMED))
    return renamed


@cache
def _read_splits(types: tuple[str, ...]) -> tuple[Split, ...]:
    table = read_renames_file("transformers")["splits"] if types else {}
    rows = [row for name in types for row in table.get(name, ())]
    return tuple((re.compile(rf"{pattern}$"), tuple(members)) for pattern, members in rows)


def list_splits(config: Mapping[str, JsonValue]) -> tuple[Split, ...]:
    """Return which modules of a family's checkpoints are several in its code, of as many rows each."""
    return _read_splits(tuple(dict.fromkeys(_list_types(config, _MAX_DEPTH))))


def _list_types(config: Mapping[str, JsonValue], depth: int) -> Iterator[str]:
    """Yield the `model_type` of a configuration and of those inside it."""
    own = config.get("model_type")
    if isinstance(own, str):
        yield own
    for value in config.values() if depth else ():
        if isinstance(value, Mapping):
            yield from _list_types(value, depth - 1)


@cache
def _find_steps(types: tuple[str, ...]) -> tuple[_Rows, ...]:
    """Return the renames of families, one step after the other; those of all families last."""
    if not types:
        return ()
    table = read_renames_file("transformers")
    families = [step for name in types for step in table["families"].get(name, ())]
    return tuple(tuple((re.compile(old), new) for old, new in step) for step in [*families, *table["all"]])


def _list_names(name: str, steps: Sequence[_Rows]) -> list[str]:
    """Return what a tensor may be called besides, through any of the steps."""
    names = {name: None}
    for step in steps:
        names |= dict.fromkeys(_rename(each, step) for each in list(names))
    return list(names)[1:]


def _rename(name: str, rows: _Rows) -> str:
    for pattern, replacement in rows:
        name = pattern.sub(replacement, name, count=1)
    return name
