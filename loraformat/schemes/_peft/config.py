"""PEFT's `adapter_config.json`: what of it changes the numbers, and what of it stands against a merge."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from loraformat.adapter import Scaling, ScalingRule
from loraformat.errors import error_for, refuse
from loraformat.limits import MAX_LAYERS
from loraformat.problems import Problem
from loraformat.recognition import recognise_fields, recognise_type, spell_type
from loraformat.schemes import Bundle, StatedScale
from loraformat.schemes._peft.fields import OF_LORA, find_unknown
from loraformat.schemes._peft.generations import NEWEST, Numbers, Reading, find_readings
from loraformat.schemes._peft.patterns import fits, fits_whole
from loraformat.strict_json import JsonValue

_LORA: Final = "LORA"
_TOKENS: Final = "TRAINABLE_TOKENS"
_READ: Final = frozenset({_LORA, _TOKENS})


@dataclass(frozen=True, slots=True)
class _Obstacle:
    """A field of LoraConfig under which B·A is not the whole story."""

    field: str
    holds: Callable[[JsonValue], bool]
    why: str
    code: str = "LF209"
    mend: str = ""


def _is_set(value: JsonValue) -> bool:
    return bool(value)


_RESIDUAL: Final = (
    "Convert it to plain LoRA in the library that trained it (PEFT: save_pretrained with "
    "path_initial_model_for_weight_conversion). Or merge into the base as the initialisation left it; if the one given "
    "is that, say so with init_lora_weights: true in adapter_config.json."
)
_DEQUANTISED: Final = (
    "Merge into the base that LoftQ left and the training run saved; if the one given is that, say so by removing "
    "loftq_config from adapter_config.json."
)
_BASE_CHANGING: Final = ("pissa", "olora", "corda", "lora_ga")

_OBSTACLES: Final = (
    _Obstacle(
        "layer_replication",
        _is_set,
        "it repeats layers of the base, and numbers all anew",
        "LF245",
    ),
    _Obstacle(
        "init_lora_weights",
        lambda value: isinstance(value, str) and value.lower().startswith(_BASE_CHANGING),
        "this initialisation changed the base as well",
        "LF215",
        _RESIDUAL,
    ),
    _Obstacle(
        "loftq_config", _is_set, "it was trained on a base that LoftQ had quantised and changed", "LF215", _DEQUANTISED
    ),
)


def _is_run(value: JsonValue) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    start, stop = value
    return type(start) is int and type(stop) is int and 0 <= start < stop


_OTHER_FORM: Final = "a change of another form, which this version does not know"


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A configuration, or the lack of one.

    Attributes:
        fields: the JSON object; empty without a configuration.
        where: for messages.
        present: whether there was one.
        readings: how the PEFT that wrote it may read its patterns, the newest first.
    """

    fields: Mapping[str, JsonValue]
    where: str
    present: bool
    readings: tuple[Reading, ...] = (NEWEST,)
    _chosen: dict[tuple[str, str], list[tuple[Reading, Numbers]]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """Target and field of alpha to what each reading chooses: with a pattern for each module, looked up once."""

    def check_type(self, bundle: Bundle, known: Collection[str] = ()) -> str:
        """Return the type, LORA or one of `known`; refuse any other by name."""
        kind = self.text("peft_type") if self.present else _LORA
        if kind is None:
            raise refuse("LF209", self.where, "no peft_type", f"peft_type {_LORA!r}")
        if kind not in _READ and kind not in known:
            names = ", ".join(sorted(bundle.tensors)[:2])
            tensors = f", tensors such as {names}" if names else ""
            about, readable = recognise_type(kind), f"one of {', '.join(sorted({_LORA, *known}))}"
            if about is not None:
                raise error_for([about.as_problem(self.where, readable)])
            raise refuse("LF209", self.where, f"peft_type {kind!r}{tensors}: {_OTHER_FORM}", readable)
        return kind

    def problems(self) -> list[Problem]:
        """Return the options under which this version cannot merge."""
        return [
            *(item.as_problem(self.where) for item in recognise_fields(self.fields)),
            *(
                Problem(
                    item.code,
                    f"{self.where}: {item.field}",
                    f"{self.fields[item.field]!r:.80}: {item.why}",
                    "",
                    item.mend,
                )
                for item in _OBSTACLES
                if item.field in self.fields and item.holds(self.fields[item.field])
            ),
            *find_unknown(self.fields, self.where, OF_LORA[str(self.fields.get("peft_type", _LORA))]),
        ]

    def tokens_of(self, target: str) -> list[JsonValue] | None:
        """Return the numbers of the tokens whose rows were trained in a table, None where they are not stated."""
        own = self.fields.get("peft_type") == _TOKENS
        stated = self.fields.get("token_indices" if own else "trainable_token_indices")
        if isinstance(stated, Mapping):
            names = (name for name in stated if target == name or target.endswith(f".{name}"))
            stated = next((stated[name] for name in names), None)
        return list(stated) if isinstance(stated, list | tuple) else None

    def layers(self) -> tuple[tuple[int, int], ...]:
        """Return the runs of the base's layers that `layer_replication` lists; LF213 for what are none."""
        stated = self.fields.get("layer_replication") or ()
        runs = stated if isinstance(stated, list | tuple) else (stated,)
        if not all(map(_is_run, runs)) or sum(stop - start for start, stop in runs) > MAX_LAYERS:
            expected = f"pairs of a first layer and one behind the last, {MAX_LAYERS} layers at most"
            raise refuse("LF213", f"{self.where}: layer_replication", f"{stated!r:.80}", expected)
        return tuple((start, stop) for start, stop in runs)

    def text(self, field: str) -> str | None:
        """Return a text field, None where it is null or absent."""
        value = self.fields.get(field)
        if value is not None and not isinstance(value, str):
            raise refuse("LF213", f"{self.where}: {field}", f"{value!r:.80}", "text or null")
        return value

    def flag(self, field: str) -> bool:
        """Return a true-or-false field, False where it is null or absent."""
        value = self.fields.get(field)
        if value is not None and not isinstance(value, bool):
            raise refuse("LF213", f"{self.where}: {field}", f"{value!r:.80}", "true or false")
        return bool(value)

    def rank_of(self, target: str, stored: int) -> int:
        """Return the rank that the configuration states for `target`, or the tensors' own without a statement."""
        value = self._read_fitting(target, stored, "lora_alpha")[0][1].rank
        if value is None:
            return stored
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise refuse("LF213", f"{self.where}: r", f"{value!r:.80}", "a whole number, not negative")
        return value

    def scaling_of(self, target: str, stated: StatedScale, path: Path, stored: int = 0) -> Scaling:
        """Return the scaling of `target`, of rank `stored` or 0: the configuration's, else what the user states.

        Raises:
            FindingError: LF207 not finite, LF211 stated by neither, LF248 one or another by the version of PEFT.
        """
        root = self.flag("use_rslora")
        rule = ScalingRule.ALPHA_OVER_SQRT_RANK if root else ScalingRule.ALPHA_OVER_RANK
        alpha = self.numbers_of(target, stored).alpha
        if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
            raise refuse("LF213", f"{self.where}: lora_alpha", f"{alpha!r:.80}", "a number")
        if not alpha and stated.multiplier is not None:
            return _finite(Scaling(ScalingRule.MULTIPLIER, stated.multiplier), target)
        alpha = alpha or (stated.alpha if stated.alpha is not None else alpha)
        if alpha is None:
            found = "no lora_alpha" if self.present else "no adapter_config.json beside it"
            raise refuse("LF211", path, found, "the scale of the training run")
        return _finite(Scaling(rule, float(alpha)), target)

    def numbers_of(self, target: str, stored: int, alpha: str = "lora_alpha") -> Numbers:
        """Return what is stated for `target`, of rank `stored` or 0; the field `alpha` holds where no pattern does.

        Raises:
            FindingError: LF248 versions of PEFT read different numbers, and the rank fits several of them.
        """
        (reading, first), *others = self._read_fitting(target, stored, alpha)
        for other, numbers in others:
            if numbers[bool(stored) :] != first[bool(stored) :]:  # The tensors' rank is the one of all that fit.
                found = f"{_spell(first)} by {reading.versions}, {_spell(numbers)} by {other.versions}"
                raise refuse("LF248", f"{self.where}: {target}", found, "one reading")
        return first

    def note_older(self, ranks: Iterable[tuple[str, int]], alpha: str = "lora_alpha") -> list[Problem]:
        """Return a warning of targets, each with its tensors' rank, that only an older PEFT reads as they are."""
        if len(self.readings) == 1:
            return []
        chosen = {name: self._read_fitting(name, rank, alpha)[0] for name, rank in ranks}
        older = {name: each for name, each in chosen.items() if each[0] is not NEWEST}
        if not older:
            return []
        name, (reading, numbers) = next(iter(older.items()))
        more = f" and of {len(older) - 1} more targets" if len(older) > 1 else ""
        found = f"the rank of {name}{more} is what {reading.versions} reads: {_spell(numbers)}"
        return [
            Problem("LF249", f"{self.where}: alpha_pattern", found, f"that of {NEWEST.versions}", severity="warning")
        ]

    def _read_fitting(self, target: str, stored: int, alpha: str) -> list[tuple[Reading, Numbers]]:
        """Return the readings that state the rank of the tensors; where there is none, the newest."""
        if (target, alpha) not in self._chosen:
            self._chosen[target, alpha] = self._read_all(target, Numbers(self.fields.get("r"), self.fields.get(alpha)))
        found = self._chosen[target, alpha]
        return [each for each in found if not stored or each[1].rank in (None, stored)] or found[:1]

    def _read_all(self, target: str, usual: Numbers) -> list[tuple[Reading, Numbers]]:
        ranks, alphas = self._patterns("rank_pattern"), self._patterns("alpha_pattern")
        try:
            return [(each, each.choose(target, ranks, alphas, usual)) for each in self.readings]
        except ValueError as error:
            where = f"{self.where}: rank_pattern, alpha_pattern"
            raise refuse("LF213", where, str(error), "a simple regular expression") from error

    def _patterns(self, table: str) -> Mapping[str, JsonValue]:
        patterns = self.fields.get(table) or {}
        if not isinstance(patterns, Mapping):
            raise refuse("LF213", f"{self.where}: {table}", f"{patterns!r:.80}", "an object of patterns")
        return patterns


def _spell(numbers: Numbers) -> str:
    return f"rank {numbers.rank}, alpha {numbers.alpha}"


def read_config(fields: Mapping[str, JsonValue] | None, path: Path) -> PeftConfig:
    """Return the configuration beside an adapter, which may be missing, with its type as PEFT spells it."""
    where = str(path) if path.suffix == ".json" else f"{path}: adapter_config.json"
    own = dict(fields or {})
    stated = own.get("peft_type")
    if isinstance(stated, str):
        own["peft_type"] = spell_type(stated)
    elif stated is None and is_lora(own):
        own["peft_type"] = _LORA
    return PeftConfig(own, where, fields is not None, find_readings(own))


def is_lora(fields: Mapping[str, JsonValue]) -> bool:
    """Say whether fields are those that servers such as vLLM need of LoRA, of which the type is none."""
    return "peft_type" not in fields and {"r", "lora_alpha", "target_modules"} <= set(fields)


def _finite(scaling: Scaling, target: str) -> Scaling:
    if not math.isfinite(scaling.value):
        raise refuse("LF207", target, f"{scaling.value}", "a finite number")
    return scaling


def fits_pattern(pattern: str, target: str, where: str) -> bool:
    """Say whether PEFT applies a pattern to a target; LF213 for one that is no simple regular expression."""
    return _fits(fits, pattern, target, where)


def fits_whole_pattern(pattern: str, target: str, where: str) -> bool:
    """Say whether all of a target is as a pattern says; LF213 as `fits_pattern` does."""
    return _fits(fits_whole, pattern, target, where)


def _fits(compare: Callable[[str, str], bool], pattern: str, target: str, where: str) -> bool:
    try:
        return compare(pattern, target)
    except ValueError as error:
        found = f"the pattern {pattern!r:.80}: {error}"
        raise refuse("LF213", where, found, "a simple regular expression") from error
