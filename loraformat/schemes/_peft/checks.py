"""What is odd about a PEFT adapter: a configuration and tensors that do not say the same.

Little of this stands against a merge. PEFT itself writes most of it without a word.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loraformat.errors import LoraformatError
from loraformat.problems import Problem
from loraformat.schemes._peft.config import PeftConfig, fits_pattern
from loraformat.strict_json import JsonValue

_AUTOMATIC_HEADS: Final = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Names that PEFT adds to modules_to_save by itself; a model has one of them."""
_NAMED: Final = 8
"""How many names a message lists."""


@dataclass(frozen=True, slots=True)
class StoredModule:
    """What is stored for one module.

    Attributes:
        kinds: the adapter kinds that its tensors speak for.
        roles: the roles of its tensors.
    """

    kinds: Collection[str]
    roles: Collection[str]

    @property
    def is_adapted(self) -> bool:
        """Whether some of it is a change of the base, rather than a copy."""
        return any(kind != "replace" for kind in self.kinds)

    @property
    def is_saved_whole(self) -> bool:
        """Whether it is a full copy of the module."""
        return "weight" in self.roles and not self.is_adapted


Stored = Mapping[str, StoredModule]


def find_oddities(config: PeftConfig, stored: Stored) -> list[Problem]:
    """Return fields of the wrong type and, where there are tensors too, what does not agree with them."""
    problems = list(_check_types(config))
    if problems or not stored or config.fields.get("peft_type") != "LORA":
        return problems
    return [problem for rule in _RULES for problem in rule(config, stored)]


def _is_count(value: JsonValue) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: JsonValue) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: JsonValue) -> bool:
    return isinstance(value, str)


def _is_flag(value: JsonValue) -> bool:
    return isinstance(value, bool)


def _is_list_of_texts(value: JsonValue) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_text, value))


def _is_text_or_list(value: JsonValue) -> bool:
    return isinstance(value, str) or _is_list_of_texts(value)


def _is_table(of: Callable[[JsonValue], bool]) -> Callable[[JsonValue], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(of, value.values()))


_TYPES: Final[tuple[tuple[str, Callable[[JsonValue], bool], str], ...]] = (
    ("peft_type", _is_text, "text"),
    ("base_model_name_or_path", _is_text, "text or null"),
    ("revision", _is_text, "text or null"),
    ("task_type", _is_text, "text or null"),
    ("r", _is_count, "a whole number, not negative"),
    ("lora_alpha", _is_number, "a number"),
    ("use_rslora", _is_flag, "true or false"),
    ("use_dora", _is_flag, "true or false"),
    ("lora_bias", _is_flag, "true or false"),
    ("fan_in_fan_out", _is_flag, "true or false"),
    ("rank_pattern", _is_table(_is_count), "an object of patterns and whole numbers"),
    ("alpha_pattern", _is_table(_is_number), "an object of patterns and numbers"),
    ("bias", _is_text, "text"),
    ("target_modules", _is_text_or_list, "text, a list of texts, or null"),
    ("modules_to_save", _is_list_of_texts, "a list of texts, or null"),
)
"""Fields of LoraConfig that say something about the tensors. PEFT drops fields that it does not know, and so do we."""


def _check_types(config: PeftConfig) -> Iterator[Problem]:
    if config.fields.get("peft_type", "LORA") != "LORA":  # Another type's fields mean other things.
        return
    for field, holds, expected in _TYPES:
        value = config.fields.get(field)
        if value is not None and not holds(value):
            yield Problem("LF213", f"{config.where}: {field}", f"{value!r:.80}", expected)


def list_texts(config: PeftConfig, field: str) -> list[str]:
    """Return a field that is a list of texts, without repetition; empty where it is anything else."""
    value = config.fields.get(field)
    return list(dict.fromkeys(map(str, value))) if isinstance(value, list | tuple) else []


def _check_saved(config: PeftConfig, stored: Stored) -> Iterator[Problem]:
    """Compare the modules that are stored whole with those that should be."""
    listed = list_texts(config, "modules_to_save")
    saved = [name for name, module in stored.items() if module.is_saved_whole]
    where = f"{config.where}: modules_to_save"
    for name in saved:
        if not any(_lies_below(name, entry) for entry in listed):
            # PEFT compares ends of names without a look at the dot before them.
            loose = next((entry for entry in listed if name.endswith(entry)), None)
            why = f"; PEFT saved it because its name ends with {loose!r}" if loose else ""
            yield Problem(
                "LF217", name, f"saved whole, but not listed{why}", "its name in modules_to_save", severity="warning"
            )
    task = config.fields.get("task_type")
    heads = _AUTOMATIC_HEADS.get(task, ()) if isinstance(task, str) else ()
    has_head = any(_lies_below(name, head) for name in saved for head in heads)
    for entry in listed:
        excused = has_head and entry in heads
        if not excused and not any(_lies_below(name, entry) for name in saved):
            yield Problem("LF217", where, f"{entry!r}, without tensors", "its tensors", severity="warning")


def _lies_below(name: str, module: str) -> bool:
    """Say whether `module` is `name`, its end, or a module above it."""
    return f".{module}." in f".{name}."


