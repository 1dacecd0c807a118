"""LoRA of packed parameters (PEFT's `target_parameters`), of blocks (BD-LoRA), slices and torch's MultiheadAttention.

Packed experts lie in one pair of factors: A `(experts * r, in)`, expert by expert, and B `(out, r * experts)`, in
which the experts of one rank stand side by side. Each expert becomes a target of its own, `<experts>.3.down_proj`.
The parameter's name is not in the file. Several parameters of one module are nested: the one that the model defines
first is innermost, under `base_layer.`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loraformat.adapter import Factor
from loraformat.derived import KeptFactor, LastRead, derive
from loraformat.errors import refuse
from loraformat.limits import MAX_EXPERTS
from loraformat.problems import Problem
from loraformat.schemes._peft.column_orders import BY_EXPERT
from loraformat.schemes._peft.config import PeftConfig, fits_whole_pattern

A: Final = "lora_A.weight"
B: Final = "lora_B.weight"
WRAPPED: Final = ".base_layer"
ORDER: Final = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias")
"""Parameters of transformers' experts, in the order in which they are defined."""

_SURE_OF_SQUARES: Final = (0, 19, 1)
"""The first PEFT that decides by the module which side of a packed matrix is its input, not by its place."""


def find_module(name: str) -> str:
    """Return the module of a target, without the wrappers that nest its parameters."""
    while name.endswith(WRAPPED):
        name = name.removesuffix(WRAPPED)
    return name


def list_parameters(module: str, config: PeftConfig, count: int) -> list[str]:
    """Return the parameters of a module that the configuration targets, innermost first.

    Args:
        module: its name.
        config: what names the parameters.
        count: how many of the module there are. A bare name may be any module's: it is left out where those that stand
            with a module's name are as many already.
    """
    stated = config.fields.get("target_parameters")
    entries = [entry for entry in stated if isinstance(entry, str)] if isinstance(stated, list | tuple) else []
    own, bare = [], []
    for entry in dict.fromkeys(entries):
        owner, _, parameter = entry.rpartition(".")
        if not owner:
            bare.append(parameter)
        elif module == owner or module.endswith(f".{owner}"):
            own.append(parameter)
    if bare and len(own) != count and not _is_targeted(module, config):
        own += bare
    known = [parameter for parameter in ORDER if parameter in own]
    return list(known) if len(known) == len(own) else own


def _is_targeted(module: str, config: PeftConfig) -> bool:
    """Say whether a module is adapted by its own name, so that a parameter's name alone cannot mean it."""
    stated = config.fields.get("target_modules")
    if isinstance(stated, str):
        return fits_whole_pattern(stated, module, f"{config.where}: target_modules")
    names = stated if isinstance(stated, list | tuple) else ()
    return any(isinstance(name, str) and (module == name or module.endswith(f".{name}")) for name in names)


def name_parameter(name: str, levels: Mapping[str, Mapping[str, Factor]], config: PeftConfig) -> str | Problem | None:
    """Return which parameter a target's factors are of, None where they are of a module.

    Args:
        name: the target, with the wrappers around it.
        levels: all targets of the file.
        config: what names the parameters.
    """
    if not config.fields.get("target_parameters"):
        return None
    module = find_module(name)
    nested = [each for each in levels if find_module(each) == module]
    parameters = list_parameters(module, config, len(nested))
    if not parameters:
        return None
    depth = (len(name) - len(module)) // len(WRAPPED)
    if len(nested) != len(parameters) or depth >= len(parameters):
        found = f"{len(nested)} pairs of factors, and the parameters {', '.join(parameters)}"
        return Problem("LF225", name, found, "one pair for each")
    shapes = [tuple(levels[each][role].shape for role in (A, B) if role in levels[each]) for each in nested]
    if not set(parameters) <= set(ORDER) and len(set(shapes)) < len(shapes):
        found = f"factors of one shape for {', '.join(parameters)}, in an order that is not known"
        return Problem("LF225", name, found, "shapes that tell them apart")
    return parameters[len(parameters) - 1 - depth]


def split_experts(
    name: str, factors: Mapping[str, Factor], rank: int, order: str, last: LastRead
) -> list[tuple[str, dict[str, Factor]]] | Problem:
    """Return each expert's name and factors; the parameter's alone where it is not packed.

    Args:
        name: `<module>.<parameter>`.
        factors: A and B of all experts.
        rank: that of one expert.
        order: that of the columns of B (`column_orders`).
        last: keeps what was read.
    """
    down, up = factors.get(A), factors.get(B)
    if down is None or up is None or len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
        shapes = ", ".join(f"{role} {factor.shape}" for role, factor in factors.items())
        return Problem("LF203", name, shapes, f"{A} (experts * r, in) and {B} (out, r * experts)")
    experts, rest = divmod(down.shape[0], rank or 1)
    if experts > MAX_EXPERTS:
        return Problem("LF225", name, f"{experts} experts of rank {rank}", f"at most {MAX_EXPERTS}")
    if rest or not rank or not experts:
        return Problem("LF225", name, f"rank {rank} stated, A {down.shape}", "as many rows as experts times r")
    if experts == 1:
        module, _, parameter = name.rpartition(".")
        return [(module if parameter == "weight" else name, dict(factors))]
    from loraformat.row_orders import Permute  # here, as operations below: most adapters need none

    module, _, parameter = name.rpartition(".")
    by_expert = up if order == BY_EXPERT else derive(Permute((rank, experts), (1, 0), axis=1), up)
    kept = KeptFactor(down, last), KeptFactor(by_expert, last)
    return [
        (f"{module}.{expert}.{parameter}", _take_expert(kept, slice(expert * rank, (expert + 1) * rank)))
        for expert in range(experts)
    ]


