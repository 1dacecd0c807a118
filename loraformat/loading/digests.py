"""Digests of whole files, computed beside other work: hashing leaves the interpreter to others."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loraformat.spans import InputFile

_STEP_BYTES: Final = 4 << 20
"""Few steps: before each, the thread waits until the interpreter is free."""


@contextmanager
def digest_aside(files: Sequence[InputFile]) -> Iterator[Callable[[], str]]:
    """Digest files in a thread, which has ended when the context is left; give what waits for the digest.

    What is given raises what `digest_files` does.
    """
    digester = _Digester(files)
    digester.start()
    try:
        yield digester.wait
    finally:
        digester.join()


def digest_file(file: InputFile) -> str:
    """Return the SHA-256 of a file, hexadecimal; LF906 when it no longer has its bytes."""
    return digest_files([file])


def digest_files(files: Sequence[InputFile]) -> str:
    """Return the SHA-256 of files one behind the other, hexadecimal; LF906 when one no longer has its bytes."""
    digest = hashlib.sha256()
    for file in files:
        room: NDArray[np.uint8] = np.empty(min(_STEP_BYTES, file.size_bytes), np.uint8)
        for start in range(0, file.size_bytes, _STEP_BYTES):
            part = room[: file.size_bytes - start]
            file.read_into(part, start)
            digest.update(part.data)
    return digest.hexdigest()


def name_digest(sha256: str, adapter: str) -> str:
    """Return the digest of one of several adapters in files of this digest; of files that hold one, their own."""
    return hashlib.sha256(f"{sha256}#{adapter}".encode()).hexdigest() if adapter else sha256


class _Digester(threading.Thread):
    def __init__(self, files: Sequence[InputFile]) -> None:
        super().__init__(name="loraformat-digest", daemon=True)
        self._files = files
        self._found = ""
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._found = digest_files(self._files)
        except Exception as error:  # Raised where the digest is waited for.
            self._error = error

    def wait(self) -> str:
        self.join()
        if self._error is not None:
            raise self._error
        return self._found