def find_lost_biases(config: PeftConfig, stored: Stored) -> Iterator[Problem]:
    """Return a warning of biases that were trained and not saved, as PEFT 0.10 to 0.20 did with `lora_only`."""
    trained = config.fields.get("bias") or "none"
    # A bias beside a full weight belongs to a saved module.
    own = ("bias", "base_layer.bias")
    biases = [each for each in stored.values() if set(own) & set(each.roles) and not each.is_saved_whole]
    if trained != "none" and not biases:
        expected = "biases of the adapted modules" if trained == "lora_only" else "biases, if the base has any"
        found = f"{trained!r}, and no bias among the tensors"
        yield Problem("LF218", f"{config.where}: bias", found, expected, severity="warning")


def _check_target_modules(config: PeftConfig, stored: Stored) -> Iterator[Problem]:
    """Find entries to which no tensor belongs; a text is a regular expression, which says nothing about its parts."""
    adapted = [name for name, module in stored.items() if module.is_adapted]
    where = f"{config.where}: target_modules"
    for entry in list_texts(config, "target_modules"):
        if not any(name == entry or name.endswith(f".{entry}") for name in adapted):
            yield Problem("LF219", where, f"{entry!r}, without tensors", "LoRA factors of it", severity="warning")


def _check_patterns(config: PeftConfig, stored: Stored) -> Iterator[Problem]:
    """Find patterns that do nothing, and patterns of which the order decides."""
    adapted = [name for name, module in stored.items() if module.is_adapted]
    for table in ("rank_pattern", "alpha_pattern"):
        patterns = config.fields.get(table)
        if not isinstance(patterns, Mapping) or not patterns or not all(map(_is_number, patterns.values())):
            continue
        where = f"{config.where}: {table}"
        try:
            fitting = {name: [each for each in patterns if fits_pattern(each, name, where)] for name in adapted}
        except LoraformatError as error:  # One behind the first that fits: PEFT never gets to it.
            yield from (
                Problem(each.code, each.where, each.found, each.expected, severity="warning") for each in error.problems
            )
            continue
        used = {each for found in fitting.values() for each in found}
        for each in patterns:
            if each not in used:
                yield Problem("LF220", where, f"{each!r} fits no target", "the end of a name", severity="warning")
        torn = [name for name, found in fitting.items() if len({patterns[each] for each in found}) > 1]
        if torn:
            names = ", ".join(torn[:_NAMED])
            found = f"patterns with different values fit {len(torn)} targets ({names}); the first counts"
            yield Problem("LF220", where, found, "one value for each target", severity="warning")


_RULES: Final[tuple[Callable[[PeftConfig, Stored], Iterator[Problem]], ...]] = (
    _check_saved,
    _check_target_modules,
    _check_patterns,
)


_LOST: Final = (
    ("lora_bias", "lora_B.bias", "a lora_B.bias at each target"),
    ("kasa_config", "lora_diag", "a lora_diag at each target"),
    ("trainable_token_indices", "trainable_tokens_delta", "the rows of the trained tokens"),
)


def find_lost(config: PeftConfig, stored: Stored) -> list[Problem]:
    """Return what the configuration says was trained, and no tensor holds: the adapter is not whole."""
    roles = {role for module in stored.values() for role in module.roles}
    return [
        Problem("LF201", f"{config.where}: {field}", f"{config.fields[field]!r:.80}, and no such tensor", expected)
        for field, role, expected in _LOST
        if config.fields.get(field) and role not in roles
    ]


_ANNOUNCED: Final = (
    ("use_dora", "dora"),
    ("kasa_config", "kasa"),
    ("trainable_token_indices", "tokens"),
    ("modules_to_save", "replace"),
)


def announced_kinds(config: PeftConfig) -> dict[str, str]:
    """Return the kinds that a configuration alone lets expect, with the field that says so."""
    if config.fields.get("peft_type") == "TRAINABLE_TOKENS":
        return {"tokens": "peft_type"}
    fields = {kind: field for field, kind in _ANNOUNCED if config.fields.get(field)}
    return fields if {"dora", "kasa"} & set(fields) else {"lora": "peft_type"} | fields


def check_numbers(config: PeftConfig) -> list[Problem]:
    """Return what rank and alpha of a configuration alone leave unsaid."""
    problems: list[Problem] = []
    if config.fields.get("peft_type") == "TRAINABLE_TOKENS":
        return problems
    if config.fields.get("r") == 0:
        problems.append(Problem("LF204", f"{config.where}: r", "0", "a rank of at least 1"))
    alpha = config.fields.get("lora_alpha")
    if alpha is None:
        problems.append(Problem("LF211", config.where, "no lora_alpha", "the scale of the training run"))
    elif alpha == 0:
        problems.append(Problem("LF208", f"{config.where}: lora_alpha", "0", "a scale other than 0"))
    biases = config.fields.get("bias") or "none"
    if biases != "none":
        found = f"{biases!r}: only the tensors can say whether the biases were saved"
        problems.append(Problem("LF218", f"{config.where}: bias", found, "'none'", severity="warning"))
    return problems
