"""Input files by the thousand: few are open, and each is read as the file that it was."""

import gc
import os
import pickle
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from pathlib import Path

import pytest

from loraformat.errors import LoraformatError
from loraformat.limits import MAX_IDLE_DESCRIPTORS
from loraformat.spans import InputFile


def count_open(folder: Path) -> int:
    links = Path("/proc/self/fd")
    if not links.is_dir():
        pytest.skip("only Linux lists the descriptors of a process")
    found = 0
    for link in list(links.iterdir()):
        try:
            found += os.readlink(link).startswith(str(folder))
        except FileNotFoundError:  # The descriptor of the listing itself.
            continue
    return found


@pytest.fixture
def many(tmp_path: Path) -> list[InputFile]:
    files = []
    for index in range(MAX_IDLE_DESCRIPTORS + 50):
        (tmp_path / str(index)).write_bytes(index.to_bytes(4, "little"))
        files.append(InputFile(tmp_path / str(index)))
    return files


@contextmanager
def few_descriptors(most: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_of_many_files_few_are_open_and_all_are_read(tmp_path: Path, many: list[InputFile]) -> None:
    assert 0 < count_open(tmp_path) <= MAX_IDLE_DESCRIPTORS
    for turn in (many, reversed(many)):
        for file in turn:
            assert file.read(0, 4) == int(file.path.name).to_bytes(4, "little")
    assert 0 < count_open(tmp_path) <= MAX_IDLE_DESCRIPTORS
    many.clear()
    gc.collect()
    assert count_open(tmp_path) <= 1  # That of the loop.


def test_a_file_that_was_replaced_while_it_was_closed_is_refused(many: list[InputFile]) -> None:
    first = many[0]
    os.replace(many[1].path, first.path)
    with pytest.raises(LoraformatError) as caught:
        first.read(0, 4)
    assert caught.value.codes == ("LF906",)


def test_what_somebody_copies_from_stays_open(many: list[InputFile]) -> None:
    descriptor = many[0].descriptor
    for file in many:
        file.read(0, 1)
    assert os.pread(descriptor, 4, 0) == bytes(4)


def test_threads_read_while_others_close(many: list[InputFile]) -> None:
    wrong: list[object] = []

    def read(start: int) -> None:
        turned = many[start:] + many[:start]
        wrong.extend(file for file in turned if file.read(0, 4) != int(file.path.name).to_bytes(4, "little"))

    threads = [threading.Thread(target=read, args=(start * 40,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_child_reads_though_a_thread_of_its_parent_was_reading(many: list[InputFile]) -> None:
    from loraformat.descriptors import _POOL

    with _POOL.lock:
        child = os.fork()
        if not child:
            with few_descriptors(4096):
                os._exit(int(any(file.read(0, 4) != int(file.path.name).to_bytes(4, "little") for file in many)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_copy_is_the_file_and_a_pickle_opens_it_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    file = InputFile(path)
    assert copy(file) is deepcopy(file) is file
    data = pickle.dumps(file)
    assert pickle.loads(data).read(1, 3) == b"yte"
    path.write_bytes(b"other bytes")
    with pytest.raises(LoraformatError) as caught:
        pickle.loads(data)
    assert caught.value.codes == ("LF906",)


def test_files_that_are_closed_push_none_out(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"kept")
    (tmp_path / "passing").write_bytes(b"passing")
    kept = InputFile(tmp_path / "kept")
    for _ in range(MAX_IDLE_DESCRIPTORS + 50):
        InputFile(tmp_path / "passing").close()
    (tmp_path / "kept").unlink()
    assert kept.read(0, 4) == b"kept"
