"""Reading by position: regular files only, nothing blocks, a file that changes is noticed."""

import gc
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest

from loraformat.dtypes import BY_NAME
from loraformat.errors import InputError, LoraformatError, RefusedError
from loraformat.spans import InputFile, Span, StoredTensor, read_small


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").write_bytes(bytes(range(100)))
    return tmp_path / "data"


def test_a_span_ends_after_its_last_byte() -> None:
    assert Span(Path("x"), 10, 5).end == 15


class TestOpening:
    @pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "link to pipe"])
    def test_only_regular_files_and_never_blocking(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "it"
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(str(path))
        elif kind == "device":
            path = Path("/dev/zero")
        else:
            os.mkfifo(tmp_path / "pipe")
            path.symlink_to("pipe")
        outcome: list[LoraformatError] = []

        def attempt() -> None:
            try:
                InputFile(path)
            except LoraformatError as error:
                outcome.append(error)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), "it blocks"
        assert isinstance(outcome[0], RefusedError)
        assert outcome[0].codes == ("LF905",)
        assert kind.split()[-1] in outcome[0].problems[0].found

    @pytest.mark.parametrize("name", ["absent", "absent/below", "data/below", "a\0b", "x" * 300, "dangling", "loop"])
    def test_what_cannot_be_opened(self, path: Path, name: str) -> None:
        path.with_name("dangling").symlink_to("nowhere")
        path.with_name("loop").symlink_to("loop")
        with pytest.raises(InputError) as caught:
            InputFile(path.parent / name)
        assert caught.value.codes == ("LF100",)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
    def test_no_permission(self, path: Path) -> None:
        path.chmod(0)
        with pytest.raises(InputError) as caught:
            InputFile(path)
        assert caught.value.codes == ("LF100",)

    def test_symlinks_and_relative_paths_are_followed(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path.with_name("link").symlink_to(path.name)
        monkeypatch.chdir(path.parent)
        file = InputFile("link")
        assert file.path == path.with_name("link")
        assert file.size_bytes == 100

    def test_two_names_of_one_file_have_one_identity(self, path: Path) -> None:
        os.link(path, path.with_name("hard"))
        path.with_name("soft").symlink_to(path.name)
        path.with_name("copy").write_bytes(path.read_bytes())
        same = [InputFile(path.with_name(name)).identity for name in ("data", "hard", "soft")]
        assert len(set(same)) == 1
        assert InputFile(path.with_name("copy")).identity != same[0]

    def test_descriptors_are_given_back(self, path: Path) -> None:
        gc.collect()
        before = set(os.listdir("/dev/fd"))
        file = InputFile(path)
        assert set(os.listdir("/dev/fd")) - before
        file.close()
        file.close()
        assert not set(os.listdir("/dev/fd")) - before
        file = InputFile(path)
        del file
        gc.collect()
        assert not set(os.listdir("/dev/fd")) - before

    def test_children_do_not_inherit_the_descriptor(self, path: Path) -> None:
        assert not os.get_inheritable(InputFile(path).descriptor)


class TestReading:
    def test_by_position_in_any_order(self, path: Path) -> None:
        file = InputFile(path)
        assert file.read(90, 10) == bytes(range(90, 100))
        assert file.read(0, 3) == b"\0\1\2"
        assert file.read(100, 0) == b""

    def test_into_a_buffer_of_any_element(self, path: Path) -> None:
        file = InputFile(path)
        array = np.zeros((2, 3), dtype="<u2")
        file.read_into(array, 4)
        assert array.tobytes() == bytes(range(4, 16))
        buffer = bytearray(8)
        file.read_into(memoryview(buffer).cast("I"), 1)
        assert bytes(buffer) == bytes(range(1, 9))

    def test_a_scattered_buffer_is_not_filled_in_vain(self, path: Path) -> None:
        with pytest.raises((TypeError, ValueError)):
            InputFile(path).read_into(np.zeros((4, 6), dtype=np.uint8)[:, ::2], 0)

    def test_short_reads_are_continued(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.preadv
        monkeypatch.setattr(os, "preadv", lambda descriptor, views, offset: real(descriptor, [views[0][:7]], offset))
        assert InputFile(path).read(3, 90) == bytes(range(3, 93))

    @pytest.mark.parametrize(("offset", "length"), [(0, 101), (99, 2), (100, 1), (1000, 1)])
    def test_beyond_the_end(self, path: Path, offset: int, length: int) -> None:
        with pytest.raises(InputError) as caught:
            InputFile(path).read(offset, length)
        assert caught.value.codes == ("LF906",)

    def test_a_file_cut_off_while_read_is_an_error(self, path: Path) -> None:
        file = InputFile(path)
        os.truncate(path, 50)
        assert file.read(0, 50) == bytes(range(50))
        with pytest.raises(InputError) as caught:
            file.read(40, 20)
        assert caught.value.codes == ("LF906",)
        assert "byte 50" in caught.value.problems[0].found
        assert "100 bytes" in caught.value.problems[0].expected

    def test_threads_share_one_file(self, tmp_path: Path) -> None:
        content = np.random.default_rng(0).integers(0, 256, 1 << 18, dtype=np.uint8)
        (tmp_path / "big").write_bytes(content.tobytes())
        file, wrong = InputFile(tmp_path / "big"), []

        def work(seed: int) -> None:
            dice = np.random.default_rng(seed)
            starts = dice.integers(0, content.size - 1000, 200).tolist()
            wrong.extend(s for s in starts if file.read(s, 1000) != content[s : s + 1000].tobytes())

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


class TestChange:
    def test_an_untouched_file_is_unchanged(self, path: Path) -> None:
        file = InputFile(path)
        file.read(0, 100)
        file.check_unchanged()

    @pytest.mark.parametrize("change", ["grows", "shrinks", "is rewritten"])
    def test_a_change_is_noticed(self, path: Path, change: str) -> None:
        file, changed_ns = InputFile(path), path.stat().st_mtime_ns
        if change == "is rewritten":
            with path.open("r+b") as stream:
                stream.write(b"\xff")
            os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        else:
            os.truncate(path, 101 if change == "grows" else 99)
            os.utime(path, ns=(0, changed_ns))
        with pytest.raises(InputError) as caught:
            file.check_unchanged()
        assert caught.value.codes == ("LF906",)

    def test_a_file_put_in_its_place_is_another_file(self, path: Path) -> None:
        file = InputFile(path)
        path.with_name("new").write_bytes(b"new")
        os.replace(path.with_name("new"), path)
        file.check_unchanged()
        assert file.read(0, 3) == b"\0\1\2"


class TestStoredTensor:
    def tensor(self, path: Path, name: str, shape: tuple[int, ...], offset: int) -> StoredTensor:
        dtype, elements = BY_NAME[name], int(np.prod(shape))
        return StoredTensor("w", dtype, shape, Span(path, offset, dtype.count_bytes(elements)), InputFile(path))

    @pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "bool", "complex64"])
    @pytest.mark.parametrize("shape", [(2, 3), (3, 2), (1, 2, 1), (), (4, 0), (5,)])
    def test_numbers_come_in_their_own_form(self, path: Path, name: str, shape: tuple[int, ...]) -> None:
        path.write_bytes(np.random.default_rng(0).integers(0, 2, 100, dtype=np.uint8).tobytes())
        tensor = self.tensor(path, name, shape, 7)
        array = tensor.read()
        assert array.shape == shape
        assert array.dtype == BY_NAME[name].numpy()
        assert array.tobytes() == path.read_bytes()[7 : 7 + tensor.span.length]
        assert tensor.elements == array.size
        assert array.flags.writeable
        assert array.flags.c_contiguous

    def test_each_reading_is_fresh(self, path: Path) -> None:
        tensor = self.tensor(path, "uint8", (2, 3), 0)
        tensor.read()[:] = 99
        assert tensor.read().tolist() == [[0, 1, 2], [3, 4, 5]]

    @pytest.mark.parametrize("name", ["float4_e2m1fn", "int4", "uint2", "float6_e2m3fn", "string"])
    def test_packed_numbers_are_not_read_past_their_end(self, path: Path, name: str) -> None:
        with pytest.raises(InputError) as caught:
            self.tensor(path, name, (2, 4), 0).read()
        assert caught.value.codes == ("LF106",)


def test_small_files_are_read_up_to_the_limit(path: Path) -> None:
    assert read_small(path, 100) == bytes(range(100))
    with pytest.raises(RefusedError) as caught:
        read_small(path, 99)
    assert caught.value.codes == ("LF110",)
