"""What a merge did, as data: kept inside the merged model and printed."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from loraformat.errors import refuse
from loraformat.frozen_mapping import FrozenMapping
from loraformat.limits import MAX_SAFETENSORS_HEADER_BYTES
from loraformat.problems import Problem, count_problems
from loraformat.strict_json import as_object, write_canonical

RECEIPT_KEY = "loraformat.receipt"
"""The metadata key under which a merged model carries its receipt."""

RUNTIME_KEY: Final = "loraformat.runtime"
"""The metadata key under which a model says which of its inputs adapters go into."""

RECEIPT_VERSION = "1.0"

_DIGEST: Final = "sha256"
"""The field of a receipt that says whether the others are as they were written."""
_WRITTEN: Final = frozenset(
    {"version", "base", "plan_sha256", "adapters", "weights", "unmatched", "room_bytes", "options", "parent"}
)


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """One adapter of a merge.

    Attributes:
        name: file or folder name.
        sha256: digest of the file with the factors, hexadecimal.
        weight: the factor that the user gave it.
        targets: number of its targets that were merged.
    """

    name: str
    sha256: str
    weight: float
    targets: int


@dataclass(frozen=True, slots=True)
class MergedWeight:
    """One weight of the base that was rewritten, or a copy of one that others read too.

    Attributes:
        name: its name in the base, or the copy's.
        targets: the adapter targets that it took in, one entry for each adapter.
        scales: effective multiplier of each entry of `targets`, the user's weight included.
        retained: share of the delta that survived rounding: Σ Δ·(W′−W) / Σ Δ²; 1.0 for a zero delta. Of a large weight
            that is only added to, some rows of one tile in four are summed, for this and the next two.
        relative: ‖Δ‖ / ‖W‖, both Frobenius norms; infinite for a weight of zeros, which JSON has as null.
        error: the largest rounding error |W′ − (W+Δ)| beside the largest |W+Δ| of its tile.
        copied_from: name of the weight that it is a changed copy of, which is as it was; empty where it was rewritten.
        added: of a bias that the base, a graph, lacked, what was added to read it; else empty.
    """

    name: str
    targets: tuple[str, ...]
    scales: tuple[float, ...]
    retained: float
    relative: float
    error: float
    copied_from: str = ""
    added: str = ""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a merge did.

    Attributes:
        output: path of the merged model; not part of the bytes kept in it.
        base: name, size in bytes and digest of the base's structure (everything but the weights' payloads).
        plan_sha256: digest of the plan that was carried out.
        adapters: the adapters, in order.
        weights: the rewritten weights, sorted by name.
        unmatched: targets that the user allowed to be left out.
        problems: warnings and notes of the merge.
        parent: the receipt that the base carried, when it was itself a merged model.
        room_bytes: the room that the model has for it.
        options: what the user asked for beyond the usual, so that the plan can be made again.
    """

    output: str
    base: Mapping[str, Any]
    plan_sha256: str
    adapters: tuple[AppliedAdapter, ...]
    weights: tuple[MergedWeight, ...]
    unmatched: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    parent: Mapping[str, Any] | None = None
    room_bytes: int = 0
    options: Mapping[str, Any] = field(default_factory=FrozenMapping)

    def __repr__(self) -> str:
        """Say what it is in one line."""
        names = ", ".join(repr(each.name) for each in self.adapters)
        least = min((each.retained for each in self.weights), default=1.0)
        kept = f"at least {least:.3f} of each change retained; {count_problems(self.problems)}"
        return f"<Receipt: {names} merged into {len(self.weights)} weights of {self.output!r}; {kept}>"

    def embedded_text(self) -> str:
        """Return the JSON text that the merged model carries: nothing in it depends on where files stand."""
        return write_canonical(self._lasting()).decode("utf-8")

    def as_json(self) -> dict[str, Any]:
        """Return the record for `--json`: what the model carries, the output's path, and the problems."""
        problems = [dict(problem.as_json()) for problem in self.problems]
        return self._lasting() | {"output": self.output, "problems": problems}

    def _lasting(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "version": RECEIPT_VERSION,
            "base": dict(self.base),
            "plan_sha256": self.plan_sha256,
            "adapters": [as_object(adapter) for adapter in self.adapters],
            "weights": [_weight_as_json(weight) for weight in self.weights],
            "unmatched": list(self.unmatched),
            "room_bytes": self.room_bytes,
            "options": dict(self.options),
        }
        record |= {"parent": dict(self.parent)} if self.parent is not None else {}
        return record | {_DIGEST: _digest_record(record)}


def _digest_record(record: Mapping[str, Any]) -> str:
    """Return the digest of a receipt without its own digest."""
    rest = {name: value for name, value in record.items() if name != _DIGEST}
    return hashlib.sha256(write_canonical(rest)).hexdigest()