def _take_expert(pair: tuple[Factor, Factor], own: slice) -> dict[str, Factor]:
    """Return one expert's rows of A and columns of B, which lie together."""
    from loraformat.operations import Take

    down, up = pair
    return {A: derive(Take(own.start, own.stop), down), B: derive(Take(own.start, own.stop, axis=1), up)}


def check_square(name: str, factors: Mapping[str, Factor], config: PeftConfig) -> list[Problem]:
    """Return a problem for a square matrix of an expert from a PEFT that took its sides by their places."""
    if factors[A].shape[1] != factors[B].shape[0] or _read_version(config) >= _SURE_OF_SQUARES:
        return []
    found = (
        f"square matrices {factors[B].shape[0]} by {factors[A].shape[1]}, saved by PEFT {config.text('peft_version')}"
    )
    return [Problem("LF225", name, found, "a version from 0.19.1 on, which says which side is the input")]


def _read_version(config: PeftConfig) -> tuple[int, ...]:
    """Return PEFT's version as numbers, zeros where it is not stated."""
    parts = (config.text("peft_version") or "0").split(".")[:3]
    return tuple(int(part) if part.isdecimal() and len(part) < 6 else 0 for part in parts)


def expand_blocks(
    name: str, factors: Mapping[str, Factor], config: PeftConfig, last: LastRead
) -> dict[str, Factor] | Problem:
    """Return the factors of a BD-LoRA target with the compact one put block-diagonally in place."""
    stated = list_blocks(name, config)
    expanded = dict(factors)
    if not stated.roles:
        return expanded
    from loraformat.operations import BlockDiagonal, Take

    for role in stated.roles:
        factor = factors.get(role)
        if factor is None or len(factor.shape) != 2 or factor.shape[0] % stated.count or len(stated.roles) > 1:
            found = f"{role} {factor.shape if factor else 'missing'} for {stated.count} blocks"
            return Problem("LF203", name, found, "rows that divide into the blocks, in one of A and B")
        rows, kept = factor.shape[0] // stated.count, KeptFactor(factor, last)
        blocks = [derive(Take(block * rows, (block + 1) * rows), kept) for block in range(stated.count)]
        expanded[role] = derive(BlockDiagonal(), *blocks)
    return expanded


@dataclass(frozen=True, slots=True)
class Blocks:
    """What BD-LoRA stores of a target in compact form.

    Attributes:
        count: how many blocks.
        roles: which factors.
    """

    count: int
    roles: tuple[str, ...]


def list_blocks(name: str, config: PeftConfig) -> Blocks:
    """Return which factors of a target are stored as blocks; raises LF213 for a configuration that does not say it."""
    stated = config.fields.get("use_bdlora")
    if not stated:
        return Blocks(1, ())
    count = stated.get("nblocks") if isinstance(stated, Mapping) else None
    if not isinstance(stated, Mapping) or not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise refuse("LF213", f"{config.where}: use_bdlora", f"{stated!r:.80}", "an object with nblocks")
    fields = (("target_modules_bd_a", A), ("target_modules_bd_b", B))
    return Blocks(count, tuple(role for field, role in fields if _names_part(stated.get(field), name)))


def merge_slices(name: str, factors: Mapping[str, Factor], config: PeftConfig) -> dict[str, Factor] | Problem | None:
    """Return the factors of slices of a fused weight (PEFT 0.2), of which B is the weight of a grouped convolution.

    None where a target is none of these.
    """
    stated, up = config.fields.get("enable_lora"), factors.get(B)
    if not stated or up is None or len(up.shape) != 3:
        return None
    if not isinstance(stated, list | tuple) or not all(isinstance(each, bool) for each in stated):
        return Problem("LF213", f"{config.where}: enable_lora", f"{stated!r:.80}", "a list of true and false")
    if up.shape[2] != 1:
        return Problem("LF203", name, f"{B} {up.shape}", "(rows, r, 1)")
    from loraformat.operations import Reshape

    return {**factors, B: derive(Reshape(up.shape[:2]), up)}


def _names_part(patterns: object, name: str) -> bool:
    """Say whether PEFT's patterns, which are texts inside a name, fit."""
    listed: Sequence[object] = patterns if isinstance(patterns, list | tuple) else ()
    return any(isinstance(pattern, str) and pattern in name for pattern in listed)


_OUT: Final = ".base_layer.out_proj"
_ADDED_ONCE: Final = (0, 22)
"""PEFT up to 0.21 adds the change of the output projection twice (huggingface/peft#3774), in training as in merging."""


def find_attention(name: str, targets: Mapping[str, Mapping[str, Factor]]) -> str | None:
    """Return the attention module whose output projection a target is, None for any other target."""
    module = name.removesuffix(_OUT)
    factors = targets.get(module)
    return module if module != name and factors is not None and A in factors else None


def count_additions(config: PeftConfig) -> int:
    """Return how often PEFT added the change of the output projection while it trained."""
    return 1 if _read_version(config) >= _ADDED_ONCE else 2
