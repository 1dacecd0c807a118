"""Adding a member is adding a file; third parties add theirs by entry points and cannot take a name of ours."""

import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraformat.containers import CONTAINERS
from loraformat.encodings import ENCODINGS
from loraformat.registry import Registry

Room = Callable[..., "Registry[Any]"]


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    """Return a function that makes a package with these modules, and the registry of it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def make(**modules: str) -> "Registry[Any]":
        folder = tmp_path / "some_room"
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
        for name, text in modules.items():
            (folder / f"{name}.py").write_text(text)
        return Registry("some_room", "MEMBER")

    yield make
    for name in set(sys.modules) - before:
        if name.startswith(("some_room", "third_party")):
            del sys.modules[name]


def install(folder: Path, entries: str, **modules: str) -> None:
    """Make what pip leaves behind for a package with entry points."""
    info = folder / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[some_room]\n{entries}\n")
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)


def test_a_member_is_a_file(room: Room) -> None:
    assert room(alpha="MEMBER = 1").names() == ("alpha",)
    registry = room(beta="MEMBER = 2")
    assert registry.names() == ("alpha", "beta")
    assert (registry.find("alpha"), registry.find("beta")) == (1, 2)
    assert list(registry) == [("alpha", 1), ("beta", 2)]


def test_a_folder_is_a_member_too(room: Room, tmp_path: Path) -> None:
    registry = room()
    (tmp_path / "some_room" / "gamma").mkdir()
    (tmp_path / "some_room" / "gamma" / "__init__.py").write_text("MEMBER = 3")
    assert registry.find("gamma") == 3


def test_machinery_and_strangers_are_no_members(room: Room) -> None:
    registry = room(_helper="MEMBER = 0", alpha="MEMBER = 1")
    assert registry.names() == ("alpha",)
    assert registry.find("_helper") is None
    assert registry.find("absent") is None


def test_nothing_is_imported_before_it_is_asked_for(room: Room) -> None:
    registry = room(alpha="MEMBER = 1", broken="raise RuntimeError('imported')")
    assert registry.names() == ("alpha", "broken")
    assert registry.find("alpha") == 1
    assert "some_room.broken" not in sys.modules
    with pytest.raises(RuntimeError, match="imported"):
        registry.find("broken")


def test_third_parties_add_members(room: Room, tmp_path: Path) -> None:
    registry = room(alpha="MEMBER = 1")
    install(tmp_path, "theirs = third_party_module:THING", third_party_module="THING = 4")
    assert registry.names() == ("alpha", "theirs")
    assert registry.list_guests() == ("theirs",)
    assert "third_party_module" not in sys.modules
    assert registry.find("theirs") == 4


def test_who_is_broken_is_named(room: Room, tmp_path: Path) -> None:
    registry = room()
    install(tmp_path, "theirs = third_party_broken:THING", third_party_broken="import absent_module")
    with pytest.raises(ImportError) as caught:
        registry.find("theirs")
    assert caught.value.__notes__ == ["This is 'theirs' of some_room, which stands in third_party_broken:THING."]


def test_third_parties_may_come_in_an_archive(room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "theirs.zip", "w") as archive:
        archive.writestr("third_party-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: third-party\n")
        archive.writestr(
            "third_party-1.0.dist-info/entry_points.txt", "[some_room]\ntheirs = third_party_zipped:THING\n"
        )
        archive.writestr("third_party_zipped.py", "THING = 5")
    registry = room(alpha="MEMBER = 1")
    monkeypatch.syspath_prepend(str(tmp_path / "theirs.zip"))
    assert registry.names() == ("alpha", "theirs")
    assert registry.find("theirs") == 5


def test_without_third_parties_nothing_slow_is_imported(room: Room) -> None:
    code = "import sys, loraformat.loading as it; list(it.SCHEMES); print('importlib.metadata' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"], capture_output=True
    )
    assert done.stdout.strip() == b"False", done.stderr


def test_third_parties_cannot_take_a_name(room: Room, tmp_path: Path) -> None:
    registry = room(alpha="MEMBER = 1")
    install(tmp_path, "alpha = third_party_module:THING", third_party_module="THING = 4")
    assert registry.names() == ("alpha",)
    assert registry.find("alpha") == 1
    assert "third_party_module" not in sys.modules


def test_the_real_rooms_hold_what_is_in_their_folders() -> None:
    assert {"safetensors"} <= set(CONTAINERS.names())
    assert {"plain"} <= set(ENCODINGS.names())
    for registry in (CONTAINERS, ENCODINGS):
        for _, member in registry:
            assert member.name
