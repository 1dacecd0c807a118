"""`spec/KINDS.md` says of every kind what the code does: its formula, roles with their axes, and options."""

import re
from pathlib import Path

import pytest

from loraformat.kinds import KINDS
from loraformat.kinds._factored import FactoredKind

TEXT = (Path(__file__).parents[2] / "spec" / "KINDS.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
FACTORED = {name: kind for name, kind in KINDS if isinstance(kind, FactoredKind)}


def test_every_kind_has_a_section() -> None:
    assert list(SECTIONS) == list(FACTORED)


@pytest.mark.parametrize("name", FACTORED)
def test_the_section_says_what_the_code_does(name: str) -> None:
    kind, section = FACTORED[name], SECTIONS[name]
    assert f"`{kind.formula}`" in section
    assert f"*{kind.nature.value}*" in section
    assert ("No scale." in section) is not kind.is_scaled
    rows = re.findall(r"^\| [^|]*\| `([^`]+)` \| (.+) \|$", section, re.MULTILINE)
    expected = [
        (role, " or ".join(f"({', '.join(way.split())})" for way in axes.split("|")))
        for layout in kind.layouts
        for role, axes in layout.roles.items()
    ]
    assert [(role, re.sub(r" \*(optional|whole)[a-z, ]*\*$", "", axes)) for role, axes in rows] == expected
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(kind.options)
