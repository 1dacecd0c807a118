"""Paths from outside, and output that appears whole or not at all."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loraformat import outputs
from loraformat.errors import InputError, LoraformatError, OutputError, RefusedError
from loraformat.files import advise_missing, copy_range, reserve_bytes, resolve_inside, write_at
from loraformat.outputs import PendingOutput, check_output, output_errors

NOT_ROOT = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


@pytest.fixture
def final(tmp_path: Path) -> Path:
    return tmp_path / "merged.onnx"


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(LoraformatError) as caught:
        action()
    return caught.value.codes[0]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("https://host/org/lora", "download it first"),
        ("~/adapter", "The shell replaces ~"),
        ("adapters/*.safetensors", "No file fits this pattern"),
        ("org/lora", "hf download org/lora"),
        ("org/lora/adapter.safetensors", "no folder"),
        ("stile.safetensors", "Near it: style.safetensors."),
        ("zzz", ""),
    ],
)
def test_why_there_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "style.safetensors").touch()
    for asked in (Path(path), Path(path).absolute()):
        advice = advise_missing(asked)
        assert said in advice
        assert bool(said) == bool(advice)


def test_a_missing_folder_for_the_output(tmp_path: Path) -> None:
    for folder, made in ((tmp_path / "new", True), (tmp_path / "~", False)):
        with pytest.raises(OutputError) as caught:
            check_output(folder / "merged.onnx", [], force=False)
        assert (f"mkdir -p {folder}" in caught.value.problems[0].advice) == made


def test_what_a_hub_has_fetched_already_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    cached = tmp_path / "home" / "hub" / "models--org--lora"
    cached.mkdir(parents=True)
    assert str(cached) in advise_missing(Path("org/lora"))


def run_child(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


class TestResolveInside:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        (tmp_path / "secret").write_text("key")
        folder = tmp_path / "model"
        (folder / "sub").mkdir(parents=True)
        (folder / "model.onnx").touch()
        return folder / "model.onnx"

    @pytest.mark.parametrize(
        "location",
        [
            "",
            "/etc/passwd",
            "//etc/passwd",
            "..",
            "../secret",
            "sub/../../secret",
            "sub/../model.data",
            "sub/..",
            "..\\secret",
            "sub\\model.data",
            "C:model.data",
            "c:/windows/win.ini",
            "model.data\0.txt",
            "model.\udcff.data",
        ],
    )
    def test_attacks_are_refused(self, model: Path, location: str) -> None:
        with pytest.raises(RefusedError) as caught:
            resolve_inside(model, location)
        assert caught.value.codes == ("LF903",)
        assert repr(location) in caught.value.problems[0].found

    @pytest.mark.parametrize(
        "location", ["model.data", "./model.data", "sub/model.data", "..data", "a..b", "sub//x", "C_"]
    )
    def test_names_below_the_folder_are_followed(self, model: Path, location: str) -> None:
        assert resolve_inside(model, location) == model.parent / location

    def test_a_bare_file_name_is_no_way_around(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(model.parent)
        assert code_of(lambda: resolve_inside(Path("model.onnx"), "../secret")) == "LF903"
        assert resolve_inside(Path("model.onnx"), "model.data") == model.parent / "model.data"

    @pytest.mark.parametrize("through", ["file", "folder", "chain", "absolute"])
    def test_links_that_leave_the_folder_are_refused(self, model: Path, through: str) -> None:
        link, location = model.parent / "link", "link"
        if through == "file":
            link.symlink_to("../secret")
        elif through == "folder":
            link.symlink_to("..")
            location = "link/secret"
        elif through == "chain":
            link.symlink_to("other")
            (model.parent / "other").symlink_to("../secret")
        else:
            link.symlink_to(model.parent.parent / "secret")
        assert code_of(lambda: resolve_inside(model, location)) == "LF903"

    def test_a_folder_of_a_like_name_is_another(self, model: Path) -> None:
        twin = model.parent.with_name("model-2")
        twin.mkdir()
        (twin / "data").touch()
        (model.parent / "link").symlink_to("../model-2/data")
        assert code_of(lambda: resolve_inside(model, "link")) == "LF903"

    def test_links_inside_the_folder_are_followed(self, model: Path) -> None:
        (model.parent / "link").symlink_to("sub/data")
        assert resolve_inside(model, "link") == model.parent / "link"

    def test_a_hub_cache_is_followed_and_nothing_beside_it(self, tmp_path: Path) -> None:
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
        blobs.mkdir()
        snapshot.mkdir(parents=True)
        for name, blob in (("model.onnx", "11"), ("model.onnx_data", "22")):
            (blobs / blob).touch()
            (snapshot / name).symlink_to(f"../../blobs/{blob}")
        (tmp_path / "refs").touch()
        (snapshot / "escape").symlink_to("../../refs")
        assert resolve_inside(snapshot / "model.onnx", "model.onnx_data") == snapshot / "model.onnx_data"
        assert code_of(lambda: resolve_inside(snapshot / "model.onnx", "escape")) == "LF903"

    def test_a_loop_of_links_ends(self, model: Path) -> None:
        (model.parent / "a").symlink_to("b")
        (model.parent / "b").symlink_to("a")
        try:
            resolve_inside(model, "a")
        except RefusedError as error:
            assert error.codes == ("LF903",)  # noqa: PT017


class TestCheckOutput:
    def test_a_new_name_is_fine(self, final: Path) -> None:
        check_output(final, [final.with_name("base.onnx")], force=False)

    def test_what_exists_is_kept_unless_forced(self, final: Path) -> None:
        final.touch()
        assert code_of(lambda: check_output(final, [], force=False)) == "LF601"
        check_output(final, [], force=True)

    @pytest.mark.parametrize("force", [False, True])
    @pytest.mark.parametrize("name", ["itself", "hard link", "symlink", "other spelling"])
    def test_an_input_is_never_an_output(self, final: Path, name: str, force: bool) -> None:
        source = final.with_name("base.onnx")
        source.touch()
        if name == "itself":
            final = source
        elif name == "hard link":
            os.link(source, final)
        elif name == "symlink":
            final.symlink_to(source)
        else:
            final = source.parent / ".." / source.parent.name / source.name
        assert code_of(lambda: check_output(final, [final.with_name("x"), source], force=force)) == "LF602"

    @pytest.mark.parametrize("force", [False, True])
    @pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to device", "dangling", "loop"])
    def test_only_regular_files_are_written(self, final: Path, kind: str, force: bool) -> None:
        if kind == "folder":
            final.mkdir()
        elif kind == "pipe":
            os.mkfifo(final)
        elif kind == "device":
            final = Path("/dev/null")
        elif kind == "link to device":
            final.symlink_to("/dev/null")
        else:
            final.symlink_to("nowhere" if kind == "dangling" else final.name)
        assert code_of(lambda: check_output(final, [], force=force)) == "LF603"

    @pytest.mark.parametrize("name", ["x" * 201, "é" * 101, "a\0b"], ids=["long", "long in bytes", "NUL"])
    def test_unusable_names(self, final: Path, name: str) -> None:
        assert code_of(lambda: check_output(final.with_name(name), [], force=False)) == "LF608"
        check_output(final.with_name("x" * 200), [], force=False)

    def test_the_folder_must_exist(self, final: Path) -> None:
        assert code_of(lambda: check_output(final / "below" / "x", [], force=False)) == "LF605"
        final.touch()
        assert code_of(lambda: check_output(final / "x", [], force=False)) == "LF605"

    @NOT_ROOT
    def test_the_folder_must_be_writable(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        assert code_of(lambda: check_output(tmp_path / "x", [], force=False)) == "LF605"

    def test_a_closed_folder_is_said_to_be_closed(self, final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert code_of(lambda: check_output(final, [], force=False)) == "LF605"

    def test_nothing_is_made(self, final: Path) -> None:
        check_output(final, [], force=True)
        assert not names_in(final.parent)


class TestPendingOutput:
    def test_the_output_appears_at_the_commit(self, final: Path) -> None:
        with PendingOutput([final], force=False) as pending:
            write_at(pending.descriptors[0], b"new", 0)
            assert not final.exists()
            (part,) = names_in(final.parent)
            assert part.startswith(f".{final.name}.loraformat-{os.getpid()}-")
            pending.commit()
        assert final.read_bytes() == b"new"
        assert names_in(final.parent) == [final.name]

    @pytest.mark.parametrize("durable", [False, True])
    @pytest.mark.parametrize("force", [False, True])
    def test_several_outputs_in_several_folders(self, tmp_path: Path, force: bool, durable: bool) -> None:
        finals = [tmp_path / "a" / "data", tmp_path / "b" / "model.onnx"]
        for path in finals:
            path.parent.mkdir()
        with PendingOutput(finals, force=force, durable=durable) as pending:
            for descriptor, text in zip(pending.descriptors, (b"11", b"222"), strict=True):
                write_at(descriptor, text, 0)
            pending.commit()
        assert [path.read_bytes() for path in finals] == [b"11", b"222"]
        assert not [name for path in finals for name in names_in(path.parent) if name != path.name]

    @pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt, SystemExit])
    def test_an_exception_leaves_what_was_there(self, final: Path, interruption: type[BaseException]) -> None:
        final.write_bytes(b"old")
        with pytest.raises(interruption), PendingOutput([final], force=True) as pending:  # noqa: PT012
            write_at(pending.descriptors[0], b"half of the new", 0)
            raise interruption
        assert final.read_bytes() == b"old"
        assert names_in(final.parent) == [final.name]

    def test_without_a_commit_nothing_appears(self, final: Path) -> None:
        with PendingOutput([final], force=False) as pending:
            write_at(pending.descriptors[0], b"new", 0)
        assert not names_in(final.parent)

    def test_descriptors_are_closed(self, final: Path) -> None:
        before = set(os.listdir("/dev/fd"))
        with PendingOutput([final, final.with_name("other")], force=False) as pending:
            pending.commit()
        assert not set(os.listdir("/dev/fd")) - before

    def test_force_replaces(self, final: Path) -> None:
        final.write_bytes(b"the old one, which is longer")
        with PendingOutput([final], force=True) as pending:
            write_at(pending.descriptors[0], b"new", 0)
            pending.commit()
        assert final.read_bytes() == b"new"

    @pytest.mark.parametrize("hard_links", [True, False])
    def test_a_file_that_appears_during_the_run_is_not_replaced(
        self, final: Path, hard_links: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not hard_links:
            monkeypatch.setattr(os, "link", raise_no_links)
        with pytest.raises(LoraformatError) as caught, PendingOutput([final], force=False) as pending:  # noqa: PT012
            write_at(pending.descriptors[0], b"ours", 0)
            final.write_bytes(b"theirs")
            pending.commit()
        assert caught.value.codes == ("LF601",)
        assert final.read_bytes() == b"theirs"
        assert names_in(final.parent) == [final.name]

    def test_without_hard_links_it_works_too(self, final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "link", raise_no_links)
        with PendingOutput([final], force=False) as pending:
            write_at(pending.descriptors[0], b"new", 0)
            pending.commit()
        assert final.read_bytes() == b"new"
        assert names_in(final.parent) == [final.name]

    def test_when_the_second_fails_the_first_is_withdrawn(self, tmp_path: Path) -> None:
        first, second = tmp_path / "data", tmp_path / "model.onnx"
        with pytest.raises(LoraformatError), PendingOutput([first, second], force=False) as pending:  # noqa: PT012
            second.write_bytes(b"theirs")
            pending.commit()
        assert names_in(tmp_path) == [second.name]
        assert second.read_bytes() == b"theirs"

    def test_when_the_second_cannot_be_opened_the_first_is_withdrawn(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        finals = [tmp_path / "a" / "data", tmp_path / "absent" / "model"]
        with pytest.raises((LoraformatError, OSError)), PendingOutput(finals, force=False):
            pass
        assert not names_in(tmp_path / "a")

    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_the_umask_decides_the_mode(self, final: Path, umask: int, mode: int) -> None:
        before = os.umask(umask)
        try:
            with PendingOutput([final], force=False) as pending:
                pending.commit()
        finally:
            os.umask(before)
        assert stat.S_IMODE(final.stat().st_mode) == mode

    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
    def test_a_replaced_file_keeps_its_mode(self, final: Path, mode: int) -> None:
        final.touch()
        final.chmod(mode)
        with PendingOutput([final], force=True) as pending:
            pending.commit()
        assert stat.S_IMODE(final.stat().st_mode) == mode

    def test_parts_of_the_dead_are_removed_and_those_of_the_living_kept(self, final: Path) -> None:
        dead = run_child("import os; print(os.getpid())").stdout.strip()
        stale = [f".x.onnx.loraformat-{dead}-0123abcd.part", f".y.loraformat-{2**70}-0123abcd.part"]
        stale_folder = final.with_name(f".dir.loraformat-{dead}-0123abcd.part")
        kept = [
            f".x.onnx.loraformat-{os.getppid()}-0123abcd.part",
            ".z.loraformat-1-0123abcd.part",
            f".x.onnx.loraformat-{dead}-0123abcd.part.bak",
            f"x.onnx.loraformat-{dead}-0123abcd.part",
            f".x.onnx.loraformat-{dead}-0123abcX.part",
            f".x.onnx.otherformat-{dead}-0123abcd.part",
        ]
        for name in stale + kept:
            final.with_name(name).touch()
        stale_folder.mkdir()
        (stale_folder / "shard").touch()
        with PendingOutput([final], force=False):
            pass
        assert names_in(final.parent) == sorted(kept)

    def test_a_killed_run_leaves_the_old_output_and_the_next_one_cleans_up(self, final: Path) -> None:
        final.write_bytes(b"old")
        program = """
