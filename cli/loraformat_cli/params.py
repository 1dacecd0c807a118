"""How words of the command line become values."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from click import ParamType
    from click.shell_completion import CompletionItem
else:

    class ParamType(click.ParamType):
        """That of click, which older versions do not let say what its values are."""

        def __class_getitem__(cls, values: object) -> type:
            """Return the class as it is."""
            return cls


_UNITS: Final = {"": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for unit, base in (("b", 1000), ("ib", 1024), ("", 1024))
    if prefix or unit == "b"
}
"""Suffix in lower case to bytes: `MB` is decimal, `MiB` and the bare `M` of other tools are binary."""


FORMS: Final = ("float32", "float16", "bfloat16", "float64")
"""Number forms that factors may be rounded to."""


class Finite(ParamType[float]):
    """A number that is neither NaN nor infinite, between bounds."""

    name = "number"

    def __init__(self, low: float = -math.inf, high: float = math.inf) -> None:
        self._low = low
        self._high = high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number, or fail with a usage error."""
        number = finite(str(value))
        if number is None:
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        if not self._low <= number <= self._high:
            self.fail(f"{number:g} is not between {self._low:g} and {self._high:g}.", param, ctx)
        return number


class ByteSize(ParamType[int]):
    """A number of bytes with a unit: `512MiB`, `2GB`, `1.5G`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes, or fail with a usage error."""
        text = str(value).strip()
        digits = text.rstrip("bBiIkKmMgGtT ")
        unit = _UNITS.get(text[len(digits) :].strip().lower())
        number = finite(digits)
        if unit is None or number is None or number <= 0:
            self.fail(f"{value!r} is not a size such as 512MiB or 2GB.", param, ctx)
        return int(number * unit)


class WeightedAdapter(ParamType[tuple[Path, float | None]]):
    """`ADAPTER` or `ADAPTER:WEIGHT`; what names an existing path is a path, colons and all."""

    name = "adapter[:weight]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Path, float | None]:
        """Return path and weight, or fail with a usage error."""
        if isinstance(value, tuple):  # click converts a converted value again
            return value
        path, colon, tail = str(value).rpartition(":")
        if os.path.lexists(value) or "://" in value:
            return Path(value), None
        if not colon:
            self._refuse_loose_weight(value, param, ctx)
            return Path(value), None
        weight = finite(tail)
        if weight is None or not path:
            self.fail(f"{value!r} is neither an existing path nor ADAPTER:WEIGHT with a finite weight.", param, ctx)
        return Path(path), weight

    def _refuse_loose_weight(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> None:
        """Fail where a word is a weight that stands alone, or behind another sign than the colon."""
        path, _, tail = value.rpartition("=")
        if finite(tail) is not None and (not path or os.path.lexists(path)):
            name = path or "ADAPTER"
            self.fail(
                f"{value!r} is no path. A weight stands behind its adapter and a colon: {name}:{tail}", param, ctx
            )

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> "list[CompletionItem[str]]":
        """Let the shell complete paths."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


class NamedNumber(ParamType[tuple[str, float]]):
    """`GLOB=NUMBER`: a pattern of target names and a number for what it matches; `whole` asks for 1, 2, 3 ..."""

    name = "glob=number"

    def __init__(self, *, whole: bool = False) -> None:
        self._whole = whole

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Return pattern and number, or fail with a usage error."""
        if isinstance(value, tuple):  # click converts a converted value again
            return value
        pattern, _, tail = str(value).rpartition("=")
        number = finite(tail)
        if not pattern or number is None:
            self.fail(f"{value!r} is not GLOB=NUMBER.", param, ctx)
        if not self._whole:
            return pattern, number
        if number < 1 or number != int(number):
            self.fail(f"{tail!r} is not a whole number of at least 1.", param, ctx)
        return pattern, int(number)


def finite(text: str) -> float | None:
    """Return the number that `text` is, or None; `1_000` is a name here, not a number."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None
