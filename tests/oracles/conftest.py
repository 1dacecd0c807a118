"""The oracle tests compare with the real packages; nothing heavy is imported before a test asks for it."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# The suite runs with --import-mode=importlib, which does not let tests see their neighbours.
sys.path.append(str(Path(__file__).parent))

if TYPE_CHECKING:
    from lab import Lab

if os.environ.get("LORAFORMAT_REQUIRE_ORACLES"):  # In CI a package that is missing is an error, not a skip.
    for package in ("torch", "peft", "transformers", "onnxscript", "onnxruntime", "gguf"):
        importlib.import_module(package)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Lab"]:
    """Return the trained adapters and exported models, each made once in a run."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    from lab import Lab

    yield Lab(tmp_path_factory.mktemp("zoo"))
    torch.set_num_threads(threads)
