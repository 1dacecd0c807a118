"""A base that is several models: each has its own sites, and a target may have a weight in any number of them."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

from loraformat.bases._abilities import RunnableBase
from loraformat.bases._model import BaseModel, Site
from loraformat.bases._roles import Anchors, Roles


@dataclass(frozen=True, slots=True)
class View:
    """One graph or state dict of a base of several; "graph" stands for both.

    Attributes:
        graph: its file, from the base's folder.
        component: which part of a pipeline it is, `unet` or `text_encoder`; empty where all graphs are of one model.
        half: `encoder` or `decoder`, where its file's name says that it is one: exporters leave that out of names.
        sites: of this graph alone.
        is_chosen: whether it is one of those that a merge is about.
        find_anchors: as `AnchoredBase` has it; None for a state dict.
        find_roles: as `StructuredBase` has it; None for a state dict.
    """

    graph: str
    component: str
    half: str
    sites: Sequence[Site]
    find_anchors: Callable[[], Anchors] | None = None
    find_roles: Callable[[], Roles] | None = None
    is_chosen: bool = True


@runtime_checkable
class ViewedBase(BaseModel, Protocol):
    """A base of several graphs, in which every target is looked for one by one."""

    @property
    def views(self) -> Sequence[View]:
        """Its graphs, in the order of their files."""
        ...

    def choose_graphs(self, graphs: Set[str]) -> Self:
        """Return the base, of which a merge is about these graphs alone; its outputs have the others as they are."""
        ...

    def locate_graph(self, graph: str) -> Path:
        """Return where the file of a graph is."""
        ...

    def list_runnable(self) -> Mapping[str, RunnableBase]:
        """Return the graphs by their files, each by itself, for whoever runs them; LF446 where nobody can."""
        ...