import os, signal, sys
from pathlib import Path
from loraformat.files import write_at
from loraformat.outputs import PendingOutput
with PendingOutput([Path(sys.argv[1])], force=True) as pending:
    write_at(pending.descriptors[0], b"half", 0)
    os.kill(os.getpid(), signal.SIGKILL)
"""
        assert run_child(program, final).returncode == -9
        assert final.read_bytes() == b"old"
        assert len(names_in(final.parent)) == 2
        with PendingOutput([final], force=True) as pending:
            write_at(pending.descriptors[0], b"new", 0)
            pending.commit()
        assert final.read_bytes() == b"new"
        assert names_in(final.parent) == [final.name]

    @pytest.mark.parametrize("step", ["reserve", "write", "copy"])
    def test_a_full_disk_is_said_and_leaves_nothing(self, final: Path, step: str) -> None:
        final.write_bytes(b"old")
        source = final.with_name("source")
        source.write_bytes(bytes(300_000))
        program = """
import os, resource, sys
from pathlib import Path
from loraformat.errors import LoraformatError
from loraformat.files import copy_range, reserve_bytes, write_at
from loraformat.outputs import PendingOutput, output_errors
final, step, source = Path(sys.argv[1]), sys.argv[2], os.open(sys.argv[3], os.O_RDONLY)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with PendingOutput([final], force=True) as pending, output_errors(final):
        sink = pending.descriptors[0]
        if step == "reserve":
            reserve_bytes(sink, 300_000)
        elif step == "write":
            write_at(sink, bytes(300_000), 0)
        else:
            copy_range(source, 0, sink, 0, 300_000)
        pending.commit()
