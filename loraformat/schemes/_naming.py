"""How a scheme's modules become targets: a prefix stands for a component, and a path may be flattened.

Flattening (`_` for every dot) cannot be undone by looking at the text. It is undone by the tables of `spec/names/` or
by the module list of the base, and only where all that fit agree.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from loraformat.base_facts import BaseFacts
from loraformat.problems import Problem
from loraformat.schemes._flat_names import FlatIndex, refuse_flat
from loraformat.spellings import Reading, SpellingTable, all_tables, read_names
from loraformat.strict_json import JsonValue

COMPONENTS: Final = (
    *("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior"),
    *("connectors", "controlnet", "text_conditioner", "diffusion_model"),
)
"""What diffusers calls the models of a pipeline; `diffusion_model` for one that no table knows."""
BUNDLED: Final = "bundle_emb"
"""What stands before the name of a token whose embedding lies beside the factors (OneTrainer, A1111)."""
DENOISERS: Final = frozenset({"unet", "transformer", "transformer_2", "prior", "diffusion_model"})
"""The components that are what a pipeline is about."""
_GPT: Final = re.compile(r"transformer\.(?:h\.\d|wte|wpe|ln_f)")
"""What GPT-2 and its descendants call their decoder, which is no component of a pipeline."""
_LISTED: Final = 4


@dataclass(slots=True)
class NamesRead:
    """What became of a scheme's module names.

    Attributes:
        targets: module as the scheme has it, to target.
        problems: what could not be told, and notes on how it was.
        remembered: what `write` needs to restore the scheme's own names.
    """

    targets: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    remembered: dict[str, JsonValue] = field(default_factory=dict)


@dataclass(slots=True)
class NamesWritten:
    """Target to module as the scheme has it."""

    modules: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class Naming(Protocol):
    """Between modules as a scheme calls them and targets."""

    def read(self, modules: Sequence[str], facts: BaseFacts) -> NamesRead:
        """Return the targets of all modules of a file."""
        ...

    def write(self, targets: Sequence[str], facts: BaseFacts, remembered: Mapping[str, JsonValue]) -> NamesWritten:
        """Return the modules of all targets of an adapter."""
        ...


@dataclass(frozen=True, slots=True)
class PlainNaming:
    """Targets are called as they are, behind a prefix."""

    prefix: str = ""

    def read(self, modules: Sequence[str], facts: BaseFacts) -> NamesRead:
        """Return the names without the prefix."""
        return NamesRead({module: module.removeprefix(self.prefix) for module in modules})

    def write(self, targets: Sequence[str], facts: BaseFacts, remembered: Mapping[str, JsonValue]) -> NamesWritten:
        """Return the names with the prefix."""
        return NamesWritten({target: f"{self.prefix}{target}" for target in targets})


def split_component(target: str) -> tuple[str, str]:
    """Return the component of a target's name, empty when it has none, and the path in it."""
    first, dot, rest = target.partition(".")
    is_part = dot and (first in COMPONENTS or first == BUNDLED) and not _GPT.match(target)
    return (first, rest) if is_part else ("", target)


