"""What targets share: all of them, or FRoD's by the names of modules, TinyLoRA's by their order in the base.

No file says that order. But each target's random matrices were drawn with the seed of its place in it, so that they
tell it. Source: huggingface/peft 0.21, tuners/frod and tuners/tinylora; torch's normal numbers of a seed, which Box and
Muller's formula makes of the words of a Mersenne Twister.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loraformat.adapter import Factor
from loraformat.problems import Problem
from loraformat.schemes._peft.config import PeftConfig
from loraformat.schemes._peft.keys import PREFIX
from loraformat.schemes._peft.type import Stow

_SHARED: Final = "base_model."
_VECTOR: Final = f"{_SHARED}tinylora_v."
_OWN_VECTOR: Final = ".tinylora_v.0"
_RANDOM: Final = ".tinylora_P"
_FACTOR: Final = ".tinylora_A"
_SEEDED: Final = "saved random matrices, of the seed that is stated"
_BLOCK: Final = 16
_CLOSE: Final = 6e-3
"""Numbers that were saved in bfloat16 are this near, relative to their size; those of another seed are not all."""
_WHY: Final = "which target has which vector follows from the order of the base's modules, which is nowhere in the file"


Taken: TypeAlias = tuple[dict[str, Factor], list[Problem]]
"""Whole key to tensor, and what stands against it."""


def take_once(roles: Sequence[str], *, is_left: bool = False) -> Stow:
    """Return what takes the tensors of roles that all targets share; `is_left` also leaves each target its own."""

    def take(tensors: dict[str, Factor], config: PeftConfig) -> Taken:
        keys = {key: f"{_SHARED}{role}" for role in roles for key in tensors if key.endswith(f".{role}")}
        left = {key: tensors[key] for key in keys} if is_left else {}
        taken = _take(tensors, keys)
        tensors.update(left)
        return taken

    return take


def _take(tensors: dict[str, Factor], keys: Mapping[str, str]) -> Taken:
    """Take tensors out, each to a whole key that others may have too; those of one key must be equal."""
    taken: dict[str, Factor] = {}
    problems: list[Problem] = []
    for key, whole in keys.items():
        factor = tensors.pop(key)
        first = taken.setdefault(whole, factor)
        if first is not factor and not np.array_equal(first.read(), factor.read()):
            problems.append(
                Problem("LF312", key, f"other numbers than {whole} has", "one tensor for all that share it")
            )
    return taken, problems


def give_vectors(tensors: Mapping[str, Factor], config: PeftConfig) -> Mapping[str, Factor] | Problem:
    """Return the tensors with each target's vector under its own name."""
    vectors = {key.removeprefix(_VECTOR): factor for key, factor in tensors.items() if key.startswith(_VECTOR)}
    modules, groups = _list_groups(tensors, config)
    if groups == 1:
        return tensors
    numbers = _number_vectors(tensors, modules, groups, config)
    if numbers is None:
        found = f"{len(vectors)} vectors for {len(modules)} targets: {_WHY}"
        return Problem("LF209", f"{config.where}: weight_tying", found, _SEEDED)
    own = {}
    for module, number in numbers.items():
        vector = vectors.get(str(number))
        if vector is None:
            return Problem("LF201", module, f"vectors {', '.join(sorted(vectors))}", f"{groups} vectors")
        own[f"{module}{_OWN_VECTOR}"] = vector
    return {key: factor for key, factor in tensors.items() if not key.startswith(_VECTOR)} | own


def take_vectors(tensors: dict[str, Factor], config: PeftConfig) -> Taken:
    """Take each target's vector out of its tensors, and return them by the numbers that PEFT gives them."""
    modules, groups = _list_groups(tensors, config)
    numbers = _number_vectors(tensors, modules, groups, config) if groups > 1 else dict.fromkeys(modules, 0)
    if numbers is None:
        return {}, [Problem("LF312", f"{len(modules)} targets", f"vectors without numbers: {_WHY}", _SEEDED)]
    return _take(tensors, {f"{module}{_OWN_VECTOR}": f"{_VECTOR}{number}" for module, number in numbers.items()})


def _list_groups(tensors: Mapping[str, Factor], config: PeftConfig) -> tuple[list[str], int]:
    """Return the modules, and in how many groups they share vectors."""
    modules = sorted(key.removesuffix(_FACTOR) for key in tensors if key.endswith(_FACTOR))
    return modules, max(1, round(len(modules) * (1.0 - _read_tying(config))))


