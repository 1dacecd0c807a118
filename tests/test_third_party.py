"""A package of a third party has a member in each of the five rooms: what `docs/extending.md` says, done."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import loraformat
from loraformat.bases import BASES
from loraformat.containers import CONTAINERS
from loraformat.encodings import CODED, ENCODINGS
from loraformat.evidence import STRATEGIES
from loraformat.kinds import KINDS
from loraformat.schemes import SCHEMES

PACKAGE = Path(__file__).parent / "third_party"
HOUSE = Path(loraformat.__file__).parents[1]
DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "extending.md").read_text(encoding="utf-8")

MERGE = """
import sys
import loraformat

adapter, base, native, merged, again = sys.argv[1:]
loraformat.save(loraformat.load(adapter), native)
assert not any(verdict.problems for verdict in loraformat.validate(adapter, base=base))
receipt = loraformat.merge(base, [(adapter, 2.0)], merged)
assert not loraformat.verify(merged, base, [(adapter, 2.0)]).problems
loraformat.merge(base, [(native, 2.0)], again)
print([record.name for record in receipt.weights])
"""


def write_sketch(path: Path, tensors: dict[str, NDArray[np.generic]], **notes: str) -> Path:
    index, numbers = {}, b""
    for name, tensor in tensors.items():
        index[name] = [tensor.dtype.name, list(tensor.shape), len(numbers)]
        numbers += tensor.tobytes()
    text = json.dumps({"tensors": index, "notes": notes}).encode()
    path.write_bytes(b"SKETCH1\n" + len(text).to_bytes(4, "little") + text + numbers)
    return path


def read_numbers(path: Path, name: str) -> NDArray[np.float64]:
    data = path.read_bytes()
    start = 12 + int.from_bytes(data[8:12], "little")
    form, shape, offset = json.loads(data[12:start])["tensors"][name]
    flat = np.frombuffer(data, form, int(np.prod(shape)), start + offset)
    return flat.reshape(shape).astype(np.float64)


@pytest.fixture
def path_of_modules(tmp_path: Path) -> str:
    """Install the package as pip would, and return what PYTHONPATH must be."""
    info = tmp_path / "sketch_format-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sketch-format\nVersion: 1.0\n")
    shutil.copy(PACKAGE / "entry_points.txt", info)
    return os.pathsep.join(map(str, (tmp_path, PACKAGE, HOUSE)))


def test_members_of_all_rooms_work_together(tmp_path: Path, path_of_modules: str) -> None:
    rng = np.random.default_rng(3)
    weight, codes = rng.standard_normal((6, 4)).astype("f4"), rng.integers(-128, 128, (5, 4)).astype("i1")
    stored = {"a.weight": weight, "b.weight": codes, "b.step": np.array([0.01], "f4"), "c.weight": weight.T}
    vectors = {
        name: rng.standard_normal(size).astype("f4") for name, size in {"a.u": 6, "a.v": 4, "b.u": 5, "b.v": 4}.items()
    }
    adapter = write_sketch(tmp_path / "style.sketch", vectors, gain="0.25")
    base = write_sketch(tmp_path / "base.sketch", stored)
    merged, again = tmp_path / "merged.sketch", tmp_path / "again.sketch"
    command = [sys.executable, "-c", MERGE, adapter, base, tmp_path / "style.safetensors", merged, again]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path_of_modules}, capture_output=True, text=True)
    assert (done.stderr, done.stdout) == ("", "['a.weight', 'b.weight']\n")

    wanted = weight.astype(np.float64) + 0.5 * np.outer(vectors["a.u"], vectors["a.v"])
    np.testing.assert_allclose(read_numbers(merged, "a.weight"), wanted, rtol=1e-6)
    wanted = codes * np.float64(np.float32(0.01)) + 0.5 * np.outer(vectors["b.u"], vectors["b.v"])
    step = read_numbers(merged, "b.step")[0]
    np.testing.assert_allclose(step, np.abs(wanted).max() / 127, rtol=1e-6)
    np.testing.assert_allclose(read_numbers(merged, "b.weight") * step, wanted, atol=step * 0.501)
    assert (read_numbers(merged, "c.weight") == weight.T).all()
    assert all((read_numbers(again, name) == read_numbers(merged, name)).all() for name in stored)


def test_the_page_names_the_groups_and_what_a_member_is_called() -> None:
    rows = re.findall(r"^\| `(\w+)/` \| `(\w+)` \| `([\w.]+)` \|", PAGE, re.MULTILINE)
    registries = (KINDS, SCHEMES, CONTAINERS, ENCODINGS, CODED, BASES, STRATEGIES)
    assert rows == [(each.package.rpartition(".")[2], each.attribute, each.group) for each in registries]
    named = re.findall(r"^\[([\w.]+)\]", (PACKAGE / "entry_points.txt").read_text(), re.MULTILINE)
    assert {group for _, _, group in rows} - set(named) == {"loraformat.encodings", "loraformat.evidence"}


def test_files_that_the_page_names_exist() -> None:
    linked = re.findall(r"\]\(([^)#]+)", PAGE)
    assert len(linked) > 5
    assert [link for link in linked if not (DOCS / link).exists()] == []
