"""What is said of an ONNX graph, whatever is merged: that it holds an adapter already, or is one of several."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from loraformat.bases._model import Site
from loraformat.problems import Problem

_HALF: Final = re.compile(r"(?:encoder|decoder)(?:[_.-]|$)")
_LISTED: Final = 8
_BRANCHES: Final = frozenset({"base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"})


def find_branches(sites: Sequence[Site]) -> list[Problem]:
    """Return a problem when the graph was exported with an adapter beside its weights."""
    module = next((site.module for site in sites if not _BRANCHES.isdisjoint(site.module.split("."))), None)
    if module is None:
        return []
    return [Problem("LF423", module, "a graph that already holds an adapter's branches", "the base model alone")]


def find_halves(path: Path) -> list[Problem]:
    """Return a note where a graph is one of several that a model was exported as, and the others stay as they are."""
    others = [each.name for each in sorted(path.parent.glob("*.onnx")) if _HALF.match(each.name) and each != path]
    if not (_HALF.match(path.name) and others):
        return []
    found = f"beside it {', '.join(others[:_LISTED])}"
    return [Problem("LF462", str(path), found, "the folder as the base, for all of them alike", severity="note")]
