"""How a room finds its members: every module in its folder, and every entry point that third parties declare.

A member is one file; adding it is adding the file. Listing names imports nothing; a member is imported when it is asked
for. Modules whose name starts with an underscore are the room's own machinery.
"""

import os
import re
import sys
from collections.abc import Iterator
from functools import cache, cached_property
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Final, Generic, TypeVar, cast

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Member = TypeVar("Member")

_GROUP: Final = re.compile(rb"^\s*\[\s*([^\]\s]+)\s*\]", re.MULTILINE)
_METADATA: Final = (".dist-info", ".egg-info")


class Registry(Generic[Member]):
    """The members of one room.

    Args:
        package: the room's package name.
        attribute: the name that each member module gives its member, e.g. `KIND`.
        group: the group of its entry points, where the room has members of several sorts; else the package name.
    """

    def __init__(self, package: str, attribute: str, group: str = "") -> None:
        self.package = package
        self.attribute = attribute
        self.group = group or package
        self._found: dict[str, Member | None] = {}

    @cached_property
    def _locations(self) -> dict[str, str]:
        """Name to `module:attribute`; a third party cannot take the name of a member of ours."""
        folder = Path(cast(str, import_module(self.package).__file__)).parent
        declared = _find_entry_points(tuple(sys.path)) if _may_declare(self.group) else ()
        third_party = {entry.name: entry.value for entry in declared if entry.group == self.group}
        own = {
            module.name: f"{self.package}.{module.name}:{self.attribute}"
            for module in iter_modules([str(folder)])
            if not module.name.startswith("_")
        }
        return dict(sorted((third_party | own).items()))

    def names(self) -> tuple[str, ...]:
        """Return the names of all members, sorted, without importing any."""
        return tuple(self._locations)

    def list_guests(self) -> tuple[str, ...]:
        """Return the names of the members that third parties declare, sorted, without importing any."""
        return tuple(name for name, place in self._locations.items() if not place.startswith(f"{self.package}."))

    def find(self, name: str) -> Member | None:
        """Return the member called `name`, importing it, or None: one of the room's modules may hold another sort."""
        location = self._locations.get(name)
        if location is None:
            return None
        if name not in self._found:
            module, _, attribute = location.partition(":")
            try:
                self._found[name] = cast(Member | None, getattr(import_module(module), attribute, None))
            except Exception as error:
                error.add_note(f"This is {name!r} of {self.group}, which stands in {location}.")
                raise
        return self._found[name]

    def __iter__(self) -> Iterator[tuple[str, Member]]:
        """Yield every member with its name, importing each."""
        for name in self.names():
            member = self.find(name)
            if member is not None:
                yield name, member


def _may_declare(group: str) -> bool:
    """Say whether packages may have entry points of a group: most have none, and to import their reader is slow."""
    finders = (each for each in sys.meta_path if hasattr(each, "find_distributions"))
    groups = _list_groups(tuple(sys.path))
    return groups is None or group.encode() in groups or any(each is not PathFinder for each in finders)


@cache
def _list_groups(path: tuple[str, ...]) -> frozenset[bytes] | None:
    """Return the groups of entry points that packages in these folders declare; None where one is no folder."""
    groups: set[bytes] = set()
    for folder in path:
        if not os.path.isdir(folder or "."):
            if os.path.exists(folder):
                return None
            continue
        for name in os.listdir(folder or "."):
            file = Path(folder, name, "entry_points.txt")
            if name.endswith(_METADATA) and file.is_file():
                groups.update(_GROUP.findall(file.read_bytes()))
    return frozenset(groups)


@cache
def _find_entry_points(_path: tuple[str, ...]) -> tuple["EntryPoint", ...]:
    """Return what all packages on the path declare, what takes precedence last: to find it, a file of each is read."""
    from importlib.metadata import distributions  # here: it imports parsers of mail, of tables and of archives

    return tuple(entry for package in reversed(list(distributions())) for entry in package.entry_points)
