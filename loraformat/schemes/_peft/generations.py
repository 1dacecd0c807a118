r"""How versions of PEFT find a target's rank and alpha by patterns, and which of them may have written a configuration.

LORA of 0.6 to 0.13: one key for both tables, the first of all ranks' and alphas' patterns with `.*\.{pattern}$`, else
the target's name. 0.14: a key for each table. Since 0.15: `(.*\.)?({pattern})$`, which fits whole names too. LOHA and
LOKR had one key for both until 0.14. Sources: `tuners/{lora,loha,lokr}/model.py`, `utils/other.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from loraformat.schemes._peft.patterns import fits, fits_behind_dot, fits_unbound
from loraformat.strict_json import JsonValue

Fits = Callable[[str, str], bool]
Table = Mapping[str, JsonValue]


class Numbers(NamedTuple):
    """What a configuration states for a target."""

    rank: JsonValue
    alpha: JsonValue


@dataclass(frozen=True, slots=True)
class Reading:
    """How some versions choose the patterns of a target.

    Attributes:
        versions: which, in words.
        fits: whether a pattern fits a target.
        shares_key: whether one key is looked up in both tables.
    """

    versions: str
    fits: Fits
    shares_key: bool = False

    def choose(self, target: str, ranks: Table, alphas: Table, usual: Numbers) -> Numbers:
        """Return the numbers of a target; ValueError for a pattern that is not read here."""
        if self.shares_key:
            key = self._find_key(target, {**ranks, **alphas})
            return Numbers(ranks.get(key, usual.rank), alphas.get(key, usual.alpha))
        rank, alpha = (self._find_key(target, table) for table in (ranks, alphas))
        return Numbers(ranks.get(rank, usual.rank), alphas.get(alpha, usual.alpha))

    def _find_key(self, target: str, table: Table) -> str:
        for pattern in table:
            try:
                if self.fits(pattern, target):
                    return pattern
            except ValueError as error:
                raise ValueError(f"the pattern {pattern!r:.80}: {error}") from error
        return target


NEWEST: Final = Reading("PEFT since 0.15", fits)
_OF_LORA: Final = (
    NEWEST,
    Reading("PEFT 0.14", fits_behind_dot),
    Reading("PEFT 0.6 to 0.13", fits_behind_dot, shares_key=True),
)
_OF_LYCORIS: Final = (NEWEST, Reading("PEFT 0.6 to 0.14", fits_unbound, shares_key=True))
_SINCE_0_14: Final = frozenset({"exclude_modules", "lora_bias", "eva_config"})
_SINCE_0_15: Final = frozenset({"peft_version", "trainable_token_indices", "corda_config", "target_parameters"})


def find_readings(fields: Mapping[str, JsonValue]) -> tuple[Reading, ...]:
    """Return the readings that the PEFT may have which wrote a configuration, the newest first.

    PEFT writes every field that it has. LOKR before 0.14 had no scale, so that its patterns made no difference.
    """
    kind, names = fields.get("peft_type"), fields.keys()
    if names & _SINCE_0_15:
        return (NEWEST,)
    if kind == "LORA" and not _has_anchors(fields):
        return _OF_LORA[:2] if names & _SINCE_0_14 else _OF_LORA
    old = kind == "LOHA" or (kind == "LOKR" and "exclude_modules" in fields)
    return _OF_LYCORIS if old else (NEWEST,)


def _has_anchors(fields: Mapping[str, JsonValue]) -> bool:
    """Say whether a pattern begins with `^`, which in LORA before 0.15 never fitted anything."""
    tables = (fields.get(name) for name in ("rank_pattern", "alpha_pattern"))
    return any(pattern.startswith("^") for table in tables if isinstance(table, Mapping) for pattern in table)
