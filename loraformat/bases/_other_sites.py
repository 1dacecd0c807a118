"""Sites of a state dict under names that no tensor has: members of fused weights, fused modules of split ones, experts.

They let an adapter that was trained on one way of storing a model be merged into another.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Final

from loraformat.adapter import SlotKind
from loraformat.bases import Site
from loraformat.bases._fused_modules import Run, arrange, find_family, find_splits
from loraformat.bases._packed_experts import list_experts
from loraformat.bases._renamed_sites import list_splits
from loraformat.bases._tied_tables import INNER_CONFIGS
from loraformat.problems import Problem
from loraformat.spans import Part
from loraformat.strict_json import JsonValue

_PARAMETERS: Final = ("weight", "bias")
_MATRIX: Final[Mapping[SlotKind, bool]] = {
    SlotKind.LINEAR: False,
    SlotKind.LINEAR_TRANSPOSED: True,
    SlotKind.PARAMETER: False,
}
_TABLE: Final[Mapping[SlotKind, bool]] = {SlotKind.CONV: False, SlotKind.PARAMETER: False}
_ATTENTION: Final = {"in_proj_weight": "weight", "in_proj_bias": "bias"}
"""Parameters of torch's MultiheadAttention that an adapter of the module itself changes."""
_WRAPPED: Final = ".base_layer"
"""What PEFT calls a module that it wraps; checkpoints may have it, of models that bring adapters along (Phi-4)."""
_PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj")
"""What its parts are called where they are modules."""


def list_other_sites(own: Sequence[Site], alone: Sequence[Site], config: Mapping[str, JsonValue]) -> list[Site]:
    """Return what the sites of whole tensors offer besides themselves.

    Args:
        own: sites of tensors that belong to a module.
        alone: those of the model's own parameters, which can only be called by their whole names.
        config: transformers' `config.json`, empty where there is none.
    """
    stored = [site for site in own if site.weight is not None and not site.evidence.startswith("tie")]
    return [
        *_list_wrapped(stored),
        *_list_members(stored, config),
        *_list_chunks(stored, config),
        *_list_projections(stored),
        *_list_fused(stored),
        *_list_experts(stored, config),
        *_list_parameters([*stored, *(site for site in alone if site.weight is not None)]),
    ]


def _list_wrapped(sites: Sequence[Site]) -> Iterator[Site]:
    """Yield modules that were stored within PEFT's wrapper under their own names."""
    stored = {site.module for site in sites}
    for site in sites:
        name = site.module.removesuffix(_WRAPPED)
        if name != site.module and name not in stored and site.parameter in _PARAMETERS:
            yield replace(site, module=name, evidence="PEFT's base_layer", free_bias=None)


def _list_members(sites: Sequence[Site], config: Mapping[str, JsonValue]) -> Iterator[Site]:
    """Yield the members of fused weights: of each a site, or one for each of its runs of rows."""
    stored = {site.module for site in sites}
    for site in sites:
        family = find_family(site.module)
        if family is None or site.parameter not in _PARAMETERS or len(site.stored_shape()) > 2:
            continue
        parent = site.module.removesuffix(family.fused)
        rows = site.stored_shape()[-1 if site.transposed.get(SlotKind.LINEAR) else 0]
        arrangement = arrange(family, config, rows)
        for spelling in family.members:
            for index, member in enumerate(spelling):
                if f"{parent}{member}" in stored:
                    continue
                named = replace(site, module=f"{parent}{member}", evidence=f"part of {family.fused}", free_bias=None)
                if arrangement is None:
                    yield _obstruct(named, family.fused, config)
                    continue
                for run in arrangement[index]:
                    yield _cut(named, run, whole=len(arrangement[index]) == 1)


def _list_chunks(sites: Sequence[Site], config: Mapping[str, JsonValue]) -> Iterator[Site]:
    """Yield the modules that transformers makes of one of a checkpoint's, each of as many of its rows."""
    stored = {site.module for site in sites}
    for pattern, members in list_splits(config):
        for site in (each for each in sites if pattern.search(each.module) and each.parameter in _PARAMETERS):
            size, rest = divmod(site.stored_shape()[0], len(members))
            for index, member in enumerate(() if rest else members):
                name = pattern.sub(member, site.module)
                if name not in stored:
                    named = replace(site, module=name, evidence=f"part of {site.module}", free_bias=None)
                    yield _cut(named, Run(0, index * size, size), whole=True)


