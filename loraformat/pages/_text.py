"""Words and numbers of a page; every text from outside is escaped here."""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Final

from loraformat.problems import Problem, escape_controls


def escape(text: object) -> str:
    """Return a text that is only text in HTML: no tags, no entities, no control characters."""
    return html.escape(escape_controls(str(text)).replace("\n", " "), quote=True)


def number(value: float | None) -> str:
    """Return a number in three digits: `0.0123`, `12.3`, `1,230`, `1.2e-05`."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e6 or (size and size < 1e-3):
        return f"{value:.2g}"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """Return a share in per cent."""
    return f"{100 * value:.3g} %"


def count(value: int) -> str:
    """Return a whole number in short: `812`, `1.2 M`."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if value >= size:
            return f"{value / (1000 if letter == 'k' else size):.3g} {letter}"
    return f"{value:,}"


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Return summary tiles of what, value and remark."""
    cards = (
        f'<div class="tile"><span class="what">{escape(what)}</span><b>{escape(value)}</b>'
        f"<small>{escape(remark)}</small></div>"
        for what, value, remark in entries
    )
    return f'<div class="tiles">{"".join(cards)}</div>'


def figure(title: str, subtitle: str, picture: str, reading: str, legend: str = "") -> str:
    """Return a card: title, what it shows, the picture (markup), and how to read it."""
    head = f"<h3>{escape(title)}</h3><p class='of'>{escape(subtitle)}</p>"
    return f"<figure>{head}{legend}{picture}<figcaption>{escape(reading)}</figcaption></figure>"


def many(pictures: Iterable[tuple[str, str, str]]) -> str:
    """Return small pictures side by side, each of name, remark and markup."""
    cells = (
        f'<div><h4>{escape(name)} <span class="side">{escape(remark)}</span></h4>{picture}</div>'
        for name, remark, picture in pictures
    )
    return f'<div class="many">{"".join(cells)}</div>'


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; its first column is names."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(label: str, content: str) -> str:
    """Return markup that opens on a click."""
    return f"<details><summary>{escape(label)}</summary>{content}</details>"


SQUARE_ROOT: Final = "colours follow the square root, so that small values can be seen"
"""What the legend says of maps that are mostly near 0."""


def ramp(low: str, high: str, remark: str = "") -> str:
    """Return the legend of a heat map, from its faintest colour to its strongest."""
    tail = f"<span>{escape(remark)}</span>" if remark else ""
    scale = f'<span>{escape(low)}<i class="ramp"></i>{escape(high)}</span>'
    return f'<div class="legend">{scale}{tail}</div>'


def dashed(label: str) -> str:
    """Return the legend of a dashed line."""
    return f'<div class="legend"><span><i class="dash"></i>{escape(label)}</span></div>'


def problems(found: Sequence[Problem]) -> str:
    """Return what was left out and why."""
    return "".join(
        f'<div class="problem"><b>{escape(each.code)} {escape(each.title)}</b>: {escape(each.where)}, '
        f"{escape(each.found)}</div>"
        for each in found
    )
