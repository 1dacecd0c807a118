"""Digests that are computed beside other work."""

import hashlib
from pathlib import Path

import pytest

from loraformat.errors import LoraformatError
from loraformat.loading import digests
from loraformat.loading.digests import digest_aside
from loraformat.spans import InputFile


@pytest.mark.parametrize("size", [0, 1, 7, 8, 21])
def test_it_is_that_of_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(digests, "_STEP_BYTES", 7)
    data = bytes(range(size))
    (tmp_path / "a").write_bytes(data)
    with digest_aside([InputFile(tmp_path / "a")]) as digest:
        assert digest() == hashlib.sha256(data).hexdigest()


def test_a_file_that_was_cut_off_is_told_where_the_digest_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    file = InputFile(path)
    path.write_bytes(b"a")
    with digest_aside([file]) as digest, pytest.raises(LoraformatError) as caught:
        digest()
    assert caught.value.codes == ("LF906",)
