"""Merges: base weights, adapters, and the exact bits that come out, or the reason why nothing does.

The expected numbers are sums of fractions. Factors are chosen so that every product and every partial sum of a delta
is exact in binary32, in any order; `_check_exact` proves it for each number. Where the weight is stored in 16 bits, its
sum with the delta is exact in binary32 as well, so that one rounding is all there is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import product
from math import prod, sqrt
from typing import Any

import numpy as np

from make.kit import Dice, Files, Tensor, factors, fingerprint, lora, manifest_of, pack, replacement, store, tensor


@dataclass(frozen=True)
class Form:
    """A binary floating-point form: bits in all, bits of precision, smallest and largest exponent."""

    bits: int
    precision: int
    least: int
    most: int


FORMS = {
    "F64": Form(64, 53, -1022, 1023),
    "F32": Form(32, 24, -126, 127),
    "F16": Form(16, 11, -14, 15),
    "BF16": Form(16, 8, -126, 127),
}
THREE = ("F32", "F16", "BF16")
HALF_STEPS = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""Half the distance of the numbers from 1 to 2."""


class OutOfRangeError(ValueError):
    """A number that leaves the range of its form."""


def round_to(form: Form, value: Fraction) -> int:
    """Return the bits of the number of `form` nearest to `value`, ties to even."""
    sign = 1 << (form.bits - 1) if value < 0 else 0
    magnitude = abs(value)
    if not magnitude:
        return 0
    exponent = max(_exponent_of(magnitude), form.least)
    quantum = Fraction(2) ** (exponent - form.precision + 1)
    steps = round(magnitude / quantum)  # Python rounds halves to even.
    if steps == 2**form.precision:
        steps, exponent = steps // 2, exponent + 1
    if exponent > form.most:
        raise OutOfRangeError
    fraction_bits = form.precision - 1
    if steps < 2**fraction_bits:  # subnormal
        return sign | steps
    return sign | (exponent - form.least + 1) << fraction_bits | (steps - 2**fraction_bits)


def _exponent_of(magnitude: Fraction) -> int:
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= magnitude else exponent - 1


def is_exact(form: Form, value: Fraction) -> bool:
    """Say whether `form` holds `value` exactly."""
    return _value_of(form, round_to(form, value)) == value


def _value_of(form: Form, bits: int) -> Fraction:
    sign = -1 if bits >> (form.bits - 1) else 1
    fraction_bits = form.precision - 1
    field = (bits & (1 << (form.bits - 1)) - 1) >> fraction_bits
    steps = (bits & (1 << fraction_bits) - 1) + (2**fraction_bits if field else 0)
    return sign * steps * Fraction(2) ** (max(field, 1) + form.least - 1 - fraction_bits)


@dataclass(frozen=True)
class Change:
    """One target of an adapter: its numbers, and how the file says its scale.

    Attributes:
        name: target name.
        slot: its slot.
        down: A.
        up: B.
        rule: scaling rule.
        number: the rule's number.
        dtype: of the factors.
        more: further fields of the target.
        beside: further roles (R-045) and their numbers.
    """

    name: str
    slot: str
    down: np.ndarray[Any, Any]
    up: np.ndarray[Any, Any]
    rule: str = "multiplier"
    number: float = 1
    dtype: str = "F32"
    more: Mapping[str, Any] | None = None
    beside: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The first dimension of A."""
        return int(self.down.shape[0])

    @property
    def scale(self) -> Fraction:
        """The multiplier; exact for the numbers that stand here."""
        divisor = {"alpha/rank": self.rank, "alpha/sqrt(rank)": Fraction(sqrt(self.rank)), "multiplier": 1}[self.rule]
        return Fraction(self.number) / divisor

    @property
    def shape(self) -> tuple[int, ...]:
        """The canonical shape of the weight."""
        return (self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class Saved:
    """One target of the kind `replace`.

    Attributes:
        name: target name.
        values: role to V.
        number: the multiplier s.
        dtype: of V.
    """

    name: str
    values: Mapping[str, np.ndarray[Any, Any]]
    number: float = 1
    dtype: str = "F32"


Adapter = Sequence[Change | Saved]
Weights = Mapping[str, np.ndarray[Any, Any]]
"""Tensor name in the state dict to its numbers, as stored."""


def write_adapter(adapter: Adapter) -> bytes:
    """Return the adapter's file."""
    targets: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for change in adapter:
        if isinstance(change, Saved):
            targets[change.name] = replacement(change.number)
            tensors |= {f"{change.name}.{role}": tensor(change.dtype, v) for role, v in change.values.items()}
            continue
        target = lora(change.slot, change.rank, change.rule, change.number)
        targets[change.name] = target | dict(change.more or {})
        tensors |= factors(change.name, change.slot, change.down, change.up, change.dtype)
        tensors |= {f"{change.name}.{role}": tensor(change.dtype, values) for role, values in change.beside.items()}
    return pack(manifest_of(targets), tensors)


