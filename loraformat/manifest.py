"""The manifest of spec/SPEC.md: the JSON text that makes a safetensors file an adapter.

It stands in the header's `__metadata__` under the key `loraformat`. This module knows its fields, their types and their
defaults; it does not know files.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from loraformat.adapter import Adapter, BaseBinding, Scaling, ScalingRule, SlotKind, Target
from loraformat.errors import LoraformatError, error_for, refuse
from loraformat.fingerprint import SAMPLES, Fingerprint
from loraformat.frozen_mapping import FrozenMapping
from loraformat.limits import MAX_DIMS
from loraformat.problems import Problem
from loraformat.strict_json import JsonValue, parse_json_object, write_canonical

MANIFEST_KEY: Final = "loraformat"
VERSION: Final = "1.0"
SHARING_VERSION: Final = "1.1"
"""The first version in which targets share tensors."""
_MAJOR: Final = 1
_VERSION_FORM: Final = re.compile(r"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)")
_VALUE_FIELD: Final = {
    ScalingRule.ALPHA_OVER_RANK: "alpha",
    ScalingRule.ALPHA_OVER_SQRT_RANK: "alpha",
    ScalingRule.MULTIPLIER: "multiplier",
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TargetEntry:
    """What the manifest says about one target: everything but its tensors."""

    kind: str
    slot: SlotKind
    rank: int
    scaling: Scaling
    fingerprint: Fingerprint | None
    options: Mapping[str, JsonValue]
    shared: Mapping[str, str] = field(default_factory=FrozenMapping)


Shared = Mapping[str, Mapping[str, str]]
"""Target to the roles whose tensors are stored with another target, each with that target's name."""

NOT_SHARED: Final[Shared] = FrozenMapping()


@dataclass(frozen=True, slots=True)
class Manifest:
    """A parsed manifest.

    Attributes:
        version: `major.minor` of the specification that the writer followed.
        targets: module path to entry.
        base: the base that the adapter belongs to.
        annotations: free text under reverse-domain or `x.` keys.
        provenance: what an earlier format said.
    """

    version: str
    targets: Mapping[str, TargetEntry]
    base: BaseBinding
    annotations: Mapping[str, str]
    provenance: Mapping[str, Any]


def build_manifest(adapter: Adapter, shared: Shared = NOT_SHARED) -> bytes:
    """Return the canonical manifest text of `adapter`, UTF-8.

    Args:
        adapter: the adapter.
        shared: which of its tensors are stored with another target.

    Raises:
        InputError: LF104 a number that not every reader of JSON holds, and whatever a reader would refuse.
    """
    manifest: dict[str, JsonValue] = {
        "version": SHARING_VERSION if shared else VERSION,
        "targets": {target.name: _entry_as_json(target, shared.get(target.name)) for target in adapter.targets},
    }
    base = {name: value for name, value in (("name", adapter.base.name), ("revision", adapter.base.revision)) if value}
    optional = {"base": base, "annotations": dict(adapter.metadata), "provenance": dict(adapter.provenance)}
    where = adapter.source or "the adapter"
    try:
        text = write_canonical(manifest | {name: value for name, value in optional.items() if value})
    except ValueError as error:
        raise refuse("LF104", where, str(error), "numbers that JSON readers hold") from error
    parse_manifest(text.decode("utf-8"), where)
    return text


def _entry_as_json(target: Target, shared: Mapping[str, str] | None) -> JsonValue:
    scaling = target.scaling
    entry: dict[str, JsonValue] = {
        "kind": target.kind,
        "slot": target.slot.value,
        "rank": target.rank,
        "scaling": {"rule": scaling.rule.value, _VALUE_FIELD[scaling.rule]: scaling.value},
    }
    if target.options:
        entry["options"] = dict(target.options)
    if shared:
        entry["shared"] = dict(shared)
    if target.fingerprint is not None:
        entry["fingerprint"] = {
            "shape": list(target.fingerprint.shape),
            "samples": list(target.fingerprint.samples),
        }
    return entry


def parse_manifest(text: str, where: object) -> Manifest:
    """Parse a manifest.

    Raises:
        InputError: LF104/LF105 not strict JSON, LF119 newer major version, LF120 unknown field, LF122 wrong type,
            LF301 a target without a name.
    """
    place = f"{where}: manifest"
    fields = _Fields(parse_json_object(text.encode("utf-8", "surrogatepass"), place), place)
    version = fields.take("version", _text)
    if not _is_readable(version, place):
        raise refuse("LF119", place, f"version {version}", f"version {_MAJOR}.x")
    targets = fields.take("targets", _object)
    base = _Fields(fields.take("base", _object, {}), f"{place}: base")
    manifest = Manifest(
        version=version,
        targets=_parse_entries(targets, place),
        base=BaseBinding(base.take("name", _optional_text, None), base.take("revision", _optional_text, None)),
        annotations=fields.take("annotations", _texts, {}),
        provenance=fields.take("provenance", _object, {}),
    )
    base.refuse_rest()
    fields.refuse_rest()
    return manifest


