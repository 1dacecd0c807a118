"""The one engine behind schemes that are tables: it reads and writes by the same rows.

A scheme says how modules are called (`Naming`), how their tensors are called and stored (`NameTable`), where the scale
stands (`ScalePlace`), and by which marks it is known (`Marks`). Everything else is here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from loraformat.adapter import Adapter, BaseBinding, Factor, Target
from loraformat.base_facts import BaseFacts
from loraformat.errors import error_for
from loraformat.manifest import MANIFEST_KEY
from loraformat.problems import Problem
from loraformat.schemes import Bundle, Holds, StatedScale, WrittenBundle
from loraformat.schemes._beside import Module
from loraformat.schemes._foreign import refuse_tensor
from loraformat.schemes._groups import name_kind, rank_of, slot_of
from loraformat.schemes._marks import NOISE, Alias, Marks
from loraformat.schemes._memory import PROVENANCE_KEY, annotate, find_memory, find_texts, recall
from loraformat.schemes._naming import NamesRead, Naming
from loraformat.schemes._options import find_homeless_options, read_options, remember_options, write_options
from loraformat.schemes._scales import ScalePlace, ScalesWritten
from loraformat.schemes._table import NameTable
from loraformat.strict_json import JsonValue

_STALE: Final = ("sshs_", PROVENANCE_KEY, MANIFEST_KEY)
"""Annotations that are about the bytes of one file, and must not be copied into another."""


Fit = Callable[[Sequence[Target]], tuple[list[Target], list[Problem]]]
"""Makes targets fit into a scheme; returns them with what that cost."""


@dataclass(slots=True)
class _Group:
    """The tensors of one module."""

    factors: dict[str, Factor] = field(default_factory=dict)
    sidecars: dict[str, Factor] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TableReader:
    """A scheme that is a table and is only read.

    Attributes:
        name: as in `--scheme`.
        title: one line for people.
        rows: how tensors are called.
        naming: how modules are called.
        scale: where the scale stands.
        marks: by what it is known.
        names: what the tables of `spec/names/` call it, or a scheme that spells modules in the same way.
        aliases: other ways to write its keys, tried in order, each once.
        keep_metadata: whether a file's annotations are its own and come back when it is written again.
        holds: what its files have a place for.
    """

    name: str
    title: str
    rows: NameTable
    naming: Naming
    scale: ScalePlace
    marks: Marks
    names: str = ""
    aliases: tuple[Alias, ...] = NOISE
    keep_metadata: bool = True
    holds: Holds = field(kw_only=True)

    def detect(self, bundle: Bundle) -> str | None:
        """Return how many of the tensors are called as this scheme calls them."""
        return self.marks.find(bundle)

    def read(self, bundle: Bundle, stated: StatedScale) -> Adapter:
        """Return the adapter; tensors and names that nothing knows are problems of it."""
        groups, problems = self._group(bundle)
        names = self.naming.read(sorted(groups), bundle.facts)
        problems += names.problems
        problems += _find_twins(names.targets)
        modules = [
            Module(target, rank_of(groups[module].factors), groups[module].sidecars)
            for module, target in sorted(names.targets.items(), key=lambda item: item[1])
        ]
        if not any(group.factors for group in groups.values()):
            raise error_for(
                [
                    *_errors(problems),
                    Problem("LF212", str(bundle.path), f"{len(bundle.tensors)} tensors, none of a target", "factors"),
                ]
            )
        scales = self.scale.read(modules, bundle, stated)
        by_name = {target: groups[module] for module, target in names.targets.items()}
        targets = [self._make_target(module, by_name[module.name], scales.scalings) for module in modules]
        memory = self._remember(bundle, names, groups) | scales.remembered
        provenance = recall(bundle.metadata)
        return Adapter(
            targets=tuple(target for target in targets if target.factors),
            base=_find_base(bundle),
            scheme=self.name,
            source=str(bundle.path),
            provenance=provenance | ({self.name: memory} if memory else {}),
            problems=(*problems, *scales.problems, *_find_orphans(targets)),
            absorbed=tuple(tensor for module in modules for tensor in module.sidecars.values()),
        )

    def _group(self, bundle: Bundle) -> tuple[dict[str, _Group], list[Problem]]:
        groups: dict[str, _Group] = {}
        problems: list[Problem] = []
        for key, tensor in sorted(bundle.tensors.items()):
            name = self.rows.read(self._normalise(key), tensor)
            if name is None:
                problems.append(refuse_tensor(key, tensor))
                continue
            group = groups.setdefault(name.target, _Group())
            room = group.factors if name.row.kind else group.sidecars
            if name.row.role in room:
                problems.append(Problem("LF302", key, f"a second {name.row.role} for {name.target}", "one"))
                continue
            room[name.row.role] = name.row.turn.read(tensor)
            group.keys[name.row.role] = key
            group.kinds |= {name.row.kind} - {""}
        return groups, problems

    def _normalise(self, key: str) -> str:
        for alias in self.aliases:
            key = re.sub(alias.expression, alias.key, key)
        return key

    def _make_target(self, module: Module, group: _Group, scalings: Mapping[str, Any]) -> Target:
        kind = name_kind(group.kinds)
        slot = slot_of(kind, group.factors)
        options = read_options(kind, module)
        return Target(module.name, kind, slot, group.factors, module.rank, scalings[module.name], options=options)

    def _remember(self, bundle: Bundle, names: NamesRead, groups: Mapping[str, _Group]) -> dict[str, JsonValue]:
        """Return the file's own annotations, for whoever wants to know."""
        own: dict[str, JsonValue] = {key: text for key, text in bundle.metadata.items() if not key.startswith(_STALE)}
        return {"metadata": own} if own and self.keep_metadata else {}


