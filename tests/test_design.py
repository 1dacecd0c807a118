"""The drawing of the house in docs/design.md is of this house."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "loraformat"
DESIGN = ROOT / "docs" / "design.md"


def test_each_module_and_room_stands_in_the_table_once() -> None:
    table = DESIGN.read_text(encoding="utf-8").partition("| **the face** | |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[1:]]
    named = Counter(name for cell in cells for name in re.findall(r"`(\w+/?)`", cell))
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    rooms = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert named == Counter(modules | rooms)


def test_files_that_the_text_names_exist() -> None:
    """A file is named by its name where that says where it lies, else by its path."""
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", DESIGN.read_text(encoding="utf-8")))
    files = [path.as_posix() for folder in ("loraformat", "bench") for path in ROOT.glob(f"{folder}/**/*.py")]
    assert {name for name in named if not any(file.endswith(f"/{name}") for file in files)} == set()
