"""A folder of several models: what belongs to all of them, and what travels along."""

import copy
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol, Self

from loraformat.bases import Site, View
from loraformat.bases._finishing import Checksums
from loraformat.bases._receipts import RECEIPT_NAME, describe_receipt_file, read_receipt_file
from loraformat.bases._travelling import find_travelling
from loraformat.images import Copy, FileImage, NewOutput
from loraformat.outputs import FOLDER_UNDO
from loraformat.problems import Problem
from loraformat.spans import InputFile, StoredTensor

PIPELINE: Final = "model_index.json"
"""By this file a folder is a pipeline of diffusers, whose sub-folders are its components."""


class FolderMember(Protocol):
    """A model of a folder of several."""

    @property
    def name(self) -> str:
        """Its file, from the folder."""
        ...

    @property
    def structure_sha256(self) -> str:
        """Digest of everything but the weights' payloads."""
        ...

    @property
    def problems(self) -> Sequence[Problem]:
        """What is odd about it, by names that no other member has."""
        ...

    def name_files(self) -> Mapping[str, InputFile]:
        """Return its files by their paths from the folder."""
        ...

    def list_tensors(self) -> list[StoredTensor]:
        """Return its tensors, by names that no other member has."""
        ...


class JoinedFolder(Checksums):
    """An opened folder of several models; the attributes are those of `BaseModel`.

    Args:
        path: the folder.
        entry: a file of it, which tells where the others may be.
        members: the models.
        apart: files that neither belong to them nor travel with them.
    """

    suffix = ""
    folder_mark = RECEIPT_NAME
    rewriter = None
    sites: Sequence[Site]
    _members: Sequence[FolderMember]
    _all_views: Sequence[View]

    def __init__(self, path: Path, entry: Path, members: Sequence[FolderMember], apart: Collection[str] = ()) -> None:
        self.path = path
        self._members = members
        digests = "".join(f"{member.name}\0{member.structure_sha256}\n" for member in members)
        self.structure_sha256 = hashlib.sha256(digests.encode()).hexdigest()
        own = {name for member in members for name in member.name_files()}
        self._travelling, left_out = find_travelling(entry, own.union({RECEIPT_NAME, FOLDER_UNDO}, apart))
        self.parent_receipt: Mapping[str, Any] | None
        self.parent_receipt, unread = read_receipt_file(path / RECEIPT_NAME)
        self._own_problems = [*left_out, *unread]
        self._chosen = frozenset(member.name for member in members)

    @property
    def problems(self) -> Sequence[Problem]:
        """What is odd about the models that a merge is about, and about what lies beside them."""
        chosen = (member for member in self._members if member.name in self._chosen)
        return [*(problem for member in chosen for problem in member.problems), *self._own_problems]

    @property
    def views(self) -> Sequence[View]:
        """The models, in each of which every target is looked for."""
        return [replace(view, is_chosen=view.graph in self._chosen) for view in self._all_views]

    def choose_graphs(self, graphs: Set[str]) -> Self:
        """Return the folder, of which a merge is about these models alone; its outputs have the others as they are."""
        narrowed = copy.copy(self)
        narrowed._chosen = frozenset(graphs)
        narrowed.sites = [site for site in self.sites if site.graph in graphs]
        return narrowed

    @property
    def files(self) -> Sequence[InputFile]:
        """The models' files, and all that travels."""
        own = (file for member in self._members for file in member.name_files().values())
        return list({file.path: file for file in (*own, *self._travelling.values())}.values())

    def list_tensors(self) -> Sequence[StoredTensor]:
        """Return every stored tensor, model after model."""
        return [tensor for member in self._members for tensor in member.list_tensors()]

    def describe_beside(self, output: NewOutput) -> Iterator[FileImage]:
        """Yield the images of the files that travel, and last of the receipt."""
        folder = output.path
        for name, file in self._travelling.items():
            yield FileImage(folder / name, [Copy(file, 0, file.size_bytes)])
        yield from describe_receipt_file(folder / RECEIPT_NAME, output.blank_bytes)

    def encode_receipt(self, text: str) -> bytes:
        """Return the text as the receipt's file holds it."""
        return text.encode("utf-8")

    def locate_graph(self, graph: str) -> Path:
        """Return where the file of one of the models is."""
        return self.path / graph

    def list_stale(self, output: Path) -> list[Path]:
        """Return nothing: the whole folder is replaced."""
        return []