except LoraformatError as error:
    print(*error.codes, error.exit_code)
"""
        child = run_child(program, final, step, source)
        assert child.stdout.split() == ["LF604", "5"], child.stderr
        assert final.read_bytes() == b"old"
        assert names_in(final.parent) == [final.name, source.name]


def raise_no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "no hard links here")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "LF604"),
        (errno.EDQUOT, "LF604"),
        (errno.EFBIG, "LF604"),
        (errno.EACCES, "LF605"),
        (errno.EROFS, "LF605"),
        (errno.EIO, "LF605"),
    ],
)
def test_errors_of_the_system_become_ours(final: Path, number: int, code: str) -> None:
    with pytest.raises(OutputError) as caught, output_errors(final):
        raise OSError(number, os.strerror(number))
    assert caught.value.codes == (code,)
    assert caught.value.problems[0].where == str(final)
    assert os.strerror(number) in caught.value.problems[0].found


def test_other_errors_pass(final: Path) -> None:
    with pytest.raises(ZeroDivisionError), output_errors(final):
        raise ZeroDivisionError
    with pytest.raises(RefusedError), output_errors(final):
        raise RefusedError([])


class TestCopyRange:
    SIZE = (1 << 20) * 2 + 12_345

    @pytest.fixture
    def content(self) -> bytes:
        return bytes(range(256)) * (self.SIZE // 256) + bytes(range(self.SIZE % 256))

    @pytest.fixture
    def descriptors(self, tmp_path: Path, content: bytes) -> Iterator[tuple[int, int]]:
        (tmp_path / "source").write_bytes(content)
        source = os.open(tmp_path / "source", os.O_RDONLY)
        sink = os.open(tmp_path / "sink", os.O_RDWR | os.O_CREAT)
        yield source, sink
        os.close(source)
        os.close(sink)

    @pytest.fixture(params=["kernel", "other file system", "no such call", "gives up half way"])
    def way(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        real = getattr(os, "copy_file_range", None)
        if request.param == "no such call" or (real is None and request.param != "kernel"):
            monkeypatch.delattr(os, "copy_file_range", raising=False)
        elif request.param == "other file system":
            monkeypatch.setattr(os, "copy_file_range", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "")))
        elif request.param == "gives up half way":
            answers = iter([1000])

            def halting(source: int, sink: int, count: int, here: int, there: int) -> int:
                return real(source, sink, min(count, next(answers, 0)), here, there)

            monkeypatch.setattr(os, "copy_file_range", halting)
        return str(request.param)

    @pytest.mark.parametrize(
        ("start", "place", "length"),
        [(0, 0, SIZE), (17, 0, SIZE - 17), (4096, 123, (1 << 20) + 1), (5, 9, 0), (SIZE - 1, 0, 1)],
    )
    def test_bytes_arrive_where_they_belong(
        self, descriptors: tuple[int, int], content: bytes, way: str, start: int, place: int, length: int
    ) -> None:
        source, sink = descriptors
        os.pwrite(sink, b"\xee" * (self.SIZE + 500), 0)
        copy_range(source, start, sink, place, length)
        found = os.pread(sink, self.SIZE + 501, 0)
        assert len(found) == self.SIZE + 500
        assert found[place : place + length] == content[start : start + length]
        assert set(found[:place] + found[place + length :]) <= {0xEE}

    def test_an_input_that_ends_early_is_an_error(self, descriptors: tuple[int, int], way: str) -> None:
        with pytest.raises(InputError) as caught:
            copy_range(descriptors[0], 100, descriptors[1], 0, self.SIZE)
        assert caught.value.codes == ("LF906",)

    def test_an_error_while_writing_is_not_hidden(self, tmp_path: Path, descriptors: tuple[int, int], way: str) -> None:
        closed = os.open(tmp_path / "sink", os.O_RDONLY)
        with pytest.raises(OSError, match="."):  # noqa: RUF043
            copy_range(descriptors[0], 0, closed, 0, 100)
        os.close(closed)


def test_write_at_goes_on_after_a_short_write(final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:3], offset))
    descriptor = os.open(final, os.O_RDWR | os.O_CREAT)
    write_at(descriptor, b"0123456789", 2)
    write_at(descriptor, memoryview(b"abcdef").cast("H"), 12)
    os.close(descriptor)
    assert final.read_bytes() == b"\0\x000123456789abcdef"


@pytest.mark.parametrize("available", [True, False])
def test_reserved_bytes_are_there_at_once(final: Path, available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not available:
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "")))
    descriptor = os.open(final, os.O_RDWR | os.O_CREAT)
    reserve_bytes(descriptor, 0)
    assert final.stat().st_size == 0
    reserve_bytes(descriptor, 12_345)
    os.close(descriptor)
    assert final.stat().st_size == 12_345


def test_the_part_pattern_matches_the_parts_we_make(final: Path) -> None:
    with PendingOutput([final], force=False):
        (name,) = names_in(final.parent)
        match = outputs._PART.match(name)
    assert match is not None
    assert int(match["pid"]) == os.getpid()
