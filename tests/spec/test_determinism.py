"""The same adapter has the same bytes: in any process, from any order, and as RFC 8785 has it."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import loraformat
from spec.cases import Vector, vectors

WRITTEN = [vector for vector in vectors("valid") if "canonical_sha256" in vector.expected]
every_valid = pytest.mark.parametrize("vector", WRITTEN, ids=lambda vector: vector.name)
SAVE_ALL = """
import sys
from pathlib import Path
import loraformat
for source in sys.argv[2:]:
    loraformat.save(loraformat.load(source), Path(sys.argv[1]) / (Path(source).parent.name + ".safetensors"))
"""


def header_of(file: Path) -> str:
    data = file.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")].decode()


def test_two_processes_write_the_same(tmp_path: Path) -> None:
    outputs = []
    for seed in ("1", "4242"):
        folder = tmp_path / seed
        folder.mkdir()
        command = [sys.executable, "-c", SAVE_ALL, str(folder), *(str(vector.file) for vector in WRITTEN)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        outputs.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == len(WRITTEN)


@every_valid
def test_the_text_is_that_of_rfc_8785(vector: Vector, tmp_path: Path) -> None:
    rfc8785 = pytest.importorskip("rfc8785", reason="needs the package rfc8785")
    header = header_of(loraformat.save(loraformat.load(vector.file), tmp_path / "written.safetensors"))
    assert len(header.encode()) % 8 == 0
    value: Any = json.loads(header)
    assert header.rstrip(" ") == rfc8785.dumps(value).decode()
    manifest = value["__metadata__"]["loraformat"]
    # rfc8785 takes no integers beyond 2^53; as a 64-bit float each of them is printed the same.
    assert manifest == rfc8785.dumps(json.loads(manifest, parse_int=_as_float_if_large)).decode()


def _as_float_if_large(digits: str) -> int | float:
    return int(digits) if abs(int(digits)) < 2**53 else float(digits)


@every_valid
def test_the_order_of_targets_and_factors_does_not_matter(vector: Vector, tmp_path: Path) -> None:
    adapter = loraformat.load(vector.file)
    dice = random.Random(0)
    targets = [
        replace(target, factors=dict(dice.sample(list(target.factors.items()), len(target.factors))))
        for target in dice.sample(adapter.targets, len(adapter.targets))
    ]
    first = loraformat.save(adapter, tmp_path / "first.safetensors")
    second = loraformat.save(replace(adapter, targets=tuple(targets)), tmp_path / "second.safetensors")
    assert first.read_bytes() == second.read_bytes()
