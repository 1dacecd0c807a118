"""Rebuild all conformance vectors, to the same bytes each time.

    python spec/vectors/make_vectors.py [FOLDER]

FOLDER is this script's own unless given; `valid/`, `invalid/`, `merge/` and `convert/` in it are replaced. Needs numpy
and ml_dtypes, and nothing of the package loraformat: what the vectors expect is worked out here a second time.
"""

import json
import shutil
import sys
from pathlib import Path

from make import converting, invalid, merging, valid
from make.kit import Files

KINDS = {
    "valid": valid.VECTORS,
    "invalid": invalid.VECTORS,
    "merge": merging.VECTORS,
    "convert": converting.VECTORS,
}


def write_vectors(folder: Path) -> None:
    """Write every vector below `folder`, in place of those that are there."""
    for kind, vectors in KINDS.items():
        shutil.rmtree(folder / kind, ignore_errors=True)
        for name, files in vectors.items():
            write_files(folder / kind / name, files)


def write_files(folder: Path, files: Files) -> None:
    """Write the files of one vector; what is not bytes is written as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, bytes) else json.dumps(content, indent=2, ensure_ascii=False).encode()
        path.write_bytes(text if isinstance(content, bytes) else text + b"\n")


if __name__ == "__main__":
    write_vectors(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
