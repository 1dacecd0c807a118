"""The reader in JavaScript, which was written from the specification alone, passes every vector."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from spec.cases import ALL, KINDS, SPEC, VECTORS

CHECK = SPEC / "conformance" / "check.mjs"
NODE = shutil.which("node")


def version_of(node: str | None) -> int:
    if node is None:
        return 0
    printed = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.match(r"v(\d+)\.", printed)
    return int(match[1]) if match else 0


needs_node = pytest.mark.skipif(version_of(NODE) < 20, reason="needs node 20 or newer")


def check(*words: str | Path) -> tuple[int, list[str]]:
    done = subprocess.run([str(NODE), str(CHECK), *map(str, words)], capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


@needs_node
def test_it_passes_every_vector() -> None:
    code, lines = check()
    assert lines[:-1] == []
    assert code == 0
    assert sum(map(int, re.findall(r"(\d+) (?:valid|invalid|merge|convert)", lines[-1]))) == len(ALL)


@needs_node
def test_it_would_notice(tmp_path: Path) -> None:
    """Each kind of expectation is compared: with another one the check fails."""
    for kind in KINDS:
        shutil.copytree(VECTORS / kind, tmp_path / kind)
    broken = {
        "valid/slots": ("targets", {}),
        "valid/minimal": ("canonical_sha256", "0" * 64),
        "valid/factor-of-zeros": ("problems", []),
        "valid/no-canonical-form": ("canonical_codes", ["LF101"]),
        "invalid/overlap": ("codes", ["LF101"]),
        "merge/linear": ("adapters", [{"file": "adapter1.safetensors", "weight": 2}]),
        "merge/refused-shape": ("codes", ["LF101"]),
        "convert/rslora": ("sha256", "0" * 64),
    }
    for name, (field, value) in broken.items():
        path = tmp_path / name / "expected.json"
        expected = json.loads(path.read_text(encoding="utf-8"))
        assert expected[field] != value
        path.write_text(json.dumps(expected | {field: value}), encoding="utf-8")
    shutil.copy(VECTORS / "valid" / "minimal" / "adapter.safetensors", tmp_path / "invalid" / "hole-between")
    code, lines = check(tmp_path)
    assert code == 1
    assert {line.partition(":")[0] for line in lines[:-1]} >= {*broken, "invalid/hole-between"}


def test_it_imports_nothing_but_node() -> None:
    imports = re.findall(r'^import .* from "([^"]+)";$', CHECK.read_text(encoding="utf-8"), re.MULTILINE)
    assert imports
    assert all(name.startswith("node:") for name in imports)
