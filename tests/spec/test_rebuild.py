"""The vectors are what their script makes, to the byte."""

import ast
import filecmp
import subprocess
import sys
from pathlib import Path

from spec.cases import KINDS, VECTORS

SCRIPT = VECTORS / "make_vectors.py"


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for kind in KINDS for path in (folder / kind).rglob("*"))


def test_the_script_makes_these_files(tmp_path: Path) -> None:
    # -P and -I would hide the script's own folder from it; nothing else is needed from outside.
    subprocess.run([sys.executable, "-B", str(SCRIPT), str(tmp_path)], check=True, env={"PYTHONHASHSEED": "7"})
    names = tree(VECTORS)
    assert tree(tmp_path) == names
    files = [name for name in names if (VECTORS / name).is_file()]
    _, differ, failed = filecmp.cmpfiles(VECTORS, tmp_path, files, shallow=False)
    assert not differ
    assert not failed
    assert len(files) > 400


def test_the_script_owes_nothing_to_the_package() -> None:
    for source in (SCRIPT, *(VECTORS / "make").glob("*.py")):
        for node in ast.walk(ast.parse(source.read_bytes())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith(("loraformat", "safetensors"))], source


def test_every_file_of_a_vector_is_named_or_usual() -> None:
    usual = {"expected.json", "adapter.safetensors", "native.safetensors"}
    for kind in KINDS:
        for folder in (VECTORS / kind).iterdir():
            for path in folder.iterdir():
                assert path.name in usual or path.name.startswith(("base.", "adapter", "peft")), path