@dataclass(frozen=True, slots=True)
class ComponentNaming:
    """A prefix for each component, then the path, dotted or flat.

    Attributes:
        names: what the tables call the scheme, for its prefixes.
        prefixes: prefix to component, where no table says otherwise; one of them may be empty.
        flat: whether dots are written as `_`.
    """

    names: str
    prefixes: Mapping[str, str]
    flat: bool = False

    @property
    def _separator(self) -> str:
        return "_" if self.flat else "."

    def list_prefixes(self) -> list[str]:
        """Return every prefix with its separator, the longest first."""
        tables = (table.schemes[self.names].prefixes for table in all_tables() if self.names in table.schemes)
        known = {prefix for each in (self.prefixes, *tables) for prefix in each if prefix}
        return sorted((f"{prefix}{self._separator}" for prefix in known), key=len, reverse=True)

    def read(self, modules: Sequence[str], facts: BaseFacts) -> NamesRead:
        """Return the targets, each `<component>.<path>`."""
        result = NamesRead({module: module for module in modules if _is_bundled(module)})
        groups = self._group(module for module in modules if not _is_bundled(module))
        readings = {prefix: read_names(paths.values(), flat=self.flat) for prefix, paths in groups.items()}
        components = self._choose_components(readings)
        for prefix, paths in sorted(groups.items()):
            component = components[prefix]
            fitting = [reading for reading in readings[prefix] if _may_be(reading, component)]
            dotted = self._unflatten(prefix, paths, fitting, facts, result)
            for module, path in dotted.items():
                result.targets[module] = f"{component}.{path}" if component else path
            if not prefix and not self.flat and component:
                result.remembered["bare"] = component
        return result

    def _group(self, modules: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return prefix to module to the path behind the prefix."""
        groups: dict[str, dict[str, str]] = defaultdict(dict)
        prefixes = self.list_prefixes()
        for module in modules:
            prefix = next((each for each in prefixes if module.startswith(each)), "")
            path = module.removeprefix(prefix)
            groups[prefix.removesuffix(self._separator)][module] = path.strip("_") if self.flat else path
        return groups

    def _choose_components(self, readings: Mapping[str, Sequence[Reading]]) -> dict[str, str]:
        """Return prefix to component: as the table of the denoiser has it, else the scheme's own default."""
        stated = dict(self.prefixes)
        for prefix, found in readings.items():
            best = next((each.table for each in _whole(found) if DENOISERS.intersection(each.table.components)), None)
            if best is not None and self._is_of_denoiser(prefix):
                names = best.schemes.get(self.names)
                stated |= names.prefixes if names else {}
                if self.prefixes.get(prefix, "") in ("", "diffusion_model"):
                    stated[prefix] = best.components[0]
        return {prefix: stated.get(prefix, "") for prefix in readings}

    def _is_of_denoiser(self, prefix: str) -> bool:
        component = self.prefixes.get(prefix, "")
        return component in DENOISERS or not component

    def _unflatten(
        self, prefix: str, paths: Mapping[str, str], readings: Sequence[Reading], facts: BaseFacts, result: NamesRead
    ) -> Mapping[str, str]:
        """Return module to dotted path; a flat one that cannot be told is a problem, and left out."""
        whole = _whole(readings)
        if whole:
            more = f"; {len(whole) - _LISTED} more tables have them" if len(whole) > _LISTED else ""
            evidence = "; ".join(map(str, whole[:_LISTED])) + more
            result.problems.append(Problem("LF323", f"{prefix or 'names'}", evidence, severity="note"))
        if not self.flat:
            return paths
        index = FlatIndex.of(facts.modules)
        whole = [reading for reading in whole if self._is_own(reading)] or whole
        dotted: dict[str, str] = {}
        for module, path in paths.items():
            options = index.list_options(path, whole)
            if len(options) == 1:
                dotted[module] = options[0]
            else:
                result.problems.append(refuse_flat(module, path, options, readings, facts))
        return dotted

    def _is_own(self, reading: Reading) -> bool:
        """Say whether a spelling is the one in which the scheme is written, of several that are alike when flat."""
        names = reading.table.schemes.get(self.names)
        return names is not None and names.spelling == reading.spelling

    def write(self, targets: Sequence[str], facts: BaseFacts, remembered: Mapping[str, JsonValue]) -> NamesWritten:
        """Return prefix and path of every target."""
        result = NamesWritten({target: target for target in targets if _is_bundled(target)})
        groups: dict[str, dict[str, str]] = defaultdict(dict)
        for target in (each for each in targets if not _is_bundled(each)):
            component, path = split_component(target)
            groups[component][target] = path
        readings = {component: read_names(paths.values()) for component, paths in groups.items()}
        prefixes = self._invert(readings)
        for component, paths in groups.items():
            known = bool(_whole(readings[component])) or set(paths.values()) <= facts.modules
            prefix = "" if remembered.get("bare") == component else prefixes.get(component)
            for target, path in paths.items():
                if prefix is None or (self.flat and not known):
                    result.problems.append(_refuse_name(target, component, readings[component]))
                elif prefix:
                    result.modules[target] = f"{prefix}{self._separator}{self._flatten(path)}"
                else:
                    result.modules[target] = path
        return result

    def _invert(self, readings: Mapping[str, Sequence[Reading]]) -> dict[str, str]:
        """Return component to prefix."""
        prefixes = _turn(self.prefixes)
        for component, found in readings.items():
            best = _whole(found)
            names = best[0].table.schemes.get(self.names) if best and component in DENOISERS else None
            if names:
                prefixes |= _turn(names.prefixes)
        return prefixes

    def _flatten(self, path: str) -> str:
        return path.replace(".", "_") if self.flat else path


def _may_be(reading: Reading, component: str) -> bool:
    """Say whether a component can have a table's names: a text encoder has none of a transformer's."""
    own = reading.table.components
    return not own or component in ("", "diffusion_model") or component in own


def _is_bundled(name: str) -> bool:
    return name.startswith(f"{BUNDLED}.")


def _turn(prefixes: Mapping[str, str]) -> dict[str, str]:
    """Return component to the first prefix that stands for it."""
    turned: dict[str, str] = {}
    for prefix, component in prefixes.items():
        if component:
            turned.setdefault(component, prefix)
    return turned


def _whole(readings: Sequence[Reading]) -> list[Reading]:
    """Return the readings that know every name."""
    return [reading for reading in readings if not reading.missed]


def _refuse_name(target: str, component: str, readings: Sequence[Reading]) -> Problem:
    best = readings[0] if readings else None
    if best is not None and not best.missed:
        found = f"a name as {best.table.title} has it ({best.spelling}); the target's scheme has none for it"
        return Problem("LF310", target, found, "a model that both have names for")
    closest = f"; closest: {best}" if best is not None else ""
    found = f"{f'the component {component!r}' if component else 'no component'}, in no table{closest}"
    return Problem("LF310", target, found, "a model that a table of names knows")


def find_denoiser(targets: Iterable[str]) -> list[SpellingTable]:
    """Return the tables that know every name of a denoiser among the targets' components."""
    groups: dict[str, list[str]] = defaultdict(list)
    for target in targets:
        component, path = split_component(target)
        groups[component].append(path)
    found = (
        reading.table for name, paths in groups.items() if name in DENOISERS for reading in _whole(read_names(paths))
    )
    return list(dict.fromkeys(found))
