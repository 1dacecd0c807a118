"""The page of an analysis: complete, closed, harmless, and the same each time."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import loraformat
from builders import write_peft, write_tensors
from loraformat.algebra.analysis import Analysis
from loraformat.pages import write_analysis
from loraformat.pages._svg import bars, columns, curves, heat_map
from loraformat.pages._text import count, escape, number, percent

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Checker(HTMLParser):
    """Collects what a page asks for, and fails on tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), "a script in an attribute"
            if name in ("href", "src", "action", "data", "xlink:href"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


@pytest.fixture
def analysis(tmp_path: Path) -> Analysis:
    rng = np.random.default_rng(0)
    names = [f"m.layers.{layer}.{module}" for layer in range(4) for module in ("q", "up")]
    folders = []
    for seed, rank in (("one", 3), ("two", 5)):
        factors = {
            n: (rng.standard_normal((rank, 20)).astype("f4"), rng.standard_normal((36, rank)).astype("f4"))
            for n in names
        }
        folders.append(write_peft(tmp_path / seed, factors))
    base = write_tensors(
        tmp_path / "base.safetensors", {f"{n}.weight": rng.standard_normal((36, 20)).astype("f4") for n in names}
    )
    return loraformat.analyse(folders, base)


def test_it_is_whole_and_asks_for_nothing(analysis: Analysis) -> None:
    page = write_analysis(analysis)
    checker = check(page)
    assert checker.tags.isdisjoint({"script", "link", "img", "iframe", "object", "form", "input"})
    assert checker.links
    assert {link[1:] for link in checker.links} <= set(checker.ids), "only places on the page"
    assert "url(" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page
    for title in (
        "Energy by layer",
        "Spectra",
        "Rank in use",
        "What is amplified",
        "What the layers share",
        "Subspaces in common",
    ):
        assert title in checker.text
    for adapter in analysis.adapters:
        for target in adapter.targets:
            assert target.name in checker.text


def test_pictures_are_sound_xml(analysis: Analysis) -> None:
    pictures = re.findall(r"<svg.*?</svg>", write_analysis(analysis), flags=re.DOTALL)
    assert len(pictures) > 20
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for rect in root.iter("rect"):
            x, y, w, h = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
            assert min(x, y, w, h) >= 0
            assert x + w <= width + 1
            assert y + h <= height + 1


def test_a_grid_has_a_cell_for_every_target(analysis: Analysis) -> None:
    (adapter, _) = analysis.adapters
    page = write_analysis(replace(analysis, adapters=(adapter,), comparisons=()))
    for target in adapter.targets:
        assert f"<title>{target.module}, {target.layer}: {number(target.norm)}</title>" in page


def test_names_are_only_text(analysis: Analysis) -> None:
    evil = '"><script>alert(1)</script><svg onload=x>\u202e\x1b[31m&amp;'
    first = analysis.adapters[0]
    targets = tuple(replace(each, name=evil, module=evil) for each in first.targets)
    within = tuple(replace(each, module=evil, labels=(evil,) * len(each.labels)) for each in first.within)
    adapter = replace(first, name=evil, targets=targets, by_module={evil: 1.0}, within=within)
    compared = replace(
        analysis.comparisons[0], first=evil, second=evil, by_target={evil: {"input": 0, "output": 0, "cosine": 0}}
    )
    maps = tuple(replace(each, module=evil) for each in compared.maps)
    page = write_analysis(Analysis((adapter, adapter), (replace(compared, maps=maps),), f"/x/{evil}", ()))
    checker = check(page)
    assert "script" not in checker.tags
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "&amp;amp;" in page


def test_the_same_analysis_gives_the_same_page(analysis: Analysis, tmp_path: Path) -> None:
    assert write_analysis(analysis) == write_analysis(analysis)
    path = loraformat.save_page(analysis, tmp_path / "page.html")
    assert path.read_text(encoding="utf-8") == write_analysis(analysis)
    with pytest.raises(loraformat.LoraformatError) as caught:
        loraformat.save_page(analysis, path)
    assert caught.value.codes == ("LF601",)
    loraformat.save_page(analysis, path, force=True)


def test_numbers() -> None:
    assert [number(x) for x in (0.0, 12.345, 1234.5, 1.2e-5, 2e7, None, float("nan"))] == [
        "0",
        "12.3",
        "1,234",
        "1.2e-05",
        "2e+07",
        "–",
        "–",
    ]
    assert (percent(0.1234), count(812), count(12_345), count(3_400_000)) == ("12.3 %", "812", "12.3 k", "3.4 M")
    assert escape("a<b\n\x07") == "a&lt;b \\x07"


def test_pictures_of_nothing() -> None:
    for picture in (
        columns([], [], number),
        bars(["a"], [0.0], number),
        curves([], 2),
        heat_map([], [], [], top=0, label=number),
    ):
        ElementTree.fromstring(picture)
    flat = heat_map(["a"], ["b", "c"], [[0.0, None]], top=0.0, label=number)
    assert flat.count('class="cell"') == 1


def test_columns_stand_on_the_axis_and_the_highest_fits() -> None:
    root = ElementTree.fromstring(columns(["a", "b"], [0.25, 1.0], percent))
    first, second = (float(rect.attrib["height"]) for rect in root.iter("rect"))
    assert second == pytest.approx(4 * first, abs=0.2)