@dataclass(frozen=True)
class TableScheme(TableReader):
    """A scheme that is a table, read and written by the same rows.

    Attributes:
        fits: what is done to the targets before they are written, in order.
    """

    fits: tuple[Fit, ...] = ()

    def _remember(self, bundle: Bundle, names: NamesRead, groups: Mapping[str, _Group]) -> dict[str, JsonValue]:
        """Return the file's own annotations, and the keys that would be written otherwise."""
        memory = super()._remember(bundle, names, groups) | names.remembered
        written_names = self.naming.write(sorted(names.targets.values()), bundle.facts, names.remembered)
        odd: dict[str, JsonValue] = {}
        for module, target in names.targets.items():
            for role, key in groups[module].keys.items():
                row = self.rows.find(role, name_kind(groups[module].kinds))
                written = f"{written_names.modules.get(target)}.{row.pattern}" if row else ""
                if written != key:
                    odd[f"{target} {role}"] = key
        memory |= remember_options({target: groups[module].sidecars for module, target in names.targets.items()})
        return memory | ({"keys": odd} if odd else {})

    def write(self, adapter: Adapter, facts: BaseFacts) -> WrittenBundle:
        """Return the tensors under this scheme's names."""
        memory = find_memory(adapter.provenance, self.name)
        problems = check_holds(self.name, self.holds, adapter)
        refused = {problem.where for problem in problems}
        held = tuple(target for target in adapter.targets if target.name not in refused)
        fitted, found = self.fit(replace(adapter, targets=held))
        targets = fitted.targets
        names = self.naming.write([target.name for target in targets], facts, memory)
        scales = self.scale.write(targets, memory)
        problems += found + names.problems + scales.problems
        tensors: dict[str, Factor] = {}
        for target in targets:
            if target.name in names.modules:
                problems += self._place(target, names.modules[target.name], scales, memory, tensors)
        return WrittenBundle(
            tensors=tensors,
            metadata=self._annotate(adapter, memory) | scales.metadata,
            config=scales.config,
            problems=tuple(problems),
        )

    def fit(self, adapter: Adapter) -> tuple[Adapter, list[Problem]]:
        """Return the adapter with targets that the scheme can hold, and what that cost."""
        targets: Sequence[Target] = adapter.targets
        problems: list[Problem] = []
        for fit in self.fits:
            targets, found = fit(targets)
            problems += found
        return replace(adapter, targets=tuple(targets)), problems

    def _place(
        self,
        target: Target,
        module: str,
        scales: ScalesWritten,
        memory: Mapping[str, JsonValue],
        tensors: dict[str, Factor],
    ) -> list[Problem]:
        """Put the tensors of one target under their keys; return what has no row, and keys that are taken."""
        odd = find_texts(memory, "keys")
        problems = find_homeless_options(target)
        beside = {**scales.sidecars.get(target.name, {}), **write_options(target, memory)}
        for role, factor in {**target.factors, **beside}.items():
            row = self.rows.find(role, target.kind)
            if row is None:
                found = f"{role} of shape {factor.shape}"
                problems.append(Problem("LF312", target.name, found, f"a role that {self.name} has"))
                continue
            key = odd.get(f"{target.name} {role}") or f"{module}.{row.pattern}"
            if key in tensors:
                problems.append(Problem("LF302", key, f"{role} of {target.name}, and another tensor", "one of them"))
            tensors[key] = row.turn.write(factor)
        return problems

    def _annotate(self, adapter: Adapter, memory: Mapping[str, JsonValue]) -> dict[str, str]:
        own = find_texts(memory, "metadata")
        carried = {name: value for name, value in adapter.provenance.items() if name != self.name}
        kept = {name: value for name, value in memory.items() if name != "metadata"}
        return own | annotate(carried | ({self.name: kept} if kept else {}))


def check_holds(scheme: str, holds: Holds, adapter: Adapter) -> list[Problem]:
    """Return the targets of kinds and slots that a scheme has no place for."""
    problems = []
    for target in adapter.targets:
        if target.kind not in holds.kinds:
            found = f"the kind {target.kind!r}"
            problems.append(
                Problem("LF312", target.name, found, f"one that {scheme} holds: {', '.join(sorted(holds.kinds))}")
            )
        elif target.slot not in holds.slots:
            slots = ", ".join(sorted(slot.value for slot in holds.slots))
            problems.append(
                Problem("LF312", target.name, f"the slot {target.slot.value!r}", f"one that {scheme} holds: {slots}")
            )
    return problems


def _errors(problems: Sequence[Problem]) -> list[Problem]:
    return [problem for problem in problems if problem.severity == "error"]


def _find_twins(targets: Mapping[str, str]) -> list[Problem]:
    """Return the targets that two modules of the file would be."""
    seen: dict[str, str] = {}
    problems = []
    for module, target in sorted(targets.items()):
        if target in seen:
            problems.append(Problem("LF302", module, f"{target}, as is {seen[target]}", "one name for a target"))
        seen.setdefault(target, module)
    return problems


def _find_orphans(targets: Sequence[Target]) -> list[Problem]:
    """Return the modules of which only what stands beside factors is stored."""
    return [
        Problem("LF201", target.name, "an alpha, or another number, alone", "the factors that it is for")
        for target in targets
        if not target.factors
    ]


def _find_base(bundle: Bundle) -> BaseBinding:
    """Return the base as a configuration or kohya's annotations call it."""
    config = bundle.config or {}
    stated = config.get("base_model_name_or_path")
    name = stated if isinstance(stated, str) else bundle.metadata.get("ss_sd_model_name")
    return BaseBinding(name or None)