def _is_whole(record: Mapping[str, Any]) -> bool:
    """Say whether a receipt is as it was written, as far as it tells."""
    if _DIGEST not in record:  # An earlier version wrote none; one that was renamed by a flipped bit is no such.
        return record.keys() <= _WRITTEN
    try:
        return bool(record[_DIGEST] == _digest_record(record))
    except ValueError:  # A number that no receipt has.
        return False


def _weight_as_json(weight: MergedWeight) -> dict[str, Any]:
    relative = weight.relative if math.isfinite(weight.relative) else None
    record = as_object(weight) | {"relative": relative}
    return {name: value for name, value in record.items() if value or name not in ("copied_from", "added")}


@dataclass(frozen=True, slots=True)
class Statement:
    """What the receipt of a model says that the merge can be made again from; its types are checked.

    Attributes:
        base: name, files and digest of the structure.
        plan_sha256: digest of the plan.
        adapters: name, digest and weight of each adapter.
        weights: name of each merged weight, and the rest of its record.
        room_bytes: the room that the model has for the receipt.
        options: `SettledWishes`.
        is_whole: whether its digest is that of the rest.
    """

    base: Mapping[str, Any]
    plan_sha256: str
    adapters: tuple[tuple[str, str, float], ...]
    weights: Mapping[str, Mapping[str, Any]]
    room_bytes: int
    options: Mapping[str, Any]
    is_whole: bool = True


def read_statement(record: Mapping[str, Any], where: object) -> Statement:
    """Return what a receipt from a file states.

    Raises:
        LoraformatError: LF803 a field is missing or is not what receipts have there.
    """
    for field_name, (is_sound, expected) in _FIELDS.items():
        if not is_sound(record.get(field_name)):
            found = f"{record.get(field_name)!r:.80}"
            raise refuse("LF803", f"{where}: receipt: {field_name}", found, expected)
    adapters = tuple((each["name"], each["sha256"], float(each["weight"])) for each in record["adapters"])
    weights, options = {each["name"]: each for each in record["weights"]}, record.get("options") or {}
    plan_sha256, room_bytes = record["plan_sha256"], record["room_bytes"]
    return Statement(record["base"], plan_sha256, adapters, weights, room_bytes, options, _is_whole(record))


def check_whole(statement: Statement | None, where: object) -> list[Problem]:
    """Return the problem of a receipt that is not as it was written."""
    if statement is None or statement.is_whole:
        return []
    return [Problem("LF803", f"{where}: receipt: sha256", "another digest", "that of the receipt's other fields")]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_base(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("structure_sha256"), str)


def _is_adapter(value: object) -> bool:
    texts = isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("name", "sha256"))
    return texts and isinstance(value, Mapping) and _is_number(value.get("weight"))


def _is_weight(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("name"), str)


def _is_text_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_range(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] <= value[1]


_OPTIONS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "allow_unmatched": _is_text_list,
    "strip_prefix": lambda value: isinstance(value, str),
    "graphs": _is_text_list,
    "allow_zero": lambda value: value is True,
    "ignore_fingerprints": lambda value: value is True,
    "untie": lambda value: value is True,
    "new_biases": lambda value: value is True,
    "keep_scales": lambda value: value is True,
    "accept_ranges": lambda value: value is True,
    "ranges": lambda value: isinstance(value, Mapping) and all(map(_is_range, value.values())),
    "calibration_method": lambda value: isinstance(value, str),
    "calibration": lambda value: isinstance(value, str),
    "any_rounding": lambda value: value is True,
    "on_quantized": lambda value: value == "dequantize",
    "external_data": lambda value: value == "share",
    "dtype": lambda value: isinstance(value, str),
    "anew": lambda value: value is True,
}


def _are_options(value: object) -> bool:
    if value is None:
        return True
    known = isinstance(value, Mapping) and value.keys() <= _OPTIONS.keys()
    return known and isinstance(value, Mapping) and all(_OPTIONS[name](option) for name, option in value.items())


def _list_of(is_sound: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(is_sound, value))


_FIELDS: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "base": (_is_base, "an object with structure_sha256"),
    "plan_sha256": (lambda value: isinstance(value, str), "a digest"),
    "adapters": (_list_of(_is_adapter), "a list of objects with name, sha256 and weight"),
    "weights": (_list_of(_is_weight), "a list of objects with a name"),
    "room_bytes": (
        lambda value: type(value) is int and 0 <= value <= MAX_SAFETENSORS_HEADER_BYTES,
        "a number of bytes",
    ),
    "options": (_are_options, f"an object with some of {', '.join(_OPTIONS)}"),
}