def _list_projections(sites: Sequence[Site]) -> Iterator[Site]:
    """Yield q, k and v of torch's MultiheadAttention, which has them one below the other, of one size."""
    stored = {site.module for site in sites}
    for site in sites:
        alias = _ATTENTION.get(site.parameter)
        size, rest = divmod(site.stored_shape()[0], len(_PROJECTIONS))
        if alias is None or rest:
            continue
        orientation = _MATRIX if alias == "weight" else site.transposed
        for index, name in enumerate(_PROJECTIONS):
            if f"{site.module}.{name}" not in stored:
                evidence = f"part of {site.parameter}"
                named = replace(site, module=f"{site.module}.{name}", parameter=alias, evidence=evidence)
                yield _cut(replace(named, transposed=orientation), Run(0, index * size, size), whole=True)


def _obstruct(site: Site, fused: str, config: Mapping[str, JsonValue]) -> Site:
    """Return a member whose rows nothing tells; its weight stays, so that a target of it is told why."""
    model_type = config.get("model_type")
    found = f"the model_type {model_type!r} in config.json" if model_type else "no model_type in a config.json"
    expected = "a family of which it is known how the rows lie"
    obstacle = Problem("LF416", f"{site.module} in {fused}", found, expected)
    return replace(site, weight=None, obstacle=obstacle, transposed=_no_table(site.transposed))


def _cut(site: Site, run: Run, *, whole: bool) -> Site:
    rows, columns = (*site.stored_shape(), 1)[:2]
    lines = (run.stored, run.stored + run.rows, 1)
    turned = site.transposed.get(SlotKind.LINEAR, False)
    part = Part((rows, columns), (0, rows, 1), lines) if turned else Part((rows, columns), lines, (0, columns, 1))
    section = None if whole else (run.start, run.start + run.rows)
    return replace(site, part=part, section=section, transposed=_no_table(site.transposed))


def _no_table(orientation: Mapping[SlotKind, bool]) -> Mapping[SlotKind, bool]:
    return {slot: turned for slot, turned in orientation.items() if slot is not SlotKind.EMBEDDING}


def _list_fused(sites: Sequence[Site]) -> Iterator[Site]:
    """Yield fused modules that the base stores in parts: a site for each part, on a section of the module."""
    for parameter in _PARAMETERS:
        by_module = {site.module: site for site in sites if site.parameter == parameter}
        plain = {
            name: site.stored_shape()[0]
            for name, site in by_module.items()
            if len(site.stored_shape()) == (2 if parameter == "weight" else 1)
            and not site.transposed.get(SlotKind.LINEAR)
        }
        for fused, parts in find_splits(plain):
            stops = list(accumulate(rows for _, rows in parts))
            for (name, rows), stop in zip(parts, stops, strict=True):
                orientation = _no_table(by_module[name].transposed)
                evidence = f"{len(parts)} modules stored apart"
                yield replace(
                    by_module[name],
                    module=fused,
                    evidence=evidence,
                    section=(stop - rows, stop),
                    transposed=orientation,
                    free_bias=None,
                )


def _list_experts(sites: Iterable[Site], config: Mapping[str, JsonValue]) -> Iterator[Site]:
    for site in sites:
        if len(site.stored_shape()) == 3 and site.parameter not in _PARAMETERS and site.weight is not None:
            coded = site.weight.coding is not None
            family = _family_of(config)
            packed = list_experts(site.weight.tensor, site.module, site.parameter, family, is_coded=coded)
            for module, part, orientation in packed:
                yield replace(
                    site,
                    module=module,
                    parameter="weight",
                    evidence="packed experts",
                    part=part,
                    transposed=orientation,
                )


def _family_of(config: Mapping[str, JsonValue]) -> JsonValue:
    """Return the text model's `model_type`, where it stands apart."""
    inner = (config.get(key) for key in INNER_CONFIGS)
    named = [part.get("model_type") for part in inner if isinstance(part, Mapping)]
    return (named or [config.get("model_type")])[0]


def _list_parameters(sites: Sequence[Site]) -> Iterator[Site]:
    """Yield parameters that are no module's weight under their whole names, and attention's under its module's.

    These are vectors, such as the `scale` of norms, matrices, and tables of several axes for all rows alike: the
    modulations of Wan are `(1, 6, dim)`.
    """
    modules = {(site.module, site.parameter) for site in sites}
    for site in sites:
        if site.parameter in _PARAMETERS:
            continue
        alias = _ATTENTION.get(site.parameter, "")
        if not alias and len(site.stored_shape()) == 2:
            yield replace(site, module=site.id, parameter="weight", transposed=_MATRIX)
        elif not alias and (len(site.stored_shape()) == 1 or site.stored_shape()[:1] == (1,)):
            yield replace(site, module=site.id, parameter="weight", transposed=_TABLE)
        elif alias and (site.module, alias) not in modules:
            orientation = _MATRIX if alias == "weight" else site.transposed
            yield replace(site, parameter=alias, evidence="torch's MultiheadAttention", transposed=orientation)
