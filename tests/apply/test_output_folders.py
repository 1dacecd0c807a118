"""Output folders: filled aside, moved into place whole; what stood there is back when that fails."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import loraformat
from loraformat.apply import output_folders
from loraformat.apply.output_folders import PendingFolder, check_output_folder
from loraformat.files import write_at
from loraformat.outputs import name_part
from models import files_below

NAMES = [Path("a.bin"), Path("sub/deep/b.json")]
MARK = "merge_receipt.json"


def fill(pending: PendingFolder, data: bytes = b"new") -> None:
    for descriptor in pending.descriptors:
        if descriptor >= 0:
            write_at(descriptor, data, 0)


def codes(act: Callable[[], Any]) -> tuple[str, ...]:
    with pytest.raises(loraformat.LoraformatError) as caught:
        act()
    return caught.value.codes


def break_off(
    failure: BaseException, folder: Path, names: Sequence[Path], data: bytes = b"new", **options: Any
) -> list[bytes]:
    """Fill a folder and fail; return what was in its files before."""
    found: list[bytes] = []
    pending = PendingFolder(folder, names, force=False, **options)

    def run() -> None:
        with pending:
            found.extend(os.pread(descriptor, 9, 0) for descriptor in pending.descriptors)
            fill(pending, data)
            raise failure

    with pytest.raises(type(failure)):
        run()
    return found


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An output of an earlier run."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("a.bin", "gone.bin", MARK):
        (folder / name).write_bytes(b"old")
    return folder


@pytest.mark.parametrize("durable", [False, True])
def test_a_folder_appears_whole(tmp_path: Path, durable: bool) -> None:
    with PendingFolder(tmp_path / "out", NAMES, force=False, durable=durable) as pending:
        fill(pending)
        assert not (tmp_path / "out").exists()
        pending.commit()
    assert files_below(tmp_path) == {"out/a.bin": b"new", "out/sub/deep/b.json": b"new"}


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    break_off(failure(), tmp_path / "out", NAMES)
    assert list(tmp_path.iterdir()) == []
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_appeared_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with PendingFolder(tmp_path / "out", NAMES, force=False) as pending:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_bytes(b"x")
        assert codes(pending.commit) == ("LF601",)
    assert files_below(tmp_path) == {"out/theirs": b"x"}


def test_an_earlier_folder_is_replaced_with_all_that_was_in_it(tmp_path: Path, old: Path) -> None:
    with PendingFolder(old, NAMES, force=True) as pending:
        fill(pending)
        pending.commit()
    assert files_below(tmp_path) == {"out/a.bin": b"new", "out/sub/deep/b.json": b"new"}


def test_an_earlier_folder_is_back_when_the_new_one_cannot_be_moved(
    tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_folders, "swap_names", lambda one, other: False)
    before, real = files_below(tmp_path), os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(target) == old and (Path(source) / "sub").exists():
            raise OSError(5, "I/O error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with PendingFolder(old, NAMES, force=True) as pending:
        fill(pending)
        assert codes(pending.commit) == ("LF605",)
    assert files_below(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="names are swapped on Linux")
@pytest.mark.parametrize("resume", [None, "0123456789abcdef"])
def test_an_earlier_folder_is_never_away(
    tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch, resume: str | None
) -> None:
    """A kill between two steps would leave no model, and the next run would take the earlier one for a stale part."""
    steps: list[bool] = []

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def watched(*arguments: Any) -> Any:
            outcome = real(*arguments)
            steps.append(old.is_dir() and not name_part(old, resume or "none").exists())
            return outcome

        monkeypatch.setattr(module, name, watched)

    with PendingFolder(old, NAMES, force=True, resume=resume) as pending:
        fill(pending)
        watch(os, "rename")
        watch(output_folders, "swap_names")
        pending.commit()
    assert steps == [True, True]
    assert files_below(tmp_path) == {"out/a.bin": b"new", "out/sub/deep/b.json": b"new"}


def test_links_are_the_files_themselves(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"weights")
    (tmp_path / "link").symlink_to("source")
    with PendingFolder(tmp_path / "out", NAMES, force=False, links={NAMES[0]: tmp_path / "link"}) as pending:
        assert [descriptor >= 0 for descriptor in pending.descriptors] == [False, True]
        fill(pending)
        pending.commit()
    linked = tmp_path / "out" / "a.bin"
    assert linked.samefile(tmp_path / "source")
    assert not linked.is_symlink()


def test_a_link_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    pending = PendingFolder(tmp_path / "out", NAMES, force=False, links={NAMES[1]: tmp_path / "missing"})
    assert codes(pending.__enter__) == ("LF624",)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_folder_keeps_its_parts_and_no_strays(tmp_path: Path) -> None:
    token = "0123456789abcdef"
    break_off(KeyboardInterrupt(), tmp_path / "out", [*NAMES, Path("stray")], b"part", resume=token)
    with PendingFolder(tmp_path / "out", NAMES, force=False, resume=token) as pending:
        assert [os.pread(descriptor, 9, 0) for descriptor in pending.descriptors] == [b"part", b"part"]
        pending.commit()
    assert files_below(tmp_path) == {"out/a.bin": b"part", "out/sub/deep/b.json": b"part"}


def test_another_token_removes_what_was_left(tmp_path: Path) -> None:
    for token in ("0" * 16, "1" * 16):
        found = break_off(KeyboardInterrupt(), tmp_path / "out", NAMES, resume=token)
        assert found == [b"", b""]
    assert [path.name for path in tmp_path.iterdir()] == [f".out.loraformat-resume-{'1' * 16}.part"]


def test_what_may_be_replaced(tmp_path: Path, old: Path) -> None:
    source = tmp_path / "base"
    (source / "inner").mkdir(parents=True)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "link").symlink_to("out")

    def check(folder: Path, *, force: bool = True) -> tuple[str, ...]:
        return codes(lambda: check_output_folder(folder, source, MARK, force=force))

    check_output_folder(old, source, MARK, force=True)
    check_output_folder(tmp_path / "new", source, MARK, force=False)
    assert check(old, force=False) == ("LF601",)
    assert check(tmp_path / "theirs") == ("LF601",)
    assert check(tmp_path / "file") == check(tmp_path / "link") == ("LF603",)
    assert check(source) == check(source / "inner") == check(tmp_path) == ("LF602",)
    assert check(source / "new") == ("LF602",)
    assert check(tmp_path / "none" / "new") == ("LF605",)
    assert check(tmp_path / ("x" * 201)) == ("LF608",)
