"""Pictures as inline SVG: columns, bars, heat maps and curves. Colours come from the page's style, light or dark."""

import math
from collections.abc import Callable, Sequence
from typing import Final

from loraformat.pages._text import escape, number

_WIDTH: Final = 520
_HEIGHT: Final = 210
_LEFT: Final = 46
_LABELS: Final = 16
"""Labels along an axis; of more every second, third ... is written."""
_FAINT: Final = 0.04
_TITLED_CELLS: Final = 4000
"""Cells of a heat map up to which each says its value when pointed at."""

Label = Callable[[float], str]


def columns(labels: Sequence[str], values: Sequence[float], label: Label, mark: float | None = None) -> str:
    """Return upright columns over labels, with a dashed line at `mark`."""
    top = _nice(max([*values, mark or 0.0], default=0.0))
    height, right = _HEIGHT - 34, _WIDTH - 8
    step = (right - _LEFT) / max(1, len(values))
    parts = [_ruler(top, height, right, label)]
    for place, (name, value) in enumerate(zip(labels, values, strict=True)):
        x, size = _LEFT + place * step, (height - 10) * value / top
        title = f"<title>{escape(name)}: {escape(label(value))}</title>"
        bar = f'x="{x + step * 0.12:.1f}" y="{height - size:.1f}" width="{step * 0.76:.1f}" height="{size:.1f}"'
        parts.append(f'<rect class="bar" rx="1.5" {bar}>{title}</rect>')
        if place % _every(len(labels)) == 0:
            parts.append(_text(x + step / 2, height + 16, name, "middle"))
    if mark is not None:
        y = height - (height - 10) * mark / top
        parts.append(f'<path class="mark" d="M{_LEFT} {y:.1f}H{right}"/>')
    return _wrap(_WIDTH, _HEIGHT, parts)


def bars(labels: Sequence[str], values: Sequence[float], label: Label) -> str:
    """Return lying bars, the label above each and its value at the end."""
    top = max(values, default=0.0) or 1.0
    parts = []
    for place, (name, value) in enumerate(zip(labels, values, strict=True)):
        y, size = place * 34, max(1.0, (_WIDTH - 70) * value / top)
        parts.append(f'<text class="strong" x="0" y="{y + 12}">{escape(_clip(name, 68))}</text>')
        parts.append(f'<rect class="bar" rx="2" x="0" y="{y + 17}" width="{size:.1f}" height="10"/>')
        parts.append(f'<text x="{size + 6:.1f}" y="{y + 26}">{escape(label(value))}</text>')
    return _wrap(_WIDTH, len(values) * 34 + 2, parts)


def heat_map(
    rows: Sequence[str],
    names: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    top: float,
    label: Label,
    axes: tuple[str, str] = ("", ""),
    left: int = 30,
    width: int = 260,
    tall: float | None = None,
) -> str:
    """Return cells, the stronger the nearer to `top`; None is an empty cell.

    Args:
        rows: names of the rows, from the top down.
        names: names of the columns.
        values: one list for each row.
        top: the value of the strongest colour.
        label: how a value is said.
        axes: names of what runs downwards and of what runs to the right.
        left: room for the rows' names.
        width: of the whole picture.
        tall: height of a row; None makes cells square.
    """
    size = (width - left - 4) / max(1, len(names))
    tall = tall or size
    head = 14 if axes[0] else 0
    parts = [f'<text x="0" y="10">{escape(axes[0])} ↓</text>'] if axes[0] else []
    bottom = head + tall * len(rows)
    parts.append(
        f'<rect class="frame" x="{left}" y="{head}" width="{size * len(names):.1f}" height="{tall * len(rows):.1f}"/>'
    )
    titled = len(rows) * len(names) <= _TITLED_CELLS
    for i, row in enumerate(values):
        y = head + i * tall
        if i % _every(len(rows), tall, 11) == 0:
            parts.append(_text(left - 5, y + tall / 2 + 4, _clip(rows[i], left // 6), "end"))
        for j, value in enumerate(row):
            if value is not None:
                say = f"{rows[i]}, {names[j]}: {label(value)}" if titled else ""
                parts.append(_cell(left + j * size, y, size, tall, value / top if top else 0.0, say))
    step = _every(len(names), size, 22)
    parts += [_text(left + (j + 0.5) * size, bottom + 13, names[j], "middle") for j in range(0, len(names), step)]
    if axes[1]:
        parts.append(_text(width - 4, bottom + 28, f"{axes[1]} →", "end"))
    return _wrap(width, bottom + (32 if axes[1] else 18), parts)


def curves(lines: Sequence[tuple[str, Sequence[float]]], decades: int, *, width: int = 260, height: int = 150) -> str:
    """Return falling curves on a logarithmic scale of so many decades, 1 at the top, the later ones stronger."""
    longest = max((len(values) for _, values in lines), default=1)
    left, bottom, right = 34, height - 22, width - 6
    parts = []
    for decade in range(decades + 1):
        y = 8 + (bottom - 8) * decade / decades
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(_text(left - 5, y + 4, number(10.0**-decade), "end"))
    for place, (name, values) in enumerate(lines):
        places = (
            (left + (right - left) * i / max(1, longest - 1), 8 + (bottom - 8) * -math.log10(value) / decades)
            for i, value in enumerate(values)
            if value >= 10.0**-decades
        )
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        shade = 0.25 + 0.75 * (place + 1) / len(lines)
        drawn = f'<polyline class="curve" stroke-opacity="{shade:.2f}" points="{points}">'
        parts.append(f"{drawn}<title>{escape(name)}</title></polyline>")
    parts.append(f'<text x="{left}" y="{height - 6}">1</text>')
    parts.append(_text(right, height - 6, f"i = {longest}", "end"))
    return _wrap(width, height, parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _cell(x: float, y: float, width: float, height: float, share: float, say: str) -> str:
    shade = _FAINT + (1 - _FAINT) * min(1.0, max(0.0, share))
    place = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    title = f"<title>{escape(say)}</title>" if say else ""
    return f'<rect class="cell" {place} fill-opacity="{shade:.3f}">{title}</rect>'


def _ruler(top: float, height: int, right: int, label: Label) -> str:
    """Return lines across a picture of columns with their values at the left."""
    lines = []
    for quarter in range(5):
        y = height - (height - 10) * quarter / 4
        lines.append(f'<path class="{"grid" if quarter else "axis"}" d="M{_LEFT} {y:.1f}H{right}"/>')
        lines.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(label(top * quarter / 4))}</text>'
        )
    return "".join(lines)


def _nice(value: float) -> float:
    """Return the next number up of the form 1, 2, 4, 6 or 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if value <= step * power * (1 + 1e-9))


def _every(count: int, size: float = 0.0, room: int = 0) -> int:
    """Return the step at which labels are written, so that they neither crowd nor overlap."""
    crowded = math.ceil(count / _LABELS)
    return max(1, crowded, math.ceil(room / size)) if size else max(1, crowded)


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[len(text) - length + 1 :]


def _wrap(width: float, height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img">{"".join(parts)}</svg>'