def _number_vectors(
    tensors: Mapping[str, Factor], modules: list[str], groups: int, config: PeftConfig
) -> dict[str, int] | None:
    """Return the number of each module's vector; None where nothing tells it."""
    places = _find_places(tensors, modules, config)
    size = max(1, len(modules) // groups)
    return None if places is None else {name: min(place // size, groups - 1) for name, place in places.items()}


def _read_tying(config: PeftConfig) -> float:
    stated = config.fields.get("weight_tying", 0.0)
    return float(stated) if isinstance(stated, int | float) else 0.0


def _find_places(tensors: Mapping[str, Factor], modules: list[str], config: PeftConfig) -> dict[str, int] | None:
    """Return each module's place in the base's order; None where the random matrices do not tell all of them."""
    seed = config.fields.get("projection_seed", 42)
    places: dict[str, int] = {}
    for module in modules:
        factor = tensors.get(f"{module}{_RANDOM}")
        if factor is None or len(factor.shape) != 3 or not factor.elements or not isinstance(seed, int):
            return None
        drawn = factor.read().reshape(-1)[-_BLOCK:].astype(np.float64) * math.sqrt(factor.shape[1])
        known = (draw_normal(seed + place, factor.elements) for place in range(len(modules)))
        fitting = [place for place, numbers in enumerate(known) if np.abs(drawn - numbers).max() < 3 * _CLOSE]
        if len(fitting) != 1:
            return None
        places[module] = fitting[0]
    return places if len(set(places.values())) == len(modules) else None


def draw_normal(seed: int, count: int) -> NDArray[np.float64]:
    """Return the last 16 of `count` numbers, or all where there are fewer, that `torch.normal(0, 1, ...)` gives.

    Sixteen numbers are made of sixteen words at a time; where the last sixteen overlap with others, of new words. Fewer
    are made in pairs, each of two numbers of 53 bits.
    """
    twister: Any = np.random.MT19937()
    twister._legacy_seeding(seed & 0xFFFFFFFF)
    if count >= _BLOCK:
        words = twister.random_raw(count if count % _BLOCK == 0 else count + _BLOCK)[-_BLOCK:]
        uniform = (words & 0xFFFFFF) * 2.0**-24
        lengths, turns = np.sqrt(-2 * np.log(1 - uniform[:8])), 2 * np.pi * uniform[8:]
        return np.concatenate([lengths * np.cos(turns), lengths * np.sin(turns)])
    pairs = twister.random_raw(2 * (count + count % 2)).reshape(-1, 2, 2)
    uniform = ((pairs[..., 0] << np.uint64(32) | pairs[..., 1]) & np.uint64((1 << 53) - 1)) * 2.0**-53
    lengths, turns = np.sqrt(-2 * np.log1p(-uniform[:, 1])), 2 * np.pi * uniform[:, 0]
    return np.stack([lengths * np.cos(turns), lengths * np.sin(turns)], axis=1).reshape(-1)[:count]


_BY_CATEGORY: Final = ("frod_V", "frod_s_indices", "frod_s_size")
_DIAGONAL: Final = ".frod_lambda_l"


def give_factors(tensors: Mapping[str, Factor], config: PeftConfig) -> Mapping[str, Factor] | Problem:
    """Return the tensors with the factors of FRoD that modules of one name share under each one's own."""
    heads = tuple(f"{_SHARED}{role}." for role in _BY_CATEGORY)
    shared = {key: factor for key, factor in tensors.items() if key.startswith(heads)}
    own = {key: factor for key, factor in tensors.items() if key not in shared}
    used = set()
    for key in [key for key in own if key.endswith(_DIAGONAL)]:
        module = key.removesuffix(_DIAGONAL)
        for role in _BY_CATEGORY:
            name = f"{_SHARED}{role}.{name_category(module.removeprefix(PREFIX))}"
            if name in shared:
                own[f"{module}.{role}"] = shared[name]
                used.add(name)
    stray = sorted(set(shared) - used)
    if stray:
        return Problem("LF202", stray[0], f"a factor of {len(stray)} that no target has a name for", "a target's name")
    return own


def take_factors(tensors: dict[str, Factor], config: PeftConfig) -> Taken:
    """Take what modules of one name share out of their tensors, and return it by their name."""
    keys = {}
    for key in tensors:
        module, _, role = key.rpartition(".")
        if role in _BY_CATEGORY:
            keys[key] = f"{_SHARED}{role}.{name_category(module)}"
    return _take(tensors, keys)


def name_category(module: str) -> str:
    """Return what FRoD calls the modules of one name in all layers: the last two parts, or one of them."""
    *above, owner, last = ["", "", *module.split(".")]
    if not owner or owner.isdigit():
        return last
    if (owner, last) == ("output", "dense") and above[-1] == "attention":
        return "attention_output"
    return f"{owner}_{last}"