def merged_bits(form: Form, stored: np.ndarray[Any, Any], terms: np.ndarray[Any, Any]) -> bytes:
    """Return the merged tensor, little-endian.

    Args:
        form: how it is stored.
        stored: its numbers before.
        terms: for each number the fractions that are added up to its delta, in an array of lists.
    """
    out = bytearray()
    for value, parts in zip(stored.reshape(-1), terms.reshape(-1), strict=True):
        total = Fraction(float(value)) + sum(parts)
        _check_exact(form, parts, total)
        out += round_to(form, total).to_bytes(form.bits // 8, "little")
    return bytes(out)


def replaced_bits(form: Form, stored: np.ndarray[Any, Any], saved: np.ndarray[Any, Any], factor: Fraction) -> bytes:
    """Return the bytes of W + λ·(V − W), where each step is exact in binary32 or λ is 1."""
    out = bytearray()
    single = FORMS["F32"]
    for before, value in zip(stored.reshape(-1), saved.reshape(-1), strict=True):
        old, new = Fraction(float(before)), Fraction(float(value))
        change = factor * (new - old)
        steps = [new] if factor == 1 else [new - old, change, *([old + change] if form.bits < single.bits else [])]
        if not all(is_exact(single, step) for step in steps):
            raise ValueError(f"replacing {float(old)} by {float(new)} is rounded more than once")
        out += round_to(form, old + change).to_bytes(form.bits // 8, "little")
    return bytes(out)


def _check_exact(form: Form, parts: Sequence[Fraction], total: Fraction) -> None:
    """Prove that no order of summation in binary32 rounds: all parts are multiples of one small enough quantum."""
    single = FORMS["F32"]
    quantum = Fraction(1, max((part.denominator for part in parts), default=1))
    if sum(map(abs, parts)) >= quantum * 2**single.precision or quantum < Fraction(2) ** -149:
        raise ValueError(f"the sum of {[float(part) for part in parts]} is not exact in binary32")
    if form.bits < single.bits and not is_exact(single, total):
        raise ValueError(f"{float(total)} is rounded before it is rounded to the stored form")


def terms_of(change: Change, weight: float) -> np.ndarray[Any, Any]:
    """Return the list of terms of each number of the stored tensor, user weight and scale included."""
    rank = change.rank
    down, up = change.down.reshape(rank, -1), change.up.reshape(-1, rank)
    factor = change.scale * Fraction(weight)
    terms = np.empty((up.shape[0], down.shape[1]), dtype=object)
    for row, column in product(range(up.shape[0]), range(down.shape[1])):
        terms[row, column] = [
            Fraction(float(up[row, r])) * Fraction(float(down[r, column])) * factor for r in range(rank)
        ]
    return terms.T if change.slot in ("linear-transposed", "embedding") else terms


def _steps(shape: Sequence[int], adapters: Sequence[tuple[Adapter, float]], name: str) -> np.ndarray[Any, Any]:
    """Return the terms of all adapters for the tensor `name`, whose changes may be none."""
    found = [
        terms_of(change, weight).reshape(-1)
        for adapter, weight in adapters
        for change in adapter
        if isinstance(change, Change) and f"{change.name}.weight" == name
    ]
    found += [
        np.array([[Fraction(float(x)) * change.scale * Fraction(weight)] for x in change.beside["lora_B.bias"]])
        for adapter, weight in adapters
        for change in adapter
        if isinstance(change, Change) and f"{change.name}.bias" == name and "lora_B.bias" in change.beside
    ]
    joined = np.empty(prod(shape), dtype=object)
    for index in range(prod(shape)):
        joined[index] = [part for terms in found for part in terms[index]]
    return joined


def merge_weights(form: str, weights: Weights, adapters: Sequence[tuple[Adapter, float]]) -> dict[str, str]:
    """Return every tensor of the merged state dict, its bytes in hexadecimal."""
    replaced = {
        f"{change.name}.{role}": (saved, Fraction(change.number) * Fraction(weight))
        for adapter, weight in adapters
        for change in adapter
        if isinstance(change, Saved)
        for role, saved in change.values.items()
    }
    own = {
        f"{change.name}.{role.removeprefix('base_layer.')}": values
        for adapter, _ in adapters
        for change in adapter
        if isinstance(change, Change)
        for role, values in change.beside.items()
        if role.startswith("base_layer.")
    }
    return {
        name: (
            replaced_bits(FORMS[form], stored, *replaced[name])
            if name in replaced
            else merged_bits(FORMS[form], own.get(name, stored), _steps(stored.shape, adapters, name))
        ).hex()
        for name, stored in weights.items()
    }


def vector(
    requirements: str, weights: Weights, adapters: Sequence[tuple[Adapter, float]], forms: Sequence[str] = THREE
) -> Files:
    """Return a vector of a merge into the same weights, stored in each of `forms`."""
    files: dict[str, Any] = _inputs(weights, adapters, forms)
    files["expected.json"] = {
        "requirements": requirements.split(),
        "verdict": "merged",
        "adapters": _listing(adapters),
        "merged": {f"base.{form}.safetensors": merge_weights(form, weights, adapters) for form in forms},
    }
    return files


def refusal(
    requirements: str,
    codes: str,
    weights: Weights,
    adapters: Sequence[tuple[Adapter, float]],
    form: str = "F32",
    **more: Any,
) -> Files:
    """Return a vector of a merge that must be refused for one of `codes`."""
    files: dict[str, Any] = _inputs(weights, adapters, [form])
    files["expected.json"] = {
        "requirements": requirements.split(),
        "verdict": "refused",
        "codes": codes.split(),
        "adapters": _listing(adapters),
        **more,
    }
    return files


def _inputs(weights: Weights, adapters: Sequence[tuple[Adapter, float]], forms: Sequence[str]) -> dict[str, bytes]:
    bases = {
        f"base.{form}.safetensors": store({name: tensor(form, values) for name, values in weights.items()})
        for form in forms
    }
    return bases | {f"adapter{number}.safetensors": write_adapter(item) for number, (item, _) in enumerate(adapters, 1)}


def _listing(adapters: Sequence[tuple[Adapter, float]]) -> list[Mapping[str, Any]]:
    return [
        {"file": f"adapter{number}.safetensors", "weight": weight} for number, (_, weight) in enumerate(adapters, 1)
    ]


# --- the numbers ------------------------------------------------------------------------------------------------------


def _change(seed: int, name: str, slot: str, shape: Sequence[int], rank: int = 2, **more: Any) -> Change:
    """Return a change of 1/1024 to some units: finer than float16 and bfloat16 hold beside the weights."""
    dice = Dice(seed)
    down = dice.numbers((rank, *shape[1:]), step=1 / 32, most=60)
    up = dice.numbers((shape[0], rank, *(1 for _ in shape[2:])), step=1 / 32, most=60)
    return Change(name, slot, down, up, **more)


def _stored(seed: int, change: Change) -> np.ndarray[Any, Any]:
    """Return base numbers that every form holds, stored as the change's slot has it."""
    values = Dice(seed).numbers(change.shape, step=0.125, most=60)
    return np.ascontiguousarray(values.T) if change.slot in ("linear-transposed", "embedding") else values


def _one_slot(seed: int, slot: str, shape: Sequence[int], requirements: str = "R-041 R-080") -> Files:
    change = _change(seed, "proj", slot, shape, rule="alpha/rank", number=4)
    weights = {"proj.weight": _stored(seed + 1, change), "norm.weight": np.array([1.0, -2.5, 0.375])}
    return vector(requirements, weights, [([change], 1)])


def _rules() -> Files:
    """Four targets, each with a rule of its own; negative and fractional numbers."""
    rules = (("alpha/rank", 1.0, 4), ("alpha/sqrt(rank)", -3.0, 4), ("multiplier", 0.375, 3), ("alpha/rank", 0.5, 1))
    adapter = [
        _change(30 + index, f"layers.{index}.proj", "linear", (3, 3), rank, rule=rule, number=number)
        for index, (rule, number, rank) in enumerate(rules)
    ]
    weights = {f"{change.name}.weight": _stored(40 + index, change) for index, change in enumerate(adapter)}
    return vector("R-050 R-051 R-080 R-081", weights, [(adapter, 1)])


def _plain(seed: int, name: str = "proj") -> Change:
    return _change(seed, name, "linear", (3, 4))


def _user_weights() -> Files:
    change = _plain(50)
    return vector("R-080", {"proj.weight": _stored(51, change)}, [([change], -0.75)])


def _several() -> Files:
    """Three adapters on one weight, one of them on another weight too."""
    first, second, third, other = _plain(52), _plain(53), _plain(54), _plain(55, "other")
    weights = {"proj.weight": _stored(56, first), "other.weight": _stored(57, other)}
    return vector("R-080 R-081 R-085", weights, [([first], 1), ([second, other], 0.5), ([third], -2)])


def _constant(delta: float, weights: Sequence[float]) -> tuple[Change, np.ndarray[Any, Any]]:
    """Return a change that adds `delta` to each of the weights, which make one row, and that row."""
    return Change("proj", "linear", np.ones((1, len(weights))), np.array([[delta]])), np.array([weights])


def _one_rounding(form: str) -> Files:
    """Each delta alone is lost in half a step; both together are a whole one: two merges would give another result."""
    change, stored = _constant(HALF_STEPS[form], [1, 1.5])
    return vector("R-080", {"proj.weight": stored}, [([change], 1), ([change], 1)], [form])


def _ties(form: str) -> Files:
    """Sums half-way between two numbers, above even and odd ones, of both signs."""
    half = HALF_STEPS[form]
    starts = [sign * (number + odd * 2 * half) for number in (1, 1.5) for odd in (0, 1) for sign in (1, -1)]
    deltas = {"up": half, "down": -half, "third": 3 * half}
    adapter = [replace(_constant(delta, starts)[0], name=name) for name, delta in deltas.items()]
    return vector("R-080", {f"{name}.weight": np.array([starts]) for name in deltas}, [(adapter, 1)], [form])


def _subnormals(form: str, least: float) -> Files:
    """Sums in and around the subnormal numbers of a form whose smallest number is `least`."""
    half = least / 2 if form != "F32" else least
    quarter = half / 2 if form != "F32" else half
    largest = 2 ** (FORMS[form].precision - 1) - 1
    starts = np.array([[0.0, 1, 2, 3, 4, largest, -1, -2]]) * least
    adapter, weights = [], {}
    for name, delta in {
        "half": half,
        "quarter": quarter,
        "three": 3 * half,
        "minus": -half,
        "much": 127 * half,
    }.items():
        up = 2.0**-60
        change = Change(name, "linear", np.full((1, 8), delta / up), np.array([[up]]))
        adapter.append(change)
        weights[f"{name}.weight"] = starts
    return vector("R-080", weights, [(adapter, 1)], [form])


def _double() -> Files:
    """A weight stored in binary64 is added to in binary64."""
    change = _plain(60)
    weights = {"proj.weight": _stored(61, change) / 3 + 2.0**-40}
    return vector("R-080", weights, [([change], 1)], ["F64"])


def _factor_dtypes() -> Files:
    adapter, weights = [], {}
    for index, dtype in enumerate(("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")):
        dice = Dice(70 + index)
        down, up = (dice.numbers(shape, step=0.25, most=4) for shape in ((2, 3), (2, 2)))
        change = Change(f"in_{dtype}", "linear", down, up, number=1 / 128, dtype=dtype)
        adapter.append(change)
        weights[f"{change.name}.weight"] = _stored(80 + index, change)
    return vector("R-042 R-080", weights, [(adapter, 1)])


def _stamped(change: Change, stored: np.ndarray[Any, Any]) -> Change:
    """Return the change with the fingerprint of the stored weight."""
    weight = stored.T if change.slot in ("linear-transposed", "embedding") else stored
    return replace(change, more={"fingerprint": fingerprint(change.name, weight)})


def _fingerprints() -> Files:
    """Fingerprints taken from numbers that 16 bits do not hold match the weight after its cast, in any layout."""
    adapter, weights = [], {}
    shapes = {"linear": (3, 4), "linear-transposed": (4, 3), "embedding": (3, 8), "conv": (2, 2, 3, 2)}
    for index, (slot, shape) in enumerate(shapes.items()):
        change = _change(90 + index, slot.replace("-", "_"), slot, shape)
        stored = _stored(95 + index, change)
        adapter.append(_stamped(change, stored * (1 + 2.0**-9)))
        weights[f"{change.name}.weight"] = stored
    return vector("R-060 R-061 R-062 R-063", weights, [(adapter, 1)])


def _saved(seed: int, **more: Any) -> Saved:
    """Return a weight and a bias that 16 bits do not hold."""
    dice = Dice(seed)
    values = {"weight": dice.numbers((3, 4), 1 / 4096, 30000), "bias": dice.numbers((3,), 1 / 4096, 30000)}
    return Saved("head", values, **more)


def _head(seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return base numbers for `_saved`, and a tensor that nothing changes."""
    dice = Dice(seed)
    shapes = {"head.weight": (3, 4), "head.bias": (3,), "norm.weight": (2,)}
    return {name: dice.numbers(shape, 0.125, 60) for name, shape in shapes.items()}


def _replaced() -> Files:
    """For λ = 1 it is V, rounded once: ties, and numbers so small that W + (V − W) would be another one."""
    base, saved = _head(120), _saved(121)
    base["head.weight"][0] = saved.values["weight"][1, 0] = 1
    saved.values["weight"][0] = [1 + 2.0**-11, 1 + 3 * 2.0**-8, 3 * 2.0**-26, 0]
    adapter = [saved, Saved("norm", {"weight": np.array([1 / 3, -(2.0**-7)]).astype(np.float32)})]
    return vector("R-044 R-080 R-081", base, [(adapter, 1)])


def _bias_beside_lora() -> Files:
    """One adapter adds to the weight, another replaces the bias of the same module."""
    change, saved = _change(126, "head", "linear", (3, 4)), _saved(127)
    saved = replace(saved, values={"bias": saved.values["bias"]})
    return vector("R-044 R-080 R-085", _head(128), [([change], 1), ([saved], 0.5)])


def _beside_lora() -> Files:
    """A bias of B, and the base's own weight and bias saved as a whole, to which the changes are added."""
    dice = Dice(130)
    linear = _change(131, "linear", "linear", (3, 4), rule="alpha/rank", number=4)
    linear = replace(linear, beside={"lora_B.bias": dice.numbers((3,), 1 / 64, 60)})
    table = _change(132, "table", "embedding", (3, 5))
    table = replace(table, beside={"base_layer.weight": dice.numbers((5, 3), 0.125, 60)})
    conv = _change(133, "conv", "conv", (3, 2, 3))
    saved = {"base_layer.weight": dice.numbers((3, 2, 3), 0.125, 60), "base_layer.bias": dice.numbers((3,), 0.125, 60)}
    conv = replace(conv, beside=saved | {"lora_B.bias": dice.numbers((3,), 1 / 64, 60)})
    weights = {f"{change.name}.weight": _stored(134, change) for change in (linear, table, conv)}
    weights |= {f"{name}.bias": dice.numbers((3,), 0.125, 60) for name in ("linear", "conv")}
    return vector("R-045 R-080 R-085", weights, [([linear, table, conv], 1)])


MERGES: Mapping[str, Files] = {
    "beside-lora": _beside_lora(),
    "linear": _one_slot(100, "linear", (3, 4)),
    "linear-transposed": _one_slot(102, "linear-transposed", (3, 4), "R-030 R-041 R-080"),
    "linear-transposed-square": _one_slot(104, "linear-transposed", (4, 4), "R-030 R-031 R-041"),
    "embedding": _one_slot(106, "embedding", (3, 5), "R-030 R-041 R-080"),
    "conv-1d": _one_slot(108, "conv", (3, 2, 3)),
    "conv-2d": _one_slot(110, "conv", (3, 2, 3, 2)),
    "conv-3d": _one_slot(112, "conv", (2, 2, 2, 1, 3)),
    "scaling-rules": _rules(),
    "user-weight": _user_weights(),
    "several-adapters": _several(),
    "one-rounding-float32": _one_rounding("F32"),
    "one-rounding-float16": _one_rounding("F16"),
    "one-rounding-bfloat16": _one_rounding("BF16"),
    "ties-to-even-float32": _ties("F32"),
    "ties-to-even-float16": _ties("F16"),
    "ties-to-even-bfloat16": _ties("BF16"),
    "subnormal-float32": _subnormals("F32", 2.0**-149),
    "subnormal-float16": _subnormals("F16", 2.0**-24),
    "subnormal-bfloat16": _subnormals("BF16", 2.0**-133),
    "float64": _double(),
    "factor-dtypes": _factor_dtypes(),
    "fingerprints-after-a-cast": _fingerprints(),
    "replace": _replaced(),
    "replace-by-half": vector("R-044 R-080", _head(122), [([_saved(123)], 0.5)]),
    "replace-scaled": vector("R-044 R-050 R-080", _head(124), [([_saved(125, number=-0.5)], 0.5)]),
    "replace-scaled-to-one": vector("R-044 R-050", _head(129), [([_saved(130, number=4, dtype="F64")], 0.25)]),
    "replace-bias-beside-lora": _bias_beside_lora(),
}


# --- merges that are refused ------------------------------------------------------------------------------------------


def _not_finite(value: float) -> Files:
    change = _plain(200)
    down = change.down.copy()
    down[1, 2] = value
    return refusal("R-042", "LF501", {"proj.weight": _stored(201, change)}, [([replace(change, down=down)], 1)])


def _refusals() -> Iterator[tuple[str, Files]]:
    change = _plain(210)
    stored = _stored(211, change)
    good = {"proj.weight": stored}
    yield "refused-nan-in-a-factor", _not_finite(float("nan"))
    yield "refused-infinity-in-a-factor", _not_finite(float("-inf"))
    yield "refused-scale-zero", refusal("R-051", "LF208", good, [([replace(change, number=0)], 1)])
    yield "refused-target-missing", refusal("R-081", "LF401", {"other.weight": stored}, [([change], 1)])
    both = [change, replace(change, name="gone")]
    yield "refused-one-of-two-targets-missing", refusal("R-081", "LF401", good, [(both, 1)])
    yield "refused-shape", refusal("R-081", "LF405", {"proj.weight": stored[:2]}, [([change], 1)])
    turned = {"proj.weight": np.ascontiguousarray(stored.T)}
    yield "refused-shape-transposed", refusal("R-031 R-081", "LF405", turned, [([change], 1)])
    stamped = _stamped(change, stored)
    wrong = {"proj.weight": _stored(212, change)}
    yield "refused-another-base", refusal("R-062 R-063", "LF406", wrong, [([stamped], 1)])
    near = stored.copy()
    near *= 1 + 2.0**-6
    yield "refused-another-base-but-near", refusal("R-062 R-063", "LF406", {"proj.weight": near}, [([stamped], 1)])
    table = _change(213, "tokens", "embedding", (3, 3))
    kept = _stored(214, table)
    turned = {"tokens.weight": np.ascontiguousarray(kept.T)}
    yield "refused-orientation-of-a-square", refusal("R-031 R-063", "LF406", turned, [([_stamped(table, kept)], 1)])
    lost = {"onnx_1": stored, "a.weight": stored, "b.weight": stored}
    yield "refused-name-lost-and-two-match", refusal("R-063 R-081", "LF404 LF401", lost, [([stamped], 1)])
    flat = np.full(stored.shape, 0.5)
    dull = {"a.weight": flat}
    yield "refused-name-lost-and-few-samples", refusal("R-063", "LF401", dull, [([_stamped(change, flat)], 1)])
    for name, delta in {"": 16384.0, "-by-rounding": 16}.items():  # 65520 is half-way to 65536.
        most = Change("proj", "linear", np.ones((1, 2)), np.array([[delta]]))
        large = {"proj.weight": np.array([[65504.0, 1]])}
        yield f"refused-overflow{name}", refusal("R-084", "LF503", large, [([most], 1)], "F16")
    little = Change("proj", "linear", np.ones((1, 3)), np.array([[2.0**-13]]))
    numbers = {"proj.weight": np.array([[1.0, 2, -3]])}
    yield (
        "refused-lost-in-rounding",
        refusal("R-084", "LF504", numbers, [([little], 1)], "F16", min_retained=0.5),
    )


def _refused_replacements() -> Iterator[tuple[str, Files]]:
    saved, base = _saved(220), _head(221)
    weight, bias = saved.values["weight"], saved.values["bias"]
    both = [([saved], 1), ([_saved(222)], 0.5)]
    yield "refused-replace-twice", refusal("R-044 R-085", "LF409", base, both)
    change = _change(223, "head", "linear", (3, 4))
    yield "refused-replace-beside-lora", refusal("R-085", "LF409", base, [([change], 1), ([saved], 1)])

    def refused(requirements: str, code: str, weights: Weights, form: str = "F32", **values: Any) -> Files:
        return refusal(f"R-044 {requirements}", code, weights, [([replace(saved, values=values)], 1)], form)

    yield "refused-replace-shape", refused("R-081", "LF405", base, weight=weight[:, :3], bias=bias)
    turned = np.ascontiguousarray(weight.T)
    yield "refused-replace-shape-transposed", refused("R-031 R-081", "LF405", base, weight=turned)
    yield "refused-replace-shape-of-a-bias", refused("R-081", "LF405", base, bias=bias.reshape(1, 3))
    without = {name: values for name, values in base.items() if name != "head.bias"}
    yield "refused-replace-bias-missing", refused("R-081", "LF401", without, weight=weight, bias=bias)
    yield "refused-replace-by-nan", refused("R-042", "LF501", base, bias=np.array([1, float("nan"), 2]))
    yield "refused-replace-overflow", refused("R-084", "LF503", base, "F16", bias=np.array([1, 65520.0, 2]))


VECTORS: Mapping[str, Files] = MERGES | dict(_refusals()) | dict(_refused_replacements())
