"""What a user may wish of a plan: one record for the face, the planning and the receipt."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from loraformat.strict_json import JsonValue

Ranges = Mapping[str, tuple[float, float]]


class NumberWishes(TypedDict, total=False):
    """What the numbers of a plan depend on besides base, adapters and hints: what a session in memory can be asked too.

    Attributes:
        allow_unmatched: glob patterns of adapter targets that may be left out when the base has nothing for them.
        strip_prefix: removed from the front of the targets' names.
        allow_zero: accept a scale of zero.
        ignore_fingerprints: accept weights that do not match the fingerprint of their target.
        keep_scales: leave the scales of quantised weights as they are.
        accept_ranges: accept activation ranges of a quantised model that were measured on the base.
        any_rounding: where `base_checkpoint` gives the numbers of weights of 4 bits, round to the nearest codes, though
            the base's own were found in another way (GPTQ).
        on_quantized: `dequantize` writes quantised weights that change as floats, and the operators that read them with
            them; else they are quantised again.
    """

    allow_unmatched: Sequence[str]
    strip_prefix: str | None
    allow_zero: bool
    ignore_fingerprints: bool
    keep_scales: bool
    accept_ranges: bool
    any_rounding: bool
    on_quantized: str | None


class Wishes(NumberWishes, total=False):
    """What a plan is made by besides base, adapters, output and hints.

    Attributes:
        graphs: of a base of several models, patterns of the files to merge into, or folders of them; else all.
        untie: let tables part that `config.json` ties, where adapters change them apart; and rows of trained tokens
            change the table that they are for alone, where tied ones stand apart or in one tensor of a graph.
        new_biases: give biases to modules that have none, where adapters change them.
        external_data: `share` writes, beside an ONNX base, a small model that refers to the base's data files, and to
            one of its own for what differs; otherwise all are copied.
        calibration_method: which of onnxruntime's calibrators measures ranges anew, `entropy` or `percentile`; else it
            is `minmax`, the least and the largest value.
        dtype: number form of the output's floating-point tensors, such as `bfloat16`; else each keeps its own.
    """

    graphs: Sequence[str]
    untie: bool
    new_biases: bool
    external_data: str | None
    calibration_method: str | None
    dtype: str | None


class SettledWishes(Wishes, total=False):
    """Wishes, those that name files or formats settled: what a plan, and a receipt, has as its `options`.

    Attributes:
        anew: write the output anew, as safetensors.
        ranges: of activations, by the names of their scales, in the place of the base's.
        calibration: what data they were measured on.
    """

    anew: bool
    ranges: Ranges | None
    calibration: str | None


def list_unusual(wishes: SettledWishes) -> dict[str, JsonValue]:
    """Return the wishes that are not as usual: not empty, not False."""
    ranges = {name: list(ends) for name, ends in sorted((wishes.get("ranges") or {}).items())}
    named: Mapping[str, Any] = {**wishes, "ranges": ranges}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in named.items() if value}
