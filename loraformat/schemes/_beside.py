"""Tensors of one number that stand beside a module's factors, and the forms in which they were stored."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from loraformat.adapter import Factor
from loraformat.derived import NewFactor
from loraformat.dtypes import BY_NAME
from loraformat.errors import refuse
from loraformat.strict_json import JsonValue

Form = tuple[str, tuple[int, ...]]
"""A number form and a shape."""
FLOAT32: Final = ("float32", ())
FLOAT64: Final = ("float64", ())
INT64: Final = ("int64", ())
ALPHA: Final = "alpha"
"""The role of a tensor beside a module's factors that holds its alpha."""


@dataclass(frozen=True, slots=True)
class Module:
    """What is stored for one module, before it is a target.

    Attributes:
        name: the target that it will be.
        rank: as its factors have it; 0 for a kind without one.
        sidecars: role to tensor of what is no factor, such as an alpha.
    """

    name: str
    rank: int
    sidecars: Mapping[str, Factor]


def read_alpha(module: Module) -> float | None:
    """Return the number of an alpha tensor, None without one.

    Raises:
        FindingError: LF203 not one number, LF207 not finite.
    """
    return read_number(module, ALPHA)


def read_number(module: Module, role: str) -> float | None:
    """Return the number of a tensor beside a module, None without one; raises as `read_alpha`."""
    tensor = module.sidecars.get(role)
    if tensor is None:
        return None
    where = f"{module.name}: {role}"
    if tensor.elements != 1:
        raise refuse("LF203", where, f"shape {tensor.shape}", "one number")
    value = float(tensor.read().astype(np.float64).reshape(-1)[0])
    if not math.isfinite(value):
        raise refuse("LF207", where, f"{value}", "a finite number")
    return value


def as_number(value: JsonValue) -> float | None:
    """Return a number of a memory as it is, None for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def make_number(name: str, role: str, value: float, form: Form, otherwise: Form) -> NewFactor:
    """Return a tensor of one number in a form that holds it, else in another."""
    dtype, shape = form
    with np.errstate(over="ignore"):
        array = np.full(shape, value).astype(BY_NAME[dtype].numpy())
    if float(array.astype(np.float64).reshape(-1)[0]) != value:
        array = np.full(shape, value, dtype=BY_NAME[otherwise[0]].numpy())
    return NewFactor(f"{name}.{role}", array)


def form_of(tensor: Factor) -> str:
    """Return number form and shape of a tensor, as a text."""
    return f"{tensor.dtype.name}{list(tensor.shape)}"


def remember_forms(forms: Mapping[str, str]) -> dict[str, JsonValue]:
    """Return the usual form of the alphas, and the targets that have another; nothing where all are as written here."""
    if not forms:
        return {}
    usual = Counter(forms.values()).most_common(1)[0][0]
    others: dict[str, JsonValue] = {name: form for name, form in forms.items() if form != usual}
    remembered: dict[str, JsonValue] = {} if usual == "float32[]" else {"alpha_form": usual}
    return remembered | ({"alpha_forms": others} if others else {})


def recall_form(remembered: Mapping[str, JsonValue], name: str) -> Form:
    """Return the remembered form of a target's alpha; float32 without one."""
    others = remembered.get("alpha_forms")
    text = others.get(name) if isinstance(others, Mapping) else None
    return parse_form(text or remembered.get("alpha_form"), FLOAT32)


def parse_form(text: JsonValue, otherwise: Form) -> Form:
    """Return the form that a text of `form_of` says, with sizes of 1; `otherwise` for any other text."""
    dtype, bracket, sizes = text.partition("[") if isinstance(text, str) else ("", "", "")
    if not bracket or dtype not in BY_NAME or BY_NAME[dtype].family not in ("float", "int", "uint", "bool"):
        return otherwise
    return dtype, (1,) * len([size for size in sizes.removesuffix("]").split(",") if size])
