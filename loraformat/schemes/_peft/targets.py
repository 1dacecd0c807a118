"""From the tensors of a PEFT file, grouped by module, to targets."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from loraformat.adapter import Factor, Scaling, ScalingRule, SlotKind, Target
from loraformat.derived import LastRead
from loraformat.problems import Problem, Severity
from loraformat.schemes import Bundle, StatedScale
from loraformat.schemes._peft.column_orders import find_order
from loraformat.schemes._peft.config import PeftConfig
from loraformat.schemes._peft.groups import BASE, LORA, REPLACE, TOKENS, Group
from loraformat.schemes._peft.packed import (
    A,
    B,
    check_square,
    count_additions,
    expand_blocks,
    find_attention,
    find_module,
    merge_slices,
    name_parameter,
    split_experts,
)

_AS_IT_IS: Final = Scaling(ScalingRule.MULTIPLIER, 1.0)
_ROWS: Final = "rows that are appended to the tables of tokens, without the tables"
_HEAD: Final = "a head that gives rewards or values"
_BESIDE: Final[tuple[tuple[str, str, str, str, Severity], ...]] = (
    ("new_embeddings.safetensors", "LF228", _ROWS, "the whole tables in the adapter's own file", "error"),
    *((f"value_head.{end}", "LF239", _HEAD, "", "warning") for end in ("safetensors", "bin")),
)
"""Files of vLLM's readers, trl and LLaMA-Factory: name, reason code, what it is, what it should be, severity."""


class TargetReader:
    """Makes the targets of one file.

    Args:
        groups: its tensors by module.
        config: its configuration.
        stated: what the user says about the scale.
        bundle: the file.
    """

    def __init__(self, groups: Mapping[str, Group], config: PeftConfig, stated: StatedScale, bundle: Bundle) -> None:
        self._groups = groups
        self._factors = {name: group.factors for name, group in groups.items()}
        self._config = config
        self._stated = stated
        self._path = bundle.path
        self._last = LastRead()
        self._problems: list[Problem] = []
        self._ranks: dict[str, int] = {}

    def read_all(self) -> tuple[list[Target], list[Problem]]:
        """Return the targets, and what stands against them or is to be said."""
        targets = [target for name, group in sorted(self._groups.items()) for target in self._read_one(name, group)]
        self._problems += self._config.note_older(self._ranks.items())
        self._problems += _find_files_beside(self._path)
        self._note_biases(targets)
        return targets, self._problems

    def _read_one(self, name: str, group: Group) -> list[Target]:
        kind = _choose_kind(group.kinds)
        if kind == TOKENS:
            return [self._read_tokens(name, group.factors)]
        if LORA not in group.kinds:
            return [Target(name, kind, SlotKind.PARAMETER, group.factors, 0, _AS_IT_IS)]
        parameter = name_parameter(name, self._factors, self._config)
        if isinstance(parameter, Problem):
            self._problems.append(parameter)
            return []
        if parameter is not None:
            return self._read_packed(f"{find_module(name)}.{parameter}", group.factors, kind)
        factors = expand_blocks(name, group.factors, self._config, self._last)
        if isinstance(factors, Problem):
            self._problems.append(factors)
            return []
        slices = merge_slices(name, factors, self._config)
        if isinstance(slices, Problem):
            self._problems.append(slices)
            return []
        if slices is not None:
            options = {"enable_lora": self._config.fields["enable_lora"]}
            own = replace(self._make(name, name, slices, "merged_linear"), options=options)
            return [replace(own, rank=self._config.rank_of(name, slices[B].shape[1]))]
        attention = find_attention(name, self._factors)
        if attention is not None:
            return [self._read_projection(attention, factors, kind)]
        return [self._make(name, name, factors, kind)]

    def _read_tokens(self, name: str, factors: Mapping[str, Factor]) -> Target:
        indices = self._config.tokens_of(name)
        options = {"token_indices": indices} if indices is not None else {}
        return Target(name, TOKENS, SlotKind.PARAMETER, factors, 0, _AS_IT_IS, options=options)

    def _read_packed(self, name: str, factors: Mapping[str, Factor], kind: str) -> list[Target]:
        """Return the targets of all experts of a parameter."""
        rank = self._config.rank_of(name, 0)
        order = find_order(name.rpartition(".")[2], self._config)
        if isinstance(order, Problem):
            self._problems.append(order)
            return []
        split = split_experts(name, factors, rank, order, self._last)
        if isinstance(split, Problem):
            self._problems.append(split)
            return []
        if len(split) > 1:
            self._problems += check_square(name, factors, self._config)
        return [self._make(expert, name, own, kind) for expert, own in split]

    def _read_projection(self, attention: str, factors: Mapping[str, Factor], kind: str) -> Target:
        """Return attention's output projection, at the scale at which it was trained."""
        name = f"{attention}.out_proj"
        target = self._make(name, attention, factors, kind)
        times = count_additions(self._config)
        if times == 1:
            return target
        found = f"a scale of {target.scale:g}, taken {times} times as PEFT trains and merges it"
        self._problems.append(Problem("LF224", name, found, "once", severity="warning"))
        return replace(target, scaling=replace(target.scaling, value=times * target.scaling.value))

    def _make(self, name: str, stated_for: str, factors: Mapping[str, Factor], kind: str) -> Target:
        """Return a target of factors; rank and scale are those that the configuration states for a name."""
        down = factors.get(A) or factors.get("lora_embedding_A")
        stored = down.shape[0] if down is not None and down.shape else 0
        self._ranks[stated_for] = stored
        rank = self._config.rank_of(stated_for, stored)
        scaling = self._config.scaling_of(stated_for, self._stated, self._path, stored)
        return Target(name, kind, _slot_of(factors, self._config), factors, rank, scaling)

    def _note_biases(self, targets: list[Target]) -> None:
        """Warn of biases of factors that the configuration says there are none of."""
        biased = [target.name for target in targets if "lora_B.bias" in target.factors]
        if biased and self._config.present and not self._config.flag("lora_bias"):
            where = biased[0] if len(biased) == 1 else f"{biased[0]} and {len(biased) - 1} more targets"
            self._problems.append(
                Problem(
                    "LF223", where, "a lora_B.bias, while lora_bias is not set", "lora_bias: true", severity="warning"
                )
            )


def _choose_kind(kinds: set[str]) -> str:
    """Return the one kind that a target's tensors make; several that do not belong together keep all names."""
    mixed = bool(kinds & {TOKENS, REPLACE})
    special = sorted(kinds - ({BASE} if mixed else {BASE, LORA}))
    return " and ".join(special) if special else LORA


def _slot_of(factors: Mapping[str, Factor], config: PeftConfig) -> SlotKind:
    factor = factors.get(A) or factors.get("lora_B.weight")
    if factor is None:
        return SlotKind.EMBEDDING
    if len(factor.shape) > 2:
        return SlotKind.CONV
    return SlotKind.LINEAR_TRANSPOSED if config.flag("fan_in_fan_out") else SlotKind.LINEAR


def _find_files_beside(path: Path) -> list[Problem]:
    """Return what is to be said of further files of a folder, which are not merged."""
    folder = path if path.is_dir() else path.parent
    return [
        Problem(code, str(folder / name), found, expected, severity=severity)
        for name, code, found, expected, severity in _BESIDE
        if (folder / name).is_file()
    ]