def _is_readable(version: str, where: str) -> bool:
    if _VERSION_FORM.fullmatch(version) is None:
        raise refuse("LF122", where, f"version {version!r:.80}", "major.minor, such as 1.0")
    return version.partition(".")[0] == str(_MAJOR)


def _parse_entries(entries: Mapping[str, JsonValue], where: str) -> dict[str, TargetEntry]:
    """Return the targets' entries; the error holds the problems of all of them."""
    parsed: dict[str, TargetEntry] = {}
    problems: list[Problem] = []
    for name, entry in entries.items():
        try:
            parsed[name] = _parse_entry(name, entry, where)
        except LoraformatError as error:
            problems += error.problems
    if problems:
        raise error_for(problems)
    return parsed


def _parse_entry(name: str, value: JsonValue, where: str) -> TargetEntry:
    place = f"{where}: target {name!r}"
    if not name:
        raise refuse("LF301", place, "an empty name", "the path of a module")
    fields = _Fields(_checked(_object, value, place), place)
    scaling = _Fields(fields.take("scaling", _object), f"{place}: scaling")
    rule = scaling.take("rule", _enum(ScalingRule))
    entry = TargetEntry(
        kind=fields.take("kind", _text),
        slot=fields.take("slot", _enum(SlotKind)),
        rank=fields.take("rank", _rank),
        scaling=Scaling(rule, scaling.take(_VALUE_FIELD[rule], _number)),
        fingerprint=_parse_fingerprint(fields.take("fingerprint", _object, None), place),
        options=fields.take("options", _object, {}),
        shared=fields.take("shared", _texts, {}),
    )
    scaling.refuse_rest()
    fields.refuse_rest()
    return entry


def _parse_fingerprint(value: Mapping[str, JsonValue] | None, where: str) -> Fingerprint | None:
    if value is None:
        return None
    fields = _Fields(value, f"{where}: fingerprint")
    fingerprint = Fingerprint(fields.take("shape", _shape), fields.take("samples", _samples))
    fields.refuse_rest()
    return fingerprint


class _Fields:
    """The fields of one JSON object, taken one by one; what is left must be allowed to be left."""

    def __init__(self, value: Mapping[str, JsonValue], where: str) -> None:
        self._left = dict(value)
        self._where = where

    def take(self, name: str, check: Callable[[JsonValue], T], *default: T) -> T:
        if name not in self._left:
            if default:
                return default[0]
            raise refuse("LF122", self._where, f"no field {name!r}", f"a field {name!r}")
        return _checked(check, self._left.pop(name), f"{self._where}: {name}")

    def refuse_rest(self) -> None:
        for name, value in self._left.items():
            if not (isinstance(value, Mapping) and value.get("must_understand") is False):
                raise refuse("LF120", self._where, f"the field {name!r}", "known fields")


def _checked(check: Callable[[JsonValue], T], value: JsonValue, where: str) -> T:
    try:
        return check(value)
    except (TypeError, ValueError) as error:
        raise refuse("LF122", where, f"{value!r:.80}", str(error)) from error


def _text(value: JsonValue) -> str:
    if not isinstance(value, str):
        raise TypeError("text")
    return value


def _optional_text(value: JsonValue) -> str | None:
    return _text(value)


def _object(value: JsonValue) -> Mapping[str, JsonValue]:
    if not isinstance(value, Mapping):
        raise TypeError("an object")
    return value


def _texts(value: JsonValue) -> Mapping[str, str]:
    return {name: _text(item) for name, item in _object(value).items()}


def _number(value: JsonValue) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError("a finite number")
    return float(value)


def _rank(value: JsonValue) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError("a whole number, not negative")
    return value


def _list(value: JsonValue) -> Sequence[JsonValue]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError("a list")
    return value


def _shape(value: JsonValue) -> tuple[int, ...]:
    sizes = tuple(map(_rank, _list(value)))
    if not 2 <= len(sizes) <= MAX_DIMS or 0 in sizes:
        raise ValueError(f"2 to {MAX_DIMS} sizes of at least 1")
    return sizes


def _samples(value: JsonValue) -> tuple[float, ...]:
    numbers = tuple(map(_number, _list(value)))
    if len(numbers) != SAMPLES:
        raise ValueError(f"{SAMPLES} numbers")
    return numbers


def _enum(kind: type[T]) -> Callable[[JsonValue], T]:
    def check(value: JsonValue) -> T:
        try:
            return kind(value)  # type: ignore[call-arg]
        except ValueError as error:
            known = ", ".join(sorted(str(member) for member in kind))  # type: ignore[attr-defined]
            raise ValueError(f"one of {known}") from error

    return check
