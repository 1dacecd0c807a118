"""Pages for people: one self-contained HTML file, with pictures, without scripts and without a network.

What a page shows comes from files and is hostile: every text goes through `_text.escape`, and the page forbids itself,
by its content security policy, to load or run anything.
"""

from importlib.resources import files
from pathlib import PurePath
from typing import Final

from loraformat.algebra.analysis import Analysis
from loraformat.pages._adapters import write_adapter
from loraformat.pages._comparisons import write_comparison
from loraformat.pages._text import escape, problems

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src 'none'; form-action 'none'; base-uri 'none'"
_LEAD: Final = (
    "Singular values and singular directions of what is added to the base, ΔW = s·B·A, after section 7 of the LoRA "
    "paper (arXiv 2106.09685). Energy is the squared Frobenius norm."
)


def write_analysis(analysis: Analysis) -> str:
    """Return an analysis as a page; the same analysis gives the same text."""
    names = [adapter.name for adapter in analysis.adapters]
    title = f"What {names[0]} has learned" if len(names) == 1 else f"What {len(names)} adapters have learned"
    base = f" Compared with the base <code>{escape(PurePath(analysis.base).name)}</code>." if analysis.base else ""
    body = [
        f'<p class="eyebrow">loraformat analysis</p><h1>{escape(title)}</h1><p class="lead">{escape(_LEAD)}{base}</p>',
        _navigation(analysis) if len(names) > 1 else "",
        problems(analysis.problems),
    ]
    for place, compared in enumerate(analysis.comparisons):
        heading = f"{escape(compared.first)} and {escape(compared.second)}"
        body.append(f'<h2 id="pair-{place}">{heading}</h2>{write_comparison(compared)}')
    for place, adapter in enumerate(analysis.adapters):
        heading = f'<h2 id="adapter-{place}">{escape(adapter.name)}</h2>' if len(names) > 1 else ""
        body.append(heading + write_adapter(adapter))
    return _wrap(title, "".join(body))


def _navigation(analysis: Analysis) -> str:
    links = [
        *(
            f'<a href="#pair-{i}">{escape(c.first)} ∩ {escape(c.second)}</a>'
            for i, c in enumerate(analysis.comparisons)
        ),
        *(f'<a href="#adapter-{i}">{escape(a.name)}</a>' for i, a in enumerate(analysis.adapters)),
    ]
    return f"<nav>{''.join(links)}</nav>"


def _wrap(title: str, body: str) -> str:
    style = (files("loraformat.pages") / "style.css").read_text(encoding="utf-8")
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{style}</style>"
    )
    footer = "<footer>Every number is defined in docs/analysis.md of loraformat; all of them are in --json.</footer>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{body}{footer}</main></body></html>\n'
