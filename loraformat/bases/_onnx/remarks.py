"""What is said of an ONNX graph, whatever is merged: that it holds an adapter already, or is one of several."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraformat.bases._model import Site
from loraformat.bases._onnx.scopes import Visit
from loraformat.problems import Problem

if TYPE_CHECKING:
    import onnx

_HALF: Final = re.compile(r"(?:encoder|decoder)(?:[_.-]|$)")
_LISTED: Final = 8
_COMPILED: Final = "com.microsoft.EPContext"
_ADAPTER: Final = "lora"
_BRANCHES: Final = frozenset({"base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"})


def find_branches(sites: Sequence[Site]) -> list[Problem]:
    """Return a problem when the graph was exported with an adapter beside its weights."""
    module = next((site.module for site in sites if not _BRANCHES.isdisjoint(site.module.split("."))), None)
    if module is None:
        return []
    return [Problem("LF423", module, "a graph that already holds an adapter's branches", "the base model alone")]


def find_compiled(visits: Sequence[Visit]) -> list[Problem]:
    """Return a problem when some of the graph was compiled for an accelerator: its weights are in that one's form."""
    node = next((visit.node for visit in visits if visit.op == _COMPILED), None)
    if node is None:
        return []
    found = f"compiled for {_read_source(node) or 'an accelerator'}, with its weights in a form of its own"
    return [Problem("LF636", f"EPContext {node.name!r}", found, "the model that it was compiled from")]


def _read_source(node: "onnx.NodeProto") -> str:
    return next(
        (attribute.s.decode(errors="replace") for attribute in node.attribute if attribute.name == "source"), ""
    )


def find_fed(graph: "onnx.GraphProto") -> list[Problem]:
    """Return a problem when weights have names and no numbers: a run, or who loads the model, is to give them."""
    held = {tensor.name for tensor in graph.initializer} | {each.values.name for each in graph.sparse_initializer}
    held.update(name for node in graph.node for name in node.output)
    read = dict.fromkeys(name for node in graph.node for name in node.input if name.endswith(".weight"))
    fed = [name for name in read if name not in held and _ADAPTER not in name.lower()]
    if not fed:
        return []
    return [Problem("LF637", fed[0], f"{len(fed)} weights that the model does not hold", "weights that it holds")]


def find_halves(path: Path) -> list[Problem]:
    """Return a note where a graph is one of several that a model was exported as, and the others stay as they are."""
    others = [each.name for each in sorted(path.parent.glob("*.onnx")) if _HALF.match(each.name) and each != path]
    if not (_HALF.match(path.name) and others):
        return []
    found = f"beside it {', '.join(others[:_LISTED])}"
    return [Problem("LF462", str(path), found, "the folder as the base, for all of them alike", severity="note")]
